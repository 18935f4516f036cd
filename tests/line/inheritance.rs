//! Children by inheritance are tables of their own: they are not captured with their parent, and the application writes
//! them as before.

use std::time::{Duration, Instant};

use crate::backfill::{may_begin, says};
use crate::stage::{PATIENCE, Setting, Stage};

/// `child` and `grandchild` inherit no primary key.
const SCHEMA: &str = "CREATE TABLE t (id int PRIMARY KEY, v text, w text);
    CREATE TABLE child (c int) INHERITS (t); CREATE TABLE grandchild () INHERITS (child);
    CREATE TABLE u (id int PRIMARY KEY, v text);
    INSERT INTO t SELECT i, 't', 'w' FROM generate_series(1, 20) i;
    INSERT INTO child SELECT i, 'child', 'w' FROM generate_series(101, 110) i;
    INSERT INTO grandchild SELECT i, 'grandchild', 'w' FROM generate_series(201, 210) i";

const ROWS: &str = "SELECT string_agg(id || v, ' ' ORDER BY id)";

async fn stage() -> Stage {
    Stage::set(Setting {
        schema: SCHEMA,
        tables: &[("public.t", ""), ("public.u", "")],
        ..Setting::default()
    })
    .await
}

/// What the application does with rows of its own.
async fn written(stage: &Stage, id: u32) {
    stage
        .sql(&format!(
            "UPDATE child SET v = v || '{id}' WHERE id < 105; DELETE FROM grandchild WHERE id = 200 + {id};
             UPDATE t SET v = v || '{id}' WHERE id % 3 = 0; DELETE FROM t WHERE id IN ({id}, 100 + {id})"
        ))
        .await;
}

#[tokio::test]
async fn a_parent_is_captured_without_its_children() {
    let stage = stage().await;
    let mut pipeline = stage.start();
    let own = format!("{ROWS} FROM ONLY t");
    let is = format!("{ROWS} FROM t");
    let expected = stage.source_text(&own).await;
    stage.target_shows(&pipeline, &is, &expected).await;
    written(&stage, 1).await;
    let expected = stage.source_text(&own).await;
    stage.target_shows(&pipeline, &is, &expected).await;

    may_begin(&stage, &pipeline).await;
    says(&stage, &["start", "t", "--wait"], 0, &["done"]).await;
    assert_eq!(stage.target_text(&is).await, expected);
    may_begin(&stage, &pipeline).await;
    let part = ["start", "t", "--where", "id > 0", "--wait"];
    says(&stage, &part, 0, &["done"]).await;
    assert_eq!(stage.target_text(&is).await, expected);

    // The publication is changed, and the table is taken out of it.
    let source = "heartbeat_interval = \"500ms\"";
    stage.rewrite(source, "columns = { exclude = [\"w\"] }");
    pipeline.kill9();
    let mut pipeline = stage.start();
    written(&stage, 2).await;
    let expected = stage.source_text(&own).await;
    stage.target_shows(&pipeline, &is, &expected).await;
    let members = "SELECT string_agg(prrelid::regclass::text, ' ') FROM pg_publication_rel";
    assert_eq!(stage.source_text(members).await, "t");
    written(&stage, 3).await;
    pipeline.kill9();
}

#[tokio::test]
async fn children_of_an_older_publication_leave_it() {
    let stage = stage().await;
    stage
        .sql("ALTER TABLE grandchild ADD PRIMARY KEY (id); CREATE PUBLICATION millrace_shop FOR TABLE t, u")
        .await;
    let refused = stage.source.batch_execute("DELETE FROM child").await;
    assert!(refused.is_err(), "Postgres refuses it");
    let pipeline = stage.start();
    // One that has a key is no harm to anybody.
    let members =
        "SELECT string_agg(prrelid::regclass::text, ' ' ORDER BY prrelid) FROM pg_publication_rel";
    let deadline = Instant::now() + PATIENCE;
    while stage.source_text(members).await != "t grandchild u" {
        assert!(Instant::now() < deadline, "{}", pipeline.logs());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    written(&stage, 1).await;
    let expected = stage.source_text(&format!("{ROWS} FROM ONLY t")).await;
    stage
        .target_shows(&pipeline, &format!("{ROWS} FROM t"), &expected)
        .await;
    let logs = pipeline.logs();
    assert!(
        logs.contains("E1107") && logs.contains("public.child"),
        "{logs}"
    );
}
