//! A sink begins behind the stream's newest message. That it cannot be read does not say that there is none.

use async_nats::jetstream::{self, stream};
use millrace_cdc::stream as made;
use millrace_event::work::{COPIES, SCHEMAS, SINKS};

use millrace_lab::NatsOptions;

use crate::stage::{Setting, Stage};

#[tokio::test]
async fn a_message_that_cannot_be_read_is_no_stream_that_is_not_begun() {
    // The broker drops this request, as one that is lost.
    let config = "authorization { users: [ { user: lab, password: lab, permissions: { publish: { \
                  allow: \">\", deny: [\"$JS.API.STREAM.MSG.GET.CDC_shop\"] } } } ] }\nno_auth_user: lab\n";
    let stage = Stage::set(Setting {
        nats: NatsOptions {
            config: config.to_owned(),
            ..NatsOptions::default()
        },
        ..Setting::default()
    })
    .await;
    let jetstream = jetstream::new(stage.nats.client().await.expect("client"));
    for kind in [COPIES, SCHEMAS, SINKS] {
        let bucket = made::bucket(&jetstream, "shop", kind, 1).await;
        bucket.expect("made");
    }
    let config = stream::Config {
        name: "CDC_shop".to_owned(),
        subjects: vec!["cdc.shop.>".to_owned()],
        ..Default::default()
    };
    jetstream.create_stream(config).await.expect("made");
    let sink = stage.start_with(&["run", "--only", "sink:replica"]);
    Stage::logs(&sink, "waiting for capture to begin stream CDC_shop").await;
    drop(sink);

    let sent = jetstream.publish("cdc.shop.control.start", "{}".into());
    sent.await.expect("sent").await.expect("stored");
    let sink = stage.start_with(&["run", "--only", "sink:replica"]);
    Stage::logs(&sink, "the stream's newest message cannot be read").await;
    let logs = sink.logs();
    assert!(!logs.contains("waiting for capture"), "{logs}");
}
