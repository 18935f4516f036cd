//! Rows keep their content when their key changes, whatever else their transaction does.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::stage::{Setting, Stage};

/// A table whose rows have a value that is stored out of line, so that updates leave it out of the WAL.
const TOASTED: &str = "CREATE TABLE t (id int PRIMARY KEY, n int NOT NULL DEFAULT 0, big text);
    ALTER TABLE t ALTER COLUMN big SET STORAGE EXTERNAL";

async fn toasted() -> Stage {
    let stage = Stage::set(Setting {
        schema: TOASTED,
        ..Setting::default()
    })
    .await;
    stage
        .sql("INSERT INTO t SELECT i, 0, repeat(md5(i::text), 200) FROM generate_series(1, 40) i")
        .await;
    stage
}

#[tokio::test]
async fn a_changed_key_moves_the_row() {
    let stage = Stage::set(Setting::default()).await;
    stage
        .sql("INSERT INTO t SELECT i, 'row ' || i FROM generate_series(1, 20) i")
        .await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    stage.sql("UPDATE t SET id = 101 WHERE id = 1").await;
    stage.sql("UPDATE t SET id = 101 + id WHERE id = 2").await;
    stage
        .sql("UPDATE t SET id = id + 1000, v = 'with its value' WHERE id BETWEEN 3 AND 10")
        .await;
    assert_eq!(stage.equal(&pipeline).await.rows, 20);
    stage
        .sql("UPDATE t SET id = -id WHERE id > 0; INSERT INTO t VALUES (1, 'takes an old key')")
        .await;
    assert_eq!(stage.equal(&pipeline).await.rows, 21);
}

#[tokio::test]
async fn a_moved_row_keeps_its_untouched_large_value() {
    let stage = toasted().await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    for sql in [
        // Alone.
        "UPDATE t SET id = 101 WHERE id = 1",
        // After an update, before one, between two.
        "BEGIN; UPDATE t SET n = 1 WHERE id = 2; UPDATE t SET id = 102 WHERE id = 2; COMMIT",
        "BEGIN; UPDATE t SET id = 103 WHERE id = 3; UPDATE t SET n = 2 WHERE id = 103; COMMIT",
        "BEGIN; UPDATE t SET n = 1 WHERE id = 4; UPDATE t SET id = 104 WHERE id = 4;
         UPDATE t SET n = n + 1 WHERE id = 104; COMMIT",
        // The large value changes before the move, with it, after it.
        "BEGIN; UPDATE t SET big = repeat('new', 3000) WHERE id = 5;
         UPDATE t SET id = 105 WHERE id = 5; COMMIT",
        "UPDATE t SET id = 106, big = repeat('with', 3000) WHERE id = 6",
        "BEGIN; UPDATE t SET id = 107 WHERE id = 7;
         UPDATE t SET big = repeat('after', 3000) WHERE id = 107; COMMIT",
        // The old key is taken again, the new key was free only a moment ago.
        "BEGIN; UPDATE t SET id = 108 WHERE id = 8; INSERT INTO t VALUES (8, 8, 'small'); COMMIT",
        "BEGIN; DELETE FROM t WHERE id = 9; UPDATE t SET id = 9 WHERE id = 10; COMMIT",
        // Moved, then deleted; inserted, then moved.
        "BEGIN; UPDATE t SET id = 111 WHERE id = 11; DELETE FROM t WHERE id = 111; COMMIT",
        "BEGIN; INSERT INTO t VALUES (50, 0, repeat('fresh', 3000));
         UPDATE t SET id = 150 WHERE id = 50; COMMIT",
        // Many rows, between other rows' changes.
        "BEGIN; UPDATE t SET n = 5; UPDATE t SET id = id + 1000 WHERE id BETWEEN 12 AND 20;
         UPDATE t SET n = 6 WHERE id > 30; COMMIT",
    ] {
        stage.sql(sql).await;
        stage.equal(&pipeline).await;
    }
    stage
        .target_shows(
            &pipeline,
            "SELECT count(*)::text FROM millrace.dead_letter",
            "0",
        )
        .await;
}

#[tokio::test]
async fn moves_that_wait_in_the_stream_are_applied_in_one_batch() {
    let stage = toasted().await;
    stage.once().await;
    for sql in [
        "UPDATE t SET id = 101 WHERE id = 1",
        "UPDATE t SET n = 7 WHERE id = 101",
        "UPDATE t SET id = 201 WHERE id = 101",
        "UPDATE t SET id = 1 WHERE id = 201",
        "UPDATE t SET id = id + 500 WHERE id BETWEEN 10 AND 19",
        "UPDATE t SET n = n + 1",
        "UPDATE t SET id = id - 500 WHERE id > 500",
        "DELETE FROM t WHERE id = 10",
        "UPDATE t SET id = 10 WHERE id = 11",
    ] {
        stage.sql(sql).await;
    }
    stage.once().await;
    // Nothing is left to do.
    stage.once().await;
}

#[tokio::test]
async fn two_rows_swap_their_keys_in_one_transaction() {
    let stage = toasted().await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    let swap = |a: i32, b: i32| {
        format!(
            "BEGIN; UPDATE t SET id = -1 WHERE id = {a}; UPDATE t SET id = {a} WHERE id = {b};
             UPDATE t SET id = {b} WHERE id = -1; COMMIT"
        )
    };
    stage.sql(&swap(1, 2)).await;
    stage.equal(&pipeline).await;
    // Small rows, whose values all travel.
    stage.sql("UPDATE t SET big = 'small ' || id").await;
    stage.sql(&swap(3, 4)).await;
    stage.equal(&pipeline).await;
    stage.sql(&swap(3, 4)).await;
    stage.sql(&swap(4, 5)).await;
    assert_eq!(stage.equal(&pipeline).await.rows, 40);
}

#[tokio::test]
async fn a_chain_of_key_changes_ends_at_its_last_key() {
    let stage = toasted().await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    stage
        .sql(
            "BEGIN; UPDATE t SET id = 101 WHERE id = 1; UPDATE t SET id = 201 WHERE id = 101;
             UPDATE t SET id = 301 WHERE id = 201; COMMIT",
        )
        .await;
    stage.equal(&pipeline).await;
    stage
        .sql(
            "BEGIN; UPDATE t SET id = 102 WHERE id = 2; UPDATE t SET n = 9 WHERE id = 102;
             UPDATE t SET id = 2 WHERE id = 102; COMMIT",
        )
        .await;
    stage.equal(&pipeline).await;
    // A whole row of rows moves up by one, from the end.
    stage
        .sql(
            "DO $$ BEGIN FOR i IN REVERSE 40..3 LOOP
             UPDATE t SET id = i + 1 WHERE id = i; END LOOP; END $$",
        )
        .await;
    assert_eq!(stage.equal(&pipeline).await.rows, 40);
}

#[tokio::test]
async fn composite_and_text_keys_change() {
    let schema = "CREATE TABLE lines (place text, order_id bigint, line int, v text, big text,
            PRIMARY KEY (order_id, line));
        ALTER TABLE lines ALTER COLUMN big SET STORAGE EXTERNAL;
        CREATE TABLE words (word text PRIMARY KEY, v text);
        CREATE TABLE amounts (amount numeric, at timestamptz, v int, PRIMARY KEY (amount, at))";
    let stage = Stage::set(Setting {
        schema,
        tables: &[
            ("public.lines", ""),
            ("public.words", ""),
            ("public.amounts", ""),
        ],
        ..Setting::default()
    })
    .await;
    stage
        .sql(
            "INSERT INTO lines SELECT 'p', o, l, 'v', repeat(md5(o::text || l), 200)
                 FROM generate_series(1, 5) o, generate_series(1, 4) l;
             INSERT INTO words VALUES ('plain', 'a'), ('', 'empty'), ('O''Brien \"x\"', 'quotes'),
                 (E'tab\\tand\\nnewline\\\\', 'escapes'), ('NULL', 'no null'), ('straße', 'unicode'),
                 ('{a,b}', 'braces'), ('Plain', 'case'), (' plain ', 'spaces'), (E'\\001', 'control');
             INSERT INTO amounts VALUES (1.0, '2024-01-01', 1), ('NaN', 'infinity', 2)",
        )
        .await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    for sql in [
        "UPDATE lines SET line = line + 10 WHERE order_id = 1",
        "UPDATE lines SET order_id = order_id + 100, v = 'moved' WHERE order_id = 2",
        "BEGIN; UPDATE lines SET v = 'x' WHERE order_id = 3; UPDATE lines SET line = -line
         WHERE order_id = 3; DELETE FROM lines WHERE order_id = 3 AND line = -1; COMMIT",
        "UPDATE words SET word = word || E'\\\\' || word",
        "UPDATE words SET word = reverse(word), v = v || '!'",
        "DELETE FROM words WHERE v LIKE 'quotes%' OR v LIKE 'empty%'",
        // One value in another spelling: the same key to an index, another text.
        "UPDATE amounts SET amount = 1.000 WHERE v = 1",
        "UPDATE amounts SET v = 3 WHERE v = 1",
        "BEGIN; UPDATE amounts SET amount = 1.0 WHERE v = 3; UPDATE amounts SET amount = 1.00
         WHERE v = 3; COMMIT",
        "UPDATE amounts SET amount = 'Infinity', at = '-infinity' WHERE v = 2",
        "DELETE FROM amounts WHERE amount = 1",
    ] {
        stage.sql(sql).await;
        stage.equal(&pipeline).await;
    }
}

/// Keys collide often: there are eight of them.
fn random_statement(rng: &mut StdRng) -> String {
    let (a, b, n) = (
        rng.random_range(1..=8),
        rng.random_range(1..=8),
        rng.random_range(0..1000),
    );
    match rng.random_range(0..20) {
        0..4 => {
            format!("INSERT INTO t VALUES ({a}, {n}, repeat('{n} ', 2000)) ON CONFLICT DO NOTHING")
        }
        4..9 => format!("UPDATE t SET n = {n} WHERE id = {a}"),
        9 => format!("UPDATE t SET big = repeat('{n},', 2000) WHERE id = {a}"),
        10 => format!("UPDATE t SET big = CASE WHEN {n} % 2 = 0 THEN 'small' END WHERE id = {a}"),
        11..17 => format!(
            "UPDATE t SET id = {b}, n = {n} WHERE id = {a} AND NOT EXISTS
             (SELECT FROM t WHERE id = {b})"
        ),
        17..19 => format!("DELETE FROM t WHERE id = {a}"),
        _ if n % 4 == 0 => "TRUNCATE t".to_owned(),
        _ => format!("SAVEPOINT s; UPDATE t SET id = id + 100; ROLLBACK TO s; SELECT {n}"),
    }
}

#[tokio::test]
async fn any_mixture_of_moves_and_partial_updates_leaves_the_replica_equal() {
    let stage = Stage::set(Setting {
        schema: TOASTED,
        // Transactions are cut in the middle, too.
        sink: "batch = { max_rows = 3 }",
        ..Setting::default()
    })
    .await;
    let mut rng = StdRng::seed_from_u64(20_240_501);
    let mut pipeline = stage.start();
    // An empty source is equal to a target that has nothing yet.
    let letters = "SELECT count(*)::text FROM millrace.dead_letter";
    stage.target_shows(&pipeline, letters, "0").await;
    for round in 0..40 {
        // Now and then a backlog, so that much of it is folded into one batch.
        if round % 3 == 0 {
            pipeline.pause().expect("signal");
        }
        for _ in 0..rng.random_range(1..12) {
            let statements: Vec<_> = (0..rng.random_range(1..7))
                .map(|_| random_statement(&mut rng))
                .collect();
            stage
                .sql(&format!("BEGIN; {}; COMMIT", statements.join("; ")))
                .await;
        }
        pipeline.resume().expect("signal");
        stage.equal(&pipeline).await;
        let letters = stage
            .target_text("SELECT string_agg(d::text, ' ') FROM millrace.dead_letter d")
            .await;
        assert_eq!(letters, "", "round {round}");
        if round % 20 == 19 {
            pipeline.kill9();
            pipeline = stage.start();
        }
    }
}
