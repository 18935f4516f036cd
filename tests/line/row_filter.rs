//! A part of a table's rows is captured: rows come into it, leave it, and move within it.

use millrace_lab::{ConfigDir, Pipeline, PostgresOptions};

use crate::stage::{PATIENCE, Setting, Stage};

const TABLE: &str = "CREATE TABLE t (id int PRIMARY KEY, status text NOT NULL, v text);
    INSERT INTO t SELECT i, CASE WHEN i % 2 = 0 THEN 'open' ELSE 'draft' END, 'v' || i FROM generate_series(1, 10) i;";
const FULL: &str = "ALTER TABLE t REPLICA IDENTITY FULL";
const INDEX: &str = "CREATE UNIQUE INDEX t_identity ON t (id, status);
    ALTER TABLE t REPLICA IDENTITY USING INDEX t_identity";
const OPEN: &str = "where = \"status <> 'draft'\"";
const ROWS: &str =
    "SELECT coalesce(string_agg(concat_ws('|', id, status, v), ' ' ORDER BY id), '') FROM t";
const CLAUSES: &str = "SELECT coalesce(string_agg(concat_ws(' ', tablename, array_to_string(attnames, ','), rowfilter), ';'), 'none') \
    FROM pg_publication_tables";

async fn stage(identity: &str, table: &str) -> Stage {
    Stage::set(Setting {
        schema: &format!("{TABLE} {identity}"),
        tables: &[("public.t", table)],
        ..Setting::default()
    })
    .await
}

/// Waits until the target has exactly the source's rows of the part.
async fn part(stage: &Stage, pipeline: &Pipeline) {
    let expected = stage
        .source_text(&format!("{ROWS} WHERE status <> 'draft'"))
        .await;
    stage.target_shows(pipeline, ROWS, &expected).await;
}

#[tokio::test]
async fn rows_enter_leave_and_move_within_the_part() {
    for (identity, table) in [
        (FULL, OPEN.to_owned()),
        (INDEX, OPEN.to_owned()),
        (INDEX, format!("key = [\"id\"]\n{OPEN} # it is a comment")),
        // Beside a column list, and spelt otherwise.
        (
            INDEX,
            "where = \"NOT status = 'draft' -- those\"\n[columns]\nexclude = [\"v\"]".to_owned(),
        ),
    ] {
        let stage = stage(identity, &table).await;
        let pipeline = stage.start();
        let rows = match table.contains("exclude") {
            true => ROWS.replace(", v)", ")"),
            false => ROWS.to_owned(),
        };
        for sql in [
            "SELECT 1",
            "INSERT INTO t VALUES (11, 'open', 'new'), (12, 'draft', 'new')",
            // Into it, out of it, within it, outside of it.
            "UPDATE t SET status = 'open' WHERE id = 1",
            "UPDATE t SET status = 'draft' WHERE id = 2",
            "UPDATE t SET v = 'within', status = 'sent' WHERE id = 4",
            "UPDATE t SET v = 'outside' WHERE id = 3",
            "UPDATE t SET id = 40 WHERE id = 6",
            "UPDATE t SET id = 41, status = 'draft' WHERE id = 8",
            "UPDATE t SET id = 42, status = 'open' WHERE id = 5",
            "DELETE FROM t WHERE id IN (7, 10)",
            "BEGIN; UPDATE t SET status = 'draft'; UPDATE t SET status = 'open' WHERE id > 10; COMMIT",
            "UPDATE t SET status = 'open', v = 'all'",
            "TRUNCATE t; INSERT INTO t VALUES (1, 'draft', 'a'), (2, 'open', 'a')",
        ] {
            stage.sql(sql).await;
            let expected = stage
                .source_text(&format!("{rows} WHERE status <> 'draft'"))
                .await;
            stage.target_shows(&pipeline, &rows, &expected).await;
        }
    }
}

#[tokio::test]
async fn a_partitioned_table_is_filtered_as_a_whole() {
    let schema = "CREATE TABLE t (id int, status text NOT NULL, v text, PRIMARY KEY (id, status)) PARTITION BY RANGE (id);
        CREATE TABLE t_low PARTITION OF t FOR VALUES FROM (0) TO (100);
        CREATE TABLE t_high (v text, status text NOT NULL, id int NOT NULL);
        ALTER TABLE t ATTACH PARTITION t_high FOR VALUES FROM (100) TO (200);
        INSERT INTO t VALUES (1, 'open', 'a'), (2, 'draft', 'b'), (101, 'open', 'c'), (102, 'draft', 'd')";
    let stage = Stage::set(Setting {
        schema,
        tables: &[("public.t", OPEN)],
        ..Setting::default()
    })
    .await;
    let pipeline = stage.start();
    for sql in [
        "SELECT 1",
        "UPDATE t SET status = 'open' WHERE id IN (2, 102)",
        "UPDATE t SET status = 'draft' WHERE id IN (1, 101)",
        "UPDATE t SET id = id + 150 WHERE id = 2",
    ] {
        stage.sql(sql).await;
        part(&stage, &pipeline).await;
    }
}

#[tokio::test]
async fn a_filter_outside_the_replica_identity_leaves_the_applications_updates_alone() {
    // Nothing is there yet.
    let first = stage("", OPEN).await;
    let run = first.start();
    let texts = [
        "E1131",
        "its `where` reads (\"status\"), which is not in the replica identity of public.t",
        "ALTER TABLE public.t REPLICA IDENTITY FULL",
    ];
    first.ends(run, 4, &texts).await;
    assert_eq!(first.source_text(CLAUSES).await, "none");
    first
        .sql("UPDATE t SET status = 'open'; DELETE FROM t WHERE id = 1")
        .await;

    // The table is published already, without a filter: it stays so.
    let second = stage("", "").await;
    second.once().await;
    second.rewrite("", OPEN);
    let run = second.start();
    second.ends(run, 4, &texts[..1]).await;
    assert_eq!(second.source_text(CLAUSES).await, "t id,status,v");
    second
        .sql("UPDATE t SET status = 'open'; DELETE FROM t WHERE id = 1")
        .await;
    second.rewrite("", "");
    second.once().await;
    // With the remedy it goes on.
    second.sql(FULL).await;
    second.rewrite("", OPEN);
    let mut pipeline = second.start();
    let warning = pipeline
        .wait_for_log("E1134", PATIENCE)
        .await
        .expect("a warning");
    assert!(warning.contains("another `where`"), "{warning}");
    second
        .sql("UPDATE t SET status = 'draft' WHERE id = 2")
        .await;
    second
        .target_shows(&pipeline, "SELECT count(*)::text FROM t WHERE id = 2", "0")
        .await;
    assert_eq!(
        second.source_text(CLAUSES).await,
        "t id,status,v (status <> 'draft'::text)"
    );
}

#[tokio::test]
async fn an_expression_that_postgres_does_not_take_is_told_in_its_words() {
    for (filter, said) in [
        ("statsu = 'x'", "column \"statsu\" does not exist"),
        ("status = = 'x'", "syntax error"),
        ("true) , TABLE other WHERE (true", "syntax error"),
        ("id = $1", "parameter"),
        ("v", "must be type boolean"),
        ("id IN (SELECT 1)", "subquery"),
        ("mine(id)", "User-defined"),
        ("random() < id", "not valid"),
    ] {
        let table = format!("\nwhere = {}", serde_json::Value::from(filter));
        let schema = format!(
            "{FULL}; CREATE FUNCTION public.mine(int) RETURNS boolean IMMUTABLE LANGUAGE sql AS 'SELECT true'"
        );
        let stage = stage(&schema, &table.replace("mine", "public.mine")).await;
        let run = stage.start();
        let logs = stage
            .ends(run, 4, &["E1132", "tables/public.t.toml:2:9", said])
            .await;
        assert_eq!(stage.source_text(CLAUSES).await, "none", "{logs}");
        stage.sql("UPDATE t SET v = 'x'; DELETE FROM t").await;
    }
}

#[tokio::test]
async fn what_may_not_be_changed_is_only_compared() {
    let never = "heartbeat_interval = \"500ms\"\ncreate = \"never\"";
    let table = "where = \"status <> 'draft'\"\ncolumns.exclude = [\"v\"]";
    let stage = Stage::set(Setting {
        schema: &format!("{TABLE} {INDEX}"),
        source: never,
        tables: &[("public.t", table)],
        ..Setting::default()
    })
    .await;
    let publication = "CREATE PUBLICATION \"millrace_shop\" FOR TABLE ONLY \"public\".\"t\" (\"id\", \"status\") \
                       WHERE ((status <> 'draft'::text)) WITH (publish_via_partition_root = true)";
    let run = stage.start();
    stage.ends(run, 4, &["E1105", publication]).await;
    // Another one is not taken, and not changed.
    stage
        .sql("CREATE PUBLICATION millrace_shop FOR TABLE t (id, status) WHERE (status = 'open')")
        .await;
    let run = stage.start();
    let change = "BEGIN; ALTER PUBLICATION \"millrace_shop\" DROP TABLE ONLY \"public\".\"t\"; \
                  ALTER PUBLICATION \"millrace_shop\" ADD TABLE ONLY \"public\".\"t\" \
                  (\"id\", \"status\") WHERE ((status <> 'draft'::text)); COMMIT";
    stage.ends(run, 4, &["E1106", change]).await;
    assert_eq!(
        stage.source_text(CLAUSES).await,
        "t id,status (status = 'open'::text)"
    );
    // The same condition in other words is the same.
    stage
        .sql(
            "DROP PUBLICATION millrace_shop;
             CREATE PUBLICATION millrace_shop FOR TABLE t (status, id) WHERE ((t.status) != 'draft')",
        )
        .await;
    stage
        .sql("SELECT pg_create_logical_replication_slot('millrace_shop', 'pgoutput')")
        .await;
    let pipeline = stage.start();
    let rows = ROWS.replace(", v)", ")");
    let expected = stage
        .source_text(&format!("{rows} WHERE status <> 'draft'"))
        .await;
    stage.target_shows(&pipeline, &rows, &expected).await;
    // What our configuration asks for from now on is said, and not done.
    Stage::stopped(pipeline).await;
    stage.rewrite(
        never,
        "where = \"status <> 'sent'\"\ncolumns.exclude = [\"v\"]",
    );
    let run = stage.start();
    stage
        .ends(run, 4, &["E1106", "WHERE ((status <> 'sent'::text))"])
        .await;
}

#[tokio::test]
async fn an_older_server_is_told_so() {
    let stage = Stage::set(Setting {
        schema: &format!("{TABLE} {FULL}"),
        tables: &[("public.t", OPEN)],
        postgres: PostgresOptions {
            major: Some(14),
            ..PostgresOptions::default()
        },
        ..Setting::default()
    })
    .await;
    let run = stage.start();
    stage
        .ends(run, 4, &["E1133", "Postgres 14", "remove `where`"])
        .await;
}

#[tokio::test]
async fn what_init_sql_prints_is_enough_for_a_selection() {
    let table = "where = \"status <> 'draft'\"\ncolumns = { exclude = [\"v\"] }";
    let stage = stage(INDEX, table).await;
    stage
        .sql("REVOKE TEMPORARY ON DATABASE source FROM PUBLIC")
        .await;
    let mut printed = stage.start_with(&["init-sql", "source"]);
    assert_eq!(printed.wait(PATIENCE).await.expect("ends"), 0);
    stage.sql(&printed.stdout()).await;
    stage
        .sql("ALTER ROLE millrace_capture PASSWORD 'capture'")
        .await;
    let clauses = "t id,status (status <> 'draft'::text)";
    assert_eq!(stage.source_text(CLAUSES).await, clauses);
    let url = stage.postgres.url("source");
    let (_, address) = url.split_once('@').expect("a user");
    let nats = stage.nats.url();
    ConfigDir::new(
        "shop",
        &format!("postgres://millrace_capture:capture@{address}"),
        &nats,
    )
    .stream("confirm = \"acked\"")
    .sink("replica", &stage.target_url())
    .table("public.t", table)
    .write_to(stage.folder.path())
    .expect("written");
    let pipeline = stage.start();
    let rows = ROWS.replace(", v)", ")");
    stage
        .sql(
            "UPDATE t SET status = 'draft' WHERE id = 2; UPDATE t SET status = 'open' WHERE id = 1",
        )
        .await;
    let expected = stage
        .source_text(&format!("{rows} WHERE status <> 'draft'"))
        .await;
    stage.target_shows(&pipeline, &rows, &expected).await;
    assert_eq!(stage.source_text(CLAUSES).await, clauses);
}
