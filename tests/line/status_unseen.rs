//! What `millrace status` cannot look at it does not call complete.

use std::time::Duration;

use millrace_lab::Nats;
use serde_json::Value;

use crate::stage::{PATIENCE, Setting, Stage};

/// What it says of `public.t` and of `public.u`: the state, whether it is complete, and why.
async fn told(stage: &Stage) -> [(String, bool, String); 2] {
    let mut status = stage.start_with(&["status", "-o", "json"]);
    status.wait(PATIENCE).await.expect("ends");
    let json: Value = serde_json::from_str(&status.stdout()).expect("json");
    ["public.t", "public.u"].map(|name| {
        let mut tables = json["tables"].as_array().expect("tables").iter();
        let table = tables.find(|table| table["name"] == name);
        let table = table.unwrap_or_else(|| panic!("{json:#}"));
        let text = |key: &str| table[key].as_str().unwrap_or_default().to_owned();
        let complete = table["complete"].as_bool().expect("known");
        (text("state"), complete, text("reason"))
    })
}

async fn parked(nats: &Nats) -> Result<usize, millrace_cdc::Error> {
    let client = nats.client().await.expect("client");
    let jetstream = async_nats::jetstream::new(client);
    let found = millrace_cdc::captured(&jetstream, "shop").await;
    found.map(|tables| tables.iter().filter(|table| table.parked).count())
}

#[tokio::test]
async fn without_its_broker_no_table_is_complete() {
    let mut stage = Stage::set(Setting::two_tables()).await;
    assert_eq!(parked(&stage.nats).await.expect("no bucket"), 0);
    stage.once().await;
    stage
        .sql("ALTER PUBLICATION millrace_shop DROP TABLE u")
        .await;
    let once = stage.start_with(&["run", "--once"]);
    stage.ends(once, 3, &["E1106"]).await;
    assert_eq!(parked(&stage.nats).await.expect("read"), 1);
    let [t, u] = told(&stage).await;
    assert_eq!((t.0.as_str(), t.1), ("stopped", true));
    assert_eq!((u.0.as_str(), u.1), ("parked", false));

    let client = stage.nats.client().await.expect("client");
    stage.nats.stop().await.expect("stopped");
    for (_, complete, why) in told(&stage).await {
        assert!(!complete, "nobody could look whether it is lost");
        assert!(why.contains("is not known"), "{why}");
    }
    let mut jetstream = async_nats::jetstream::new(client);
    jetstream.set_timeout(Duration::from_secs(1));
    let found = millrace_cdc::captured(&jetstream, "shop").await;
    assert!(found.is_err(), "{found:?}");
}
