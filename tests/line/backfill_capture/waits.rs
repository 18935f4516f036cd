//! What a backfill waits for: commits that are not visible yet, open transactions, locks.

use std::time::Instant;

use millrace_event::Lsn;
use millrace_event::work::{CopyStatus, Wanted};

use super::stand::{Line, Message, chunks, filled, ids, parts, rows, slowly, until, version_of};
use crate::stage::{PATIENCE, Setting, Stage};

/// Waits until the server has taken the setting over: its checkpointer reads it, whenever it gets to it.
async fn until_commits_wait(stage: &Stage) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let client = stage.postgres.connect("source").await.expect("connects");
        let probe = tokio::spawn(async move {
            let probe = "SELECT pg_logical_emit_message(true, 'probe', '')";
            client.batch_execute(probe).await.expect("commits");
        });
        while !probe.is_finished() {
            // A commit that waits no more is a commit all the same.
            let cancel = "SELECT count(pg_cancel_backend(pid))::text FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
            if stage.source_text(cancel).await != "0" {
                return probe.await.expect("commits");
            }
        }
        assert!(Instant::now() < deadline, "no commit waits for a standby");
    }
}

/// A transaction whose commit waits for a standby that is not there.
pub(crate) async fn in_limbo(stage: &Stage, sql: &'static str) -> tokio::task::JoinHandle<()> {
    stage
        .postgres
        .set("synchronous_standby_names", "nobody")
        .await
        .expect("set");
    let client = stage.postgres.connect("source").await.expect("connects");
    until_commits_wait(stage).await;
    let task = tokio::spawn(async move {
        client.batch_execute(sql).await.expect("commits at last");
    });
    until(
        stage,
        "SELECT count(*) = 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'",
    )
    .await;
    task
}

pub(crate) async fn release(stage: &Stage) {
    stage
        .postgres
        .set("synchronous_standby_names", "")
        .await
        .expect("set");
}

/// Waits until the status of the request says what holds it up, and logs too.
async fn names(line: &Line, code: &str, what: &str) {
    let named = |status: &CopyStatus| {
        let mut told = status.troubles.iter();
        told.any(|(_, text)| text.contains(code) && text.contains(what))
    };
    line.told("r1", named).await;
    Stage::logs(&line.capture, code).await;
}

/// The commit becomes visible; the chunks then come by themselves, with what it did to row 7.
async fn comes_late(line: &Line, held: tokio::task::JoinHandle<()>) {
    release(&line.stage).await;
    held.await.expect("commits");
    let status = line.copied("r1", 1).await;
    assert!(status.troubles.is_empty(), "{status:?}");
    let messages = line.copy_stream().await;
    let late = rows(&messages, "t");
    let late = late.iter().find(|row| row["after"]["id"] == 7);
    assert_eq!(late.expect("the row")["after"]["v"], "late");
}

/// Rewrites `t` in a transaction that ends once the next chunk waits for its lock; returns what came before that.
async fn rewritten_meanwhile(line: &Line) -> Vec<i64> {
    let other = line.stage.postgres.connect("source").await;
    let other = other.expect("connects");
    let rewrite = "BEGIN; ALTER TABLE t ALTER COLUMN v TYPE text USING v || '!'";
    other.batch_execute(rewrite).await.expect("rewrites");
    until(
        &line.stage,
        "SELECT count(*) = 1 FROM pg_locks WHERE NOT granted AND mode = 'AccessShareLock'",
    )
    .await;
    let before = ids(&line.copy_stream().await);
    other.batch_execute("COMMIT").await.expect("commits");
    before
}

/// How many rows came as the rewrite left them.
fn rewritten(messages: &[Message]) -> usize {
    let rows = rows(messages, "t");
    let rewritten = rows
        .iter()
        .filter(|row| row["after"]["v"].as_str().is_some_and(|v| v.ends_with('!')));
    rewritten.count()
}

#[tokio::test]
async fn a_commit_that_is_not_visible_yet_wins_over_the_chunk_that_lacks_it() {
    let line = filled(3_000).await;
    line.ask("r1", &[("t", slowly(Some(1_000)))]).await;
    line.parts(1).await;
    let held = in_limbo(
        &line.stage,
        "UPDATE t SET v = 'late' WHERE id > 2900; DELETE FROM t WHERE id = 2800",
    )
    .await;
    line.copied("r1", 1).await;
    let messages = line.copy_stream().await;
    let old = rows(&messages, "t");
    assert!(old.iter().all(|row| row["after"]["v"] != "late"));
    // The stream told of it before: the chunks since then must not rise above it.
    let versions: Vec<Lsn> = old.iter().map(|row| version_of(row)).collect();
    assert_eq!(versions.iter().max(), versions.last());
    release(&line.stage).await;
    held.await.expect("commits");
    let replica = line.replica().await;
    assert_eq!(replica.values().filter(|v| *v == "late").count(), 100);
    assert_eq!(replica, line.source().await);
}

#[tokio::test]
async fn nothing_is_read_while_a_commit_from_before_is_not_visible_even_by_a_new_capture() {
    let mut line = filled(100).await;
    let held = in_limbo(&line.stage, "UPDATE t SET v = 'late' WHERE id = 7").await;
    line.capture.kill9();
    let line = Line::on(line.stage).await;
    line.ask("r1", &[("t", chunks())]).await;
    names(&line, "E1122", "SyncRep").await;
    assert!(ids(&line.copy_stream().await).is_empty());
    comes_late(&line, held).await;
}

/// Holds the transaction that begins a backfill between its id and its commit, for as long as somebody has the lock.
/// What is built in cannot be replaced, only renamed.
const HOLDS_THE_BEGIN: &str = "SET allow_system_table_mods = on;
    UPDATE pg_catalog.pg_proc SET proname = 'emits_at_once'
        WHERE proname = 'pg_logical_emit_message' AND proargtypes[2] = 'text'::regtype;
    CREATE FUNCTION pg_catalog.pg_logical_emit_message(boolean, text, text) RETURNS pg_lsn LANGUAGE plpgsql AS $$
    BEGIN
        IF current_setting('application_name') = 'millrace copy' THEN PERFORM pg_advisory_xact_lock(1123); END IF;
        RETURN pg_logical_emit_message($1, $2, convert_to($3, 'UTF8'));
    END $$";

/// A chunk without such a commit would have a version from before the request, and repair nothing.
#[tokio::test]
async fn a_commit_of_the_moment_before_the_request_is_waited_for_and_named() {
    let line = filled(100).await;
    line.stage.sql(HOLDS_THE_BEGIN).await;
    line.stage.sql("SELECT pg_advisory_lock(1123)").await;
    line.ask("r1", &[("t", chunks())]).await;
    until(
        &line.stage,
        "SELECT count(*) = 1 FROM pg_locks WHERE NOT granted AND locktype = 'advisory'",
    )
    .await;
    let held = in_limbo(&line.stage, "UPDATE t SET v = 'late' WHERE id = 7").await;
    line.stage.sql("SELECT pg_advisory_unlock(1123)").await;
    names(&line, "E1123", "SyncRep").await;
    assert!(ids(&line.copy_stream().await).is_empty());
    comes_late(&line, held).await;
}

#[tokio::test]
async fn an_open_transaction_is_waited_for_and_named() {
    let line = filled(100).await;
    let other = line
        .stage
        .postgres
        .connect("source")
        .await
        .expect("connects");
    let begin = "SET application_name = 'the import'; BEGIN; UPDATE t SET v = 'open' WHERE id = 1";
    other.batch_execute(begin).await.expect("begins");
    line.ask("r1", &[("t", chunks())]).await;
    names(&line, "E1122", "the import").await;
    assert!(ids(&line.copy_stream().await).is_empty());
    other.batch_execute("COMMIT").await.expect("commits");
    line.copied("r1", 1).await;
    assert_eq!(line.replica().await, line.source().await);
}

/// Keys that heal rows may replace a request every second; there is always a transaction open somewhere.
#[tokio::test]
async fn a_request_that_replaces_another_does_not_wait_for_what_was_opened_since() {
    let line = filled(2_000).await;
    line.ask("r1", &[("t", slowly(Some(500)))]).await;
    let began = |messages: &[Message]| parts(messages).last().map(|part| part.lsn);
    let first = began(&line.parts(1).await);
    let other = line.stage.postgres.connect("source").await;
    let other = other.expect("connects");
    let begin = "BEGIN; UPDATE t SET v = 'open' WHERE id = 2000";
    other.batch_execute(begin).await.expect("begins");
    let keys = Wanted::Keys {
        keys: vec![vec!["7".to_owned()]],
    };
    // One while chunks are read, one while nothing is.
    for (id, wanted) in [("r2", chunks()), ("r3", keys)] {
        line.ask(id, &[("t", wanted)]).await;
        line.copied(id, 1).await;
        assert!(began(&line.copy_stream().await) > first);
    }
    other.batch_execute("COMMIT").await.expect("commits");
    assert_eq!(line.replica().await, line.source().await);
}

#[tokio::test]
async fn a_table_that_is_rewritten_before_the_lock_is_granted_is_read_as_it_is_then() {
    let line = filled(1_000).await;
    // The barrier must not wait for the ALTER: it begins between two chunks.
    line.ask("r1", &[("t", slowly(Some(1_000)))]).await;
    line.parts(1).await;
    let before = rewritten_meanwhile(&line).await;
    line.copied("r1", 1).await;
    let messages = line.copy_stream().await;
    assert_eq!(ids(&messages), (1..=1_000).collect::<Vec<i64>>());
    assert_eq!(rewritten(&messages), 1_000 - before.len());
    assert!(
        line.capture.logs().contains("its chunk is read again"),
        "{}",
        line.capture.logs()
    );
}

#[tokio::test]
async fn a_first_chunk_that_waited_for_a_rewrite_has_its_rows() {
    let line = Line::start(Setting::two_tables()).await;
    line.stage
        .sql(
            "INSERT INTO t SELECT i, 'row ' || i FROM generate_series(1, 100) i;
             INSERT INTO u SELECT i, 'row ' || i FROM generate_series(1, 1500) i",
        )
        .await;
    line.ask("r1", &[("u", slowly(Some(1_000))), ("t", chunks())])
        .await;
    // The barrier must not wait for it.
    line.parts(1).await;
    rewritten_meanwhile(&line).await;
    line.copied("r1", 2).await;
    // Under a snapshot from before the rewrite the table has no rows.
    assert_eq!(rewritten(&line.copy_stream().await), 100);
}
