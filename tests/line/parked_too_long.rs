//! A table that stays parked for longer than the stream keeps changes holds nobody up, and is copied again.

use std::time::Duration;

use millrace_lab::Pipeline;

use crate::stage::{Setting, Stage};

const SCHEMA: &str = "CREATE TABLE t (id int PRIMARY KEY, v text);
    CREATE TABLE u (id int PRIMARY KEY, v text)";

/// Longer than the sink waits between two looks at a parked table, which is 5 s.
const A_LOOK: Duration = Duration::from_secs(7);

async fn set(stream: &str, sink: &str) -> (Stage, Pipeline) {
    let stage = Stage::set(Setting {
        schema: SCHEMA,
        tables: &[("public.t", ""), ("public.u", "")],
        stream,
        sink,
        ..Setting::default()
    })
    .await;
    stage
        .sql("INSERT INTO t VALUES (1, 'a'), (7, 'gone'); INSERT INTO u VALUES (1, 'a')")
        .await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    (stage, pipeline)
}

/// Makes the target refuse `t`, and changes it.
async fn parks(stage: &Stage, pipeline: &Pipeline) {
    stage
        .target_sql("ALTER TABLE t DROP CONSTRAINT t_pkey")
        .await;
    stage
        .sql(
            "INSERT INTO t VALUES (2, 'b'); DELETE FROM t WHERE id = 7; INSERT INTO u VALUES (2, 'b')",
        )
        .await;
    shows(stage, pipeline, 2).await;
}

/// Waits until `u` has its row of this number.
async fn shows(stage: &Stage, pipeline: &Pipeline, id: u32) {
    let sql = format!("SELECT id::text FROM u WHERE id = {id}");
    stage.target_shows(pipeline, &sql, &id.to_string()).await;
}

/// Removes all but the newest message, as the stream does at its limits.
async fn forgets(stage: &Stage) {
    let client = stage.nats.client().await.expect("client");
    let context = async_nats::jetstream::new(client);
    let stream = context.get_stream("CDC_shop").await.expect("stream");
    let last = stream.get_info().await.expect("info").state.last_sequence;
    stream.purge().sequence(last).await.expect("purged");
}

fn copies(pipeline: &Pipeline) -> usize {
    pipeline.logs().matches("copy requested").count()
}

#[tokio::test]
async fn a_parked_table_does_not_keep_the_stream_full() {
    let stream = "confirm = \"acked\"\nretention = { max_bytes = \"1MiB\" }";
    let (stage, mut pipeline) = set(stream, "").await;
    parks(&stage, &pipeline).await;
    // Twice as much as the stream may hold, and all of it long before `max_age`.
    stage
        .sql(
            "DO $$ BEGIN FOR i IN 1001..2400 LOOP
                 INSERT INTO u VALUES (i, repeat(md5(i::text), 32)); COMMIT;
             END LOOP; END $$",
        )
        .await;
    shows(&stage, &pipeline, 2400).await;
    Stage::logs(&pipeline, "E1208").await;
    Stage::logs(&pipeline, "E1314").await;
    Stage::readyz(&mut pipeline, 200, "streaming").await;

    stage.target_sql("ALTER TABLE t ADD PRIMARY KEY (id)").await;
    stage.equal(&pipeline).await;
    stage
        .sql("UPDATE t SET v = 'again'; INSERT INTO u VALUES (3, 'c')")
        .await;
    stage.equal(&pipeline).await;
    assert_eq!(copies(&pipeline), 2, "{}", pipeline.logs());
    assert!(!pipeline.logs().contains("E1312"), "{}", pipeline.logs());
}

#[tokio::test]
async fn a_parked_table_whose_changes_are_gone_waits_until_it_is_taken_again() {
    let (stage, mut pipeline) = set("confirm = \"acked\"", "required = false").await;
    parks(&stage, &pipeline).await;
    forgets(&stage).await;
    Stage::logs(&pipeline, "E1314").await;
    // It is not copied while the target still refuses it, and the others go on.
    tokio::time::sleep(A_LOOK).await;
    stage
        .sql("INSERT INTO t VALUES (3, 'c'); INSERT INTO u VALUES (3, 'c')")
        .await;
    shows(&stage, &pipeline, 3).await;
    assert_eq!(copies(&pipeline), 1, "{}", pipeline.logs());
    Stage::readyz(&mut pipeline, 200, "streaming").await;
    pipeline.kill9();

    stage.sql("INSERT INTO u VALUES (4, 'd')").await;
    let once = stage.start_with(&["run", "--once"]);
    stage.ends(once, 3, &["table still parked"]).await;
    stage.target_sql("ALTER TABLE t ADD PRIMARY KEY (id)").await;
    assert_eq!(stage.once().await.rows, 3 + 4);
}

#[tokio::test]
async fn a_gap_found_while_catching_up_costs_that_table_a_copy_only() {
    let (stage, mut pipeline) = set("confirm = \"acked\"", "required = false").await;
    parks(&stage, &pipeline).await;
    pipeline.kill9();
    forgets(&stage).await;
    stage.target_sql("ALTER TABLE t ADD PRIMARY KEY (id)").await;
    stage
        .sql("INSERT INTO t VALUES (3, 'c'); INSERT INTO u VALUES (3, 'c')")
        .await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    Stage::logs(&pipeline, "E1314").await;
}

#[tokio::test]
async fn a_copy_that_the_target_refuses_parks_the_table_again() {
    let (stage, mut pipeline) = set("confirm = \"acked\"", "required = false").await;
    parks(&stage, &pipeline).await;
    forgets(&stage).await;
    Stage::logs(&pipeline, "E1314").await;
    // Nothing about the table's shape tells that it refuses every row.
    stage
        .target_sql(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
                 $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '42501'; END $$;
             CREATE TRIGGER refuse BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION refuse();
             ALTER TABLE t ADD PRIMARY KEY (id)",
        )
        .await;
    Stage::logs(&pipeline, "E1308").await;
    tokio::time::sleep(A_LOOK).await;
    stage
        .sql("INSERT INTO t VALUES (3, 'c'); INSERT INTO u VALUES (3, 'c')")
        .await;
    shows(&stage, &pipeline, 3).await;
    // The first one, and one that was refused.
    assert_eq!(copies(&pipeline), 2, "{}", pipeline.logs());
    Stage::readyz(&mut pipeline, 200, "streaming").await;

    stage.target_sql("DROP TRIGGER refuse ON t").await;
    stage.equal(&pipeline).await;
}
