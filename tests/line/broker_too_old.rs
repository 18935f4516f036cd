//! A broker without fast ingest is refused, by the version found and the one needed.

use millrace_lab::NatsOptions;

use crate::stage::{Setting, Stage};

#[tokio::test]
async fn a_broker_that_is_too_old_is_refused_by_its_version() {
    let stage = Stage::set(Setting {
        nats: NatsOptions {
            too_old: true,
            ..NatsOptions::default()
        },
        ..Setting::default()
    })
    .await;
    let version = stage
        .nats
        .client()
        .await
        .expect("client")
        .server_info()
        .version;
    for arguments in [
        &["run"][..],
        &["run", "--only", "capture"],
        &["run", "--once"],
    ] {
        let run = stage.start_with(arguments);
        let found = format!("has version {version}");
        let needed = "needs 2.14 or later";
        let logs = stage
            .ends(
                run,
                4,
                &["E1203", &found, needed, "remedy: upgrade every NATS server"],
            )
            .await;
        assert_eq!(logs.matches("error: ").count(), 1, "{logs}");
    }
    let made = stage
        .ask("SELECT count(*)::text FROM pg_replication_slots")
        .await;
    assert_eq!(made.as_deref(), Some("0"));
    let made = stage.ask("SELECT count(*)::text FROM pg_publication").await;
    assert_eq!(made.as_deref(), Some("0"));
}
