//! The source stops, crashes, or is not there yet.

use std::time::{Duration, Instant};

use crate::kill::{seeded, shop_setting, traffic};
use crate::stage::{Setting, Stage};

const FAST: Duration = Duration::from_secs(10);

#[tokio::test]
async fn a_fast_shutdown_does_not_wait_for_us_and_the_line_goes_on_after_it() {
    let mut rng = seeded();
    let mut stage = Stage::set(shop_setting()).await;
    let mut pipeline = stage.start();
    Stage::readyz(&mut pipeline, 200, "streaming").await;
    let traffic = traffic(&stage, &mut rng, 150).await;
    for _ in 0..2 {
        tokio::time::sleep(Duration::from_millis(700)).await;
        let began = Instant::now();
        stage.postgres.stop_fast().await.expect("stopped");
        assert!(began.elapsed() < FAST, "{:?}", began.elapsed());
        Stage::readyz(&mut pipeline, 503, "retrying").await;
        stage.postgres.start_again().await.expect("started");
        Stage::readyz(&mut pipeline, 200, "streaming").await;
    }
    traffic.stop().await.expect("traffic");
    stage.reconnect().await;
    stage.equal(&pipeline).await;
}

#[tokio::test]
async fn a_killed_source_goes_on_where_it_was() {
    let mut rng = seeded();
    let mut stage = Stage::set(shop_setting()).await;
    let mut pipeline = stage.start();
    Stage::readyz(&mut pipeline, 200, "streaming").await;
    let traffic = traffic(&stage, &mut rng, 150).await;
    for _ in 0..2 {
        tokio::time::sleep(Duration::from_millis(700)).await;
        stage.postgres.kill9();
        stage.postgres.start_again().await.expect("started");
    }
    traffic.stop().await.expect("traffic");
    stage.reconnect().await;
    stage.equal(&pipeline).await;
    assert!(pipeline.is_running());
}

#[tokio::test]
async fn a_source_that_is_not_there_at_start_is_tried_again_until_it_is() {
    let mut stage = Stage::set(Setting::default()).await;
    stage.sql("INSERT INTO t VALUES (1, 'one')").await;
    stage.postgres.stop_fast().await.expect("stopped");
    let mut pipeline = stage.start();
    let address = format!("127.0.0.1:{}", stage.postgres.port());
    let body = Stage::readyz(&mut pipeline, 503, "retrying").await;
    assert!(body.contains(&address), "{body}");
    stage.postgres.start_again().await.expect("started");
    stage.reconnect().await;
    stage.equal(&pipeline).await;
}
