//! A selection, or a column that it names, that changes; and selections that cannot be.

use std::time::Duration;

use millrace_lab::PostgresOptions;

use super::{ADA, SOURCE, Wire};
use crate::stage::{PATIENCE, Setting, Stage};

const PLAIN: &str = "CREATE TABLE t (id int PRIMARY KEY, email text, card text, v int);
    INSERT INTO t VALUES (1, 'ada@example.org', 'cardsecret', 1)";
const LISTED: &str = "SELECT coalesce(string_agg(array_to_string(attnames, ' '), ';'), 'none') FROM pg_publication_tables";

async fn plain(columns: &str) -> Stage {
    Stage::set(Setting {
        schema: PLAIN,
        source: SOURCE,
        tables: &[("public.t", columns)],
        ..Setting::default()
    })
    .await
}

#[tokio::test]
async fn a_changed_selection_changes_the_publication_and_says_what_is_left_to_do() {
    let stage = plain("").await;
    stage.once().await;
    stage
        .sql("INSERT INTO t VALUES (2, 'ada@example.org', 'second', 2)")
        .await;
    stage.rewrite(
        SOURCE,
        "columns = { exclude = [\"card\"], mask = { email = \"hash\" } }",
    );
    let wire = Wire::tap(&stage).await;
    let mut pipeline = stage.start();
    let warning = pipeline
        .wait_for_log("E1134", PATIENCE)
        .await
        .expect("a warning");
    for text in [
        "its rows are read again",
        "column \\\"card\\\" is left out",
        "another mask of column \\\"email\\\"",
    ] {
        assert!(warning.contains(text), "{text:?} is not in {warning}");
    }
    stage
        .sql("INSERT INTO t VALUES (3, 'ada@example.org', 'third', 3)")
        .await;
    let sql = "SELECT string_agg(email, ' ' ORDER BY id) FROM t";
    // Also the rows of before: they are read again by themselves.
    let expected = format!("{ADA} {ADA} {ADA}");
    stage.target_shows(&pipeline, sql, &expected).await;
    assert_eq!(stage.source_text(LISTED).await, "id email v");
    Stage::stopped(pipeline).await;
    let heard = wire.heard().await;
    for secret in ["cardsecret", "second", "third", "ada@example.org"] {
        assert!(!heard.contains(secret), "{secret:?} was sent:\n{heard}");
    }

    // The same again is no change, and neither is a crash behind the change of the publication.
    let mut pipeline = stage.start();
    Stage::readyz(&mut pipeline, 200, "streaming").await;
    assert!(!pipeline.logs().contains("E1134"), "{}", pipeline.logs());
    Stage::stopped(pipeline).await;

    // Somebody else's change is noticed.
    stage
        .sql("ALTER PUBLICATION millrace_shop SET TABLE t (id, v)")
        .await;
    let run = stage.start();
    let logs = stage
        .ends(
            run,
            4,
            &["E1106", "publishes other columns or rows of public.t"],
        )
        .await;
    assert!(!logs.contains("changing the publication"), "{logs}");
    assert_eq!(stage.source_text(LISTED).await, "id v");
}

#[tokio::test]
async fn a_column_that_comes_later_is_listed_by_itself() {
    let stage = plain("columns.exclude = [\"card\"]").await;
    let mut pipeline = stage.start();
    Stage::readyz(&mut pipeline, 200, "streaming").await;
    stage.sql("ALTER TABLE t ADD COLUMN late text").await;
    let warning = pipeline
        .wait_for_log("E1134", PATIENCE)
        .await
        .expect("a warning");
    assert!(warning.contains("column \\\"late\\\" came in"), "{warning}");
    assert_eq!(stage.source_text(LISTED).await, "id email v late");
}

#[tokio::test]
async fn a_masked_column_that_is_renamed_stops_capture_before_a_value_gets_out() {
    for (columns, major) in [
        ("columns.mask = { email = \"hash\" }", None),
        ("columns.exclude = [\"email\"]", Some(14)),
    ] {
        let stage = Stage::set(Setting {
            schema: PLAIN,
            source: SOURCE,
            tables: &[("public.t", columns)],
            postgres: PostgresOptions {
                major,
                ..PostgresOptions::default()
            },
            ..Setting::default()
        })
        .await;
        let wire = Wire::tap(&stage).await;
        let mut pipeline = stage.start();
        stage
            .target_shows(&pipeline, "SELECT count(*)::text FROM t", "1")
            .await;
        stage.sql("UPDATE t SET v = 2").await;
        stage
            .target_shows(&pipeline, "SELECT v::text FROM t", "2")
            .await;
        stage
            .sql(
                "ALTER TABLE t RENAME COLUMN email TO mail;
                 INSERT INTO t (id, mail) VALUES (2, 'second@example.org')",
            )
            .await;
        let said = Stage::readyz(&mut pipeline, 503, "E1130").await;
        assert!(said.contains("was renamed to"), "{said}");
        // A start finds it too.
        drop(pipeline);
        let run = stage.start();
        stage
            .ends(run, 4, &["E1130", "was renamed to", "\"mail\" in place of"])
            .await;
        // The target's owner follows, where the column travels at all.
        if major.is_none() {
            let sql = "ALTER TABLE t RENAME COLUMN email TO mail";
            stage.target_sql(sql).await;
        }
        stage.rewrite(SOURCE, &columns.replace("email", "mail"));
        let pipeline = stage.start();
        stage
            .target_shows(&pipeline, "SELECT count(*)::text FROM t", "2")
            .await;
        Stage::stopped(pipeline).await;
        let heard = wire.heard().await;
        assert!(!heard.contains("example.org"), "{heard}");
    }
}

/// A commit is in the WAL before anybody else sees it; with synchronous replication that takes as long as it takes.
#[tokio::test]
async fn a_rename_that_is_in_the_wal_and_not_visible_yet_lets_nothing_out() {
    let setting = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let stage = Stage::set(Setting {
        schema: PLAIN,
        source: SOURCE,
        tables: &[("public.t", "columns.mask = { email = \"hash\" }")],
        postgres: PostgresOptions {
            settings: vec![
                setting("synchronous_standby_names", "nobody"),
                setting("synchronous_commit", "local"),
            ],
            ..PostgresOptions::default()
        },
        ..Setting::default()
    })
    .await;
    let wire = Wire::tap(&stage).await;
    let mut pipeline = stage.start();
    stage
        .target_shows(&pipeline, "SELECT count(*)::text FROM t", "1")
        .await;
    let writer = stage.postgres.connect("source").await.expect("connects");
    let written = tokio::spawn(async move {
        let sql = "SET synchronous_commit = on; ALTER TABLE t RENAME COLUMN email TO mail; \
                   INSERT INTO t (id, mail) VALUES (2, 'second@example.org')";
        writer.batch_execute(sql).await
    });
    let waits = "SELECT count(*)::text FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
    while stage.source_text(waits).await != "1" {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    let old = "SELECT string_agg(attname, ' ') FROM pg_attribute WHERE attrelid = 't'::regclass AND attnum = 2";
    assert_eq!(stage.source_text(old).await, "email");
    stage
        .sql("ALTER SYSTEM SET synchronous_standby_names = ''")
        .await;
    stage.sql("SELECT pg_reload_conf()").await;
    written.await.expect("ends").expect("committed");
    Stage::readyz(&mut pipeline, 503, "E1130").await;
    drop(pipeline);
    let heard = wire.heard().await;
    assert!(!heard.contains("example.org"), "{heard}");
}

#[tokio::test]
async fn what_would_break_the_application_is_refused_and_nothing_is_touched() {
    for (alter, columns, texts) in [
        (
            "ALTER TABLE t REPLICA IDENTITY FULL",
            "columns.exclude = [\"card\"]",
            [
                "E1131",
                "REPLICA IDENTITY FULL",
                "ALTER TABLE public.t REPLICA IDENTITY DEFAULT",
            ],
        ),
        (
            "ALTER TABLE t ALTER card SET NOT NULL; CREATE UNIQUE INDEX i ON t (id, card);
             ALTER TABLE t REPLICA IDENTITY USING INDEX i",
            "key = [\"id\"]\ncolumns.exclude = [\"card\"]",
            ["E1131", "is in the replica identity", "mask (\"card\")"],
        ),
        (
            "SELECT 1",
            "columns.exclude = [\"id\"]",
            [
                "E1130",
                "key column \"id\" cannot be excluded",
                "columns.exclude",
            ],
        ),
        (
            "SELECT 1",
            "columns.mask = { id = \"hash\" }",
            [
                "E1130",
                "key column \"id\" cannot be masked",
                "columns.mask",
            ],
        ),
        (
            "SELECT 1",
            "columns.exclude = [\"crad\"]",
            ["E1130", "no column \"crad\"", "tables/public.t.toml"],
        ),
        (
            "SELECT 1",
            "columns.mask = { v = \"truncate:1\" }",
            ["E1130", "is integer", "hash"],
        ),
        (
            "SELECT 1",
            "columns.rename = { email = \"v\" }",
            ["E1130", "two columns have the name \"v\"", "columns.rename"],
        ),
    ] {
        let stage = plain(columns).await;
        stage.sql(alter).await;
        let run = stage.start();
        stage.ends(run, 4, &texts).await;
        let publications = "SELECT count(*)::text FROM pg_publication";
        assert_eq!(stage.source_text(publications).await, "0");
        stage.sql("UPDATE t SET v = 2; DELETE FROM t").await;
    }
}

#[tokio::test]
async fn a_short_salt_is_refused() {
    let source = "mask_salt = \"too short\"";
    let stage = Stage::set(Setting {
        source,
        tables: &[("public.t", "columns.mask = { v = \"hash\" }")],
        ..Setting::default()
    })
    .await;
    let run = stage.start();
    let logs = stage.ends(run, 4, &["E1130", "fewer than 16 bytes"]).await;
    assert!(!logs.contains("too short"), "{logs}");
}
