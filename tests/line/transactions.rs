//! What a transaction did arrives as a whole; what it took back never does.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::stage::{PATIENCE, Setting, Stage};

#[tokio::test]
async fn what_was_rolled_back_never_arrives() {
    let stage = Stage::set(Setting::default()).await;
    stage.target_sql("CREATE TABLE seen (id int, v text)").await;
    stage.once().await;
    let pipeline = stage.start();
    // Whatever is ever written to the replica leaves a trace.
    stage
        .target_sql(
            "CREATE FUNCTION remember() RETURNS trigger LANGUAGE plpgsql AS
                 'BEGIN INSERT INTO public.seen VALUES (new.id, new.v); RETURN new; END';
             CREATE TRIGGER remember BEFORE INSERT OR UPDATE ON t
                 FOR EACH ROW EXECUTE FUNCTION remember()",
        )
        .await;
    for sql in [
        "BEGIN; INSERT INTO t VALUES (1, 'never'); UPDATE t SET v = 'never'; ROLLBACK",
        "BEGIN; INSERT INTO t VALUES (1, 'a'); SAVEPOINT s; UPDATE t SET v = 'never';
         INSERT INTO t VALUES (2, 'never'); ROLLBACK TO s; INSERT INTO t VALUES (3, 'c'); COMMIT",
        "BEGIN; SAVEPOINT a; INSERT INTO t VALUES (4, 'd'); SAVEPOINT b; DELETE FROM t;
         SAVEPOINT c; INSERT INTO t VALUES (5, 'never'); ROLLBACK TO b;
         UPDATE t SET v = v || '!' WHERE id = 4; RELEASE a; COMMIT",
        "BEGIN; TRUNCATE t; INSERT INTO t VALUES (1, 'never'); ROLLBACK",
        "BEGIN; SAVEPOINT s; TRUNCATE t; ROLLBACK TO s; UPDATE t SET v = 'kept' WHERE id = 1; COMMIT",
    ] {
        stage.sql(sql).await;
    }
    assert_eq!(stage.equal(&pipeline).await.rows, 3);
    // The replica's position says that all of it was seen.
    stage.sql("INSERT INTO t VALUES (6, 'the end')").await;
    assert_eq!(stage.equal(&pipeline).await.rows, 4);
    let wrong =
        "SELECT string_agg(seen::text, ' ') FROM seen WHERE v LIKE 'never%' OR id IN (2, 5)";
    assert_eq!(stage.target_text(wrong).await, "");
}

#[tokio::test]
async fn a_prepared_transaction_arrives_once_it_commits() {
    let mut setting = Setting::default();
    setting
        .postgres
        .settings
        .push(("max_prepared_transactions".into(), "5".into()));
    let stage = Stage::set(setting).await;
    stage.once().await;
    let pipeline = stage.start();
    stage
        .sql("BEGIN; INSERT INTO t VALUES (1, 'kept'); PREPARE TRANSACTION 'kept'")
        .await;
    stage
        .sql("BEGIN; INSERT INTO t VALUES (2, 'not'); PREPARE TRANSACTION 'not'")
        .await;
    stage.sql("INSERT INTO t VALUES (3, 'meanwhile')").await;
    assert_eq!(stage.equal(&pipeline).await.rows, 1);
    stage.sql("COMMIT PREPARED 'kept'").await;
    stage.sql("ROLLBACK PREPARED 'not'").await;
    assert_eq!(stage.equal(&pipeline).await.rows, 2);
}

#[tokio::test]
async fn a_reader_never_sees_half_of_a_transfer_between_two_tables() {
    let stage = Stage::set(Setting {
        schema: "CREATE TABLE a (id int PRIMARY KEY, balance int NOT NULL);
                 CREATE TABLE b (id int PRIMARY KEY, balance int NOT NULL)",
        tables: &[("public.a", ""), ("public.b", "")],
        ..Setting::default()
    })
    .await;
    stage
        .sql(
            "INSERT INTO a SELECT i, 100 FROM generate_series(1, 20) i;
             INSERT INTO b SELECT i, 100 FROM generate_series(1, 20) i",
        )
        .await;
    let mut pipeline = stage.start();
    // Until then a table may be behind the others.
    for table in ["a", "b"] {
        let whole =
            format!("table is up to date\",\"sink\":\"replica\",\"table\":\"public.{table}\"");
        let told = pipeline.wait_for_log(&whole, PATIENCE).await;
        told.expect("told");
    }

    let reader = stage.postgres.connect("target").await.expect("connects");
    let done = Arc::new(AtomicBool::new(false));
    let stop = Arc::clone(&done);
    let reading = tokio::spawn(async move {
        let mut states = std::collections::HashSet::new();
        while !stop.load(Ordering::Relaxed) {
            let row = reader
                .query_one(
                    "SELECT (SELECT sum(balance) FROM a), (SELECT sum(balance) FROM b)",
                    &[],
                )
                .await
                .expect("reads");
            let (a, b): (i64, i64) = (row.get(0), row.get(1));
            assert_eq!(a + b, 4000, "half a transfer");
            states.insert(a);
        }
        states.len()
    });
    let mut rng = StdRng::seed_from_u64(7);
    for _ in 0..500 {
        let (from, to, amount) = (
            rng.random_range(1..=20),
            rng.random_range(1..=20),
            rng.random_range(-9..10),
        );
        stage
            .sql(&format!(
                "BEGIN; UPDATE a SET balance = balance - {amount} WHERE id = {from};
                 UPDATE b SET balance = balance + {amount} WHERE id = {to}; COMMIT"
            ))
            .await;
    }
    stage.equal(&pipeline).await;
    done.store(true, Ordering::Relaxed);
    let states = reading.await;
    assert!(states.is_ok_and(|states| states > 3), "{}", pipeline.logs());
}

#[tokio::test]
async fn a_table_that_first_appears_inside_a_large_transaction_does_not_end_it() {
    let stage = Stage::set(Setting {
        schema: "CREATE TABLE t (id int PRIMARY KEY, v text);
            CREATE TABLE u (id int PRIMARY KEY, v text)",
        tables: &[("public.t", ""), ("public.u", "")],
        sink: "batch = { max_rows = 10 }",
        ..Setting::default()
    })
    .await;
    let mut pipeline = stage.start();
    stage
        .sql("INSERT INTO t VALUES (0, 'x'); INSERT INTO u VALUES (0, 'x')")
        .await;
    stage.equal(&pipeline).await;
    // A new process has not laid out any table yet when the transaction comes.
    pipeline.kill9();
    stage
        .sql(
            "BEGIN; INSERT INTO t SELECT i, 'a' FROM generate_series(1, 500) i; \
             INSERT INTO u SELECT i, 'b' FROM generate_series(1, 500) i; COMMIT",
        )
        .await;
    let mut once = stage.start_with(&["run", "--once"]);
    let code = once.wait(crate::stage::PATIENCE).await.expect("ends");
    assert_eq!(code, 0, "{}", once.logs());
    assert_eq!(stage.equal(&once).await.rows, 1002);
}
