//! Capture reads what is stored beside the stream through the buckets' leaders: any replica answers a direct get, and
//! one that lags behind would say what was there before.

use std::time::{Duration, Instant};

use futures_util::{FutureExt as _, StreamExt as _};

use crate::stage::{PATIENCE, Setting, Stage};

#[tokio::test]
async fn capture_asks_the_leaders_of_its_buckets() {
    let stage = Stage::set(Setting::default()).await;
    let client = stage.nats.client().await.expect("client");
    let mut direct = client
        .subscribe("$JS.API.DIRECT.GET.>")
        .await
        .expect("subscribed");
    let mut leaders = client
        .subscribe("$JS.API.STREAM.MSG.GET.*")
        .await
        .expect("subscribed");
    client.flush().await.expect("flushed");
    // A sink asks for its copy, and capture is started again.
    let mut pipeline = stage.start();
    stage.sql("INSERT INTO t VALUES (1, 'one')").await;
    stage.equal(&pipeline).await;
    pipeline.terminate().expect("signal");
    assert_eq!(pipeline.wait(PATIENCE).await.expect("ends"), 0);
    while direct.next().now_or_never().flatten().is_some() {}
    let mut pipeline = stage.start_with(&["run", "--only", "capture"]);
    Stage::readyz(&mut pipeline, 200, "streaming").await;
    let buckets = ["schemas", "sinks", "copies", "state"];
    let mut asked = [false; 4];
    let deadline = Instant::now() + PATIENCE;
    while !asked.iter().all(|asked| *asked) {
        let rest = deadline.saturating_duration_since(Instant::now());
        let next = tokio::time::timeout(rest, leaders.next()).await;
        let subject = next.expect("not all were asked").expect("open").subject;
        for (bucket, asked) in buckets.iter().zip(&mut asked) {
            *asked |= subject.ends_with(bucket);
        }
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let replica = direct.next().now_or_never().flatten();
    assert!(replica.is_none(), "{replica:?}");
}
