//! What the verbs answer: plainly, once, and with the exit code that the README names.

use millrace_lab::Pipeline;

use crate::stage::{PATIENCE, Setting, Stage};

async fn ended(mut pipeline: Pipeline, code: i32) -> (String, String) {
    let ended = pipeline.wait(PATIENCE).await.expect("ends in time");
    assert_eq!(ended, code, "{}", pipeline.logs());
    (pipeline.stdout(), pipeline.stderr())
}

#[tokio::test]
async fn once_says_in_one_line_what_it_did() {
    let stage = Stage::set(Setting::default()).await;
    stage
        .sql("INSERT INTO t SELECT i, 'copied' FROM generate_series(1, 7) i")
        .await;
    let (stdout, _) = ended(stage.start_with(&["run", "--once"]), 0).await;
    assert_eq!(stdout.lines().count(), 1, "{stdout}");
    assert!(stdout.contains("7 rows written in "), "{stdout}");

    stage
        .sql("INSERT INTO t VALUES (8, 'one'), (9, 'two'); DELETE FROM t WHERE id = 1")
        .await;
    let lsn = stage
        .source_text("SELECT pg_current_wal_insert_lsn()::text")
        .await;
    let (stdout, _) = ended(stage.start_with(&["run", "--once"]), 0).await;
    let said = "3 changes read, 3 rows written in ";
    assert!(stdout.starts_with("applied everything up to "), "{stdout}");
    assert!(
        stdout.contains(said) && stdout.ends_with(" s\n"),
        "{stdout}"
    );
    let told: String = stdout.split([' ', ':']).nth(4).unwrap_or_default().into();
    let reached = format!("SELECT ('{told}'::pg_lsn >= '{lsn}'::pg_lsn)::text");
    assert_eq!(stage.source_text(&reached).await, "true", "{stdout}");

    // Nothing to do is said too.
    let (stdout, _) = ended(stage.start_with(&["run", "--once"]), 0).await;
    assert!(
        stdout.contains("0 changes read, 0 rows written"),
        "{stdout}"
    );
    let capture = &["run", "--once", "--only", "capture"];
    let (stdout, _) = ended(stage.start_with(capture), 0).await;
    assert!(
        stdout.starts_with("published everything up to "),
        "{stdout}"
    );
}

#[tokio::test]
async fn status_says_first_that_the_broker_is_out_of_reach() {
    let mut stage = Stage::set(Setting::default()).await;
    stage.once().await;
    let (stdout, _) = ended(stage.start_with(&["status"]), 0).await;
    assert!(stdout.starts_with("stopped\n"), "{stdout}");

    let address = stage.nats.url();
    stage.nats.stop().await.expect("stopped");
    let (stdout, _) = ended(stage.start_with(&["status"]), 0).await;
    let headline = stdout.lines().next().unwrap_or_default();
    let expected = format!("unreachable: E1201: NATS cannot be reached at {address}");
    assert!(headline.starts_with(&expected), "{stdout}");
    assert!(stdout.contains("  do: check stream.servers"), "{stdout}");
    let (stdout, _) = ended(stage.start_with(&["status", "-o", "json"]), 0).await;
    let json: serde_json::Value = serde_json::from_str(&stdout).expect("json");
    assert_eq!(json["state"], "unreachable", "{stdout}");
    assert_eq!(json["code"], "E1201", "{stdout}");
    let (_, stderr) = ended(stage.start_with(&["status", "--check"]), 3).await;
    assert!(stderr.contains("stream: unreachable: E1201"), "{stderr}");
}

#[tokio::test]
async fn drop_names_each_thing_once() {
    let stage = Stage::set(Setting::default()).await;
    stage.once().await;
    let things = [
        "slot millrace_shop (",
        "publication millrace_shop\n",
        "stream CDC_shop (",
        "bucket MILLRACE_shop_state\n",
        "bucket MILLRACE_shop_sinks\n",
    ];
    // Nobody can be asked: what would go is shown, and stays.
    let (stdout, stderr) = ended(stage.start_with(&["drop"]), 2).await;
    assert_eq!(stdout, "");
    for thing in things {
        assert_eq!(stderr.matches(thing).count(), 1, "{stderr}");
    }
    let (stdout, stderr) = ended(stage.start_with(&["drop", "--yes"]), 0).await;
    assert_eq!(stderr, "");
    for thing in things {
        assert_eq!(stdout.matches(thing).count(), 1, "{stdout}");
        assert!(stdout.contains(&format!("removed {thing}")), "{stdout}");
    }
    let (stdout, _) = ended(stage.start_with(&["drop", "--yes"]), 0).await;
    assert_eq!(stdout, "nothing to remove\n");
}
