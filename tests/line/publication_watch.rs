//! A table that somebody takes out of the publication is parked alone, and exact again once it is back.

use std::time::{Duration, Instant};

use millrace_lab::Pipeline;

use crate::stage::{PATIENCE, Setting, Stage};

const LEAVE: &str = "ALTER PUBLICATION millrace_shop DROP TABLE u";

/// The statement that the status tells.
const RETURN: &str = "ALTER PUBLICATION \"millrace_shop\" ADD TABLE ONLY \"public\".\"u\"";

/// Changes that nobody captures: every row of `u` is another, is new, or is gone.
const MISSED: &str = "UPDATE u SET v = 'missed' WHERE id <= 300; DELETE FROM u WHERE id > 400; \
    INSERT INTO u SELECT i, 'missed' FROM generate_series(501, 600) i";

async fn stage() -> Stage {
    let stage = Stage::set(Setting {
        schema: "CREATE TABLE t (id int PRIMARY KEY, v text); CREATE TABLE u (id int PRIMARY KEY, v text); \
                 INSERT INTO u SELECT i, 'old' FROM generate_series(1, 500) i",
        tables: &[("public.t", ""), ("public.u", "")],
        ..Setting::default()
    })
    .await;
    stage.sql("INSERT INTO t VALUES (0, 'begin')").await;
    stage
}

/// Waits until the process streams and tells of `public.u`, and of no other table, that it is parked, and how it
/// comes back.
async fn parked(pipeline: &mut Pipeline) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let (_, status) = pipeline.get("/status").await.expect("answers");
        let status: serde_json::Value = serde_json::from_str(&status).expect("json");
        let tables = status["tables"].as_array().expect("tables");
        if let [table] = tables.as_slice()
            && table["name"] == "public.u"
            && table["state"] == "parked"
            && table["code"] == "E1106"
            && table["remedy"]
                .as_str()
                .is_some_and(|remedy| remedy.starts_with(RETURN))
            && status["state"] == "streaming"
        {
            return;
        }
        assert!(Instant::now() < deadline, "{status}\n{}", pipeline.logs());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// What `millrace status` says of `public.u`: its state, and whether it is complete.
async fn told(stage: &Stage) -> (String, bool) {
    let status = stage.start_with(&["status", "-o", "json"]);
    let mut status = status;
    status.wait(PATIENCE).await.expect("ends");
    let json: serde_json::Value = serde_json::from_str(&status.stdout()).expect("json");
    let tables = json["tables"].as_array().expect("tables");
    let u = tables.iter().find(|table| table["name"] == "public.u");
    let u = u.unwrap_or_else(|| panic!("{json}"));
    let state = u["state"].as_str().unwrap_or_default().to_owned();
    (state, u["complete"].as_bool().unwrap_or(true))
}

#[tokio::test]
async fn a_table_that_left_is_parked_alone_and_returns_equal() {
    let stage = stage().await;
    let mut pipeline = stage.start();
    stage.equal(&pipeline).await;
    stage.sql(LEAVE).await;
    parked(&mut pipeline).await;
    Stage::readyz(&mut pipeline, 200, "streaming").await;

    stage.sql(MISSED).await;
    stage.sql("INSERT INTO t VALUES (1, 'others go on')").await;
    let others = "SELECT v FROM t WHERE id = 1";
    stage.target_shows(&pipeline, others, "others go on").await;
    assert_eq!(
        stage
            .target_text("SELECT count(*)::text FROM u WHERE v = 'old'")
            .await,
        "500"
    );
    // A crash changes nothing about it, and nothing puts the table back but the operator.
    pipeline.kill9();
    let (_, complete) = told(&stage).await;
    assert!(
        !complete,
        "nobody runs, and the table is still not verified"
    );
    let mut pipeline = stage.start();
    parked(&mut pipeline).await;
    stage.sql("INSERT INTO t VALUES (2, 'and on')").await;
    let others = "SELECT v FROM t WHERE id = 2";
    stage.target_shows(&pipeline, others, "and on").await;

    stage.sql(RETURN).await;
    stage.sql("UPDATE u SET v = 'after' WHERE id = 301").await;
    assert_eq!(stage.equal(&pipeline).await.rows, 503);
    let deadline = Instant::now() + PATIENCE;
    while told(&stage).await != ("streaming".to_owned(), true) {
        assert!(Instant::now() < deadline, "{}", pipeline.logs());
    }
    let left = pipeline.get("/status").await.expect("answers").1;
    assert!(!left.contains("parked"), "{left}");
}

#[tokio::test]
async fn what_left_while_nothing_runs_is_told_by_the_status() {
    let stage = stage().await;
    stage.once().await;
    let check = ["status", "--check"];
    let sound = stage.start_with(&check);
    let logs = stage.ends(sound, 3, &["stopped"]).await;
    assert!(!logs.contains("E1106"), "{logs}");
    stage.sql(LEAVE).await;
    let left = format!(
        "table public.u: parked: E1106: publication {:?} does not have",
        "millrace_shop"
    );
    stage.ends(stage.start_with(&check), 3, &[&left]).await;
    assert_eq!(told(&stage).await, ("parked".to_owned(), false));
    let json = stage.start_with(&["status", "-o", "json"]);
    let remedy = serde_json::to_string(RETURN).expect("json");
    stage.ends(json, 0, &[remedy.trim_matches('"')]).await;
    // Back, and nobody has read it again.
    stage.sql(RETURN).await;
    assert_eq!(told(&stage).await, ("parked".to_owned(), false));
    let pipeline = stage.start();
    let deadline = Instant::now() + PATIENCE;
    while told(&stage).await != ("streaming".to_owned(), true) {
        assert!(Instant::now() < deadline, "{}", pipeline.logs());
    }
    Stage::stopped(pipeline).await;
    assert_eq!(told(&stage).await, ("stopped".to_owned(), true));
    // One that was never captured is put in by the next run.
    let config = stage.same_config().table("public.w", "");
    config.write_to(stage.folder.path()).expect("written");
    stage.sql("CREATE TABLE w (id int PRIMARY KEY)").await;
    let logs = stage.ends(stage.start_with(&check), 3, &[]).await;
    assert!(!logs.contains("E1106"), "{logs}");
    let never = config.source("create = \"never\"");
    never.write_to(stage.folder.path()).expect("written");
    stage
        .ends(
            stage.start_with(&check),
            3,
            &["table public.w: stopped: E1106", "lacks"],
        )
        .await;
    stage.sql("DROP PUBLICATION millrace_shop").await;
    let gone = "table public.u: parked: E1106: publication \"millrace_shop\" was dropped";
    stage.ends(stage.start_with(&check), 3, &[gone]).await;
}

#[tokio::test]
async fn a_table_that_left_and_returned_while_nothing_ran_is_read_again() {
    let stage = stage().await;
    let mut pipeline = stage.start();
    stage.equal(&pipeline).await;
    pipeline.terminate().expect("signal");
    pipeline.wait(PATIENCE).await.expect("ends");
    stage.sql(LEAVE).await;
    stage.sql(MISSED).await;
    stage.sql(RETURN).await;
    let pipeline = stage.start();
    assert_eq!(stage.equal(&pipeline).await.rows, 501);
}

#[tokio::test]
async fn a_table_that_left_and_returned_between_two_looks_is_read_again() {
    let stage = stage().await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    stage.sql(&format!("{LEAVE}; {MISSED}; {RETURN}")).await;
    assert_eq!(stage.equal(&pipeline).await.rows, 501);
}

#[tokio::test]
async fn a_table_that_is_gone_at_the_start_parks_alone() {
    let stage = stage().await;
    stage.once().await;
    stage.sql(LEAVE).await;
    stage.sql(MISSED).await;
    stage.sql("INSERT INTO t VALUES (1, 'others go on')").await;
    let once = stage.start_with(&["run", "--once"]);
    stage
        .ends(once, 3, &["E1106", "ADD TABLE", "is parked"])
        .await;
    assert_eq!(
        stage.target_text("SELECT v FROM t WHERE id = 1").await,
        "others go on"
    );
    stage.sql(RETURN).await;
    let pipeline = stage.start();
    assert_eq!(stage.equal(&pipeline).await.rows, 502);
}
