//! What makes a backfill wrong on Postgres if its rule is simpler than it is: each case end to end, compared in full.

use std::time::{Duration, Instant};

use async_nats::jetstream;
use millrace_event::subject;
use millrace_lab::{Compared, Pipeline};
use rand::Rng as _;
use tokio::task::JoinHandle;

use crate::backfill::{self, becomes, corrupt, is, may_begin, rows, says};
use crate::backfill_capture::{in_limbo, release};
use crate::kill::{random_moment, seeded};
use crate::stage::{PATIENCE, Setting, Stage};

const CAPTURE: [&str; 3] = ["run", "--only", "capture"];
const SINK: [&str; 3] = ["run", "--only", "sink:replica"];
const TALKATIVE: [&str; 5] = ["run", "--only", "sink:replica", "--log-level", "debug"];
const LIFTED: [&str; 4] = ["resume", "t", "--rate", "unlimited"];

/// The line on two processes, whose replica of `t` is whole.
struct Line {
    stage: Stage,
    capture: Pipeline,
    sink: Pipeline,
}

impl Line {
    async fn whole(setting: Setting<'_>, rows: u64) -> Self {
        let stage = Stage::set(setting).await;
        stage
            .sql(&format!(
                "INSERT INTO t SELECT i, 'row ' || i FROM generate_series(1, {rows}) i"
            ))
            .await;
        let (capture, sink) = (stage.start_with(&CAPTURE), stage.start_with(&SINK));
        stage.equal(&sink).await;
        may_begin(&stage, &sink).await;
        Self {
            stage,
            capture,
            sink,
        }
    }

    /// Whose first load of 20,000 rows lies in the copy stream, before a sink that is paused.
    async fn loaded(value: &str) -> Self {
        let stage = Stage::set(Setting::apart()).await;
        stage
            .sql(&format!(
                "INSERT INTO t SELECT i, {value} FROM generate_series(1, 20000) i"
            ))
            .await;
        let mut capture = stage.start_with(&CAPTURE);
        Stage::readyz(&mut capture, 200, "streaming").await;
        let mut sink = stage.start_with(&SINK);
        Stage::logs(&sink, "copy requested").await;
        sink.pause().expect("signal");
        Stage::logs(&capture, "table copied").await;
        Self {
            stage,
            capture,
            sink,
        }
    }

    /// Makes the replica wrong, and waits until a slow repair of it has begun.
    async fn repairs(&self, rate: &str) {
        corrupt(&self.stage).await;
        says(&self.stage, &["start", "t", "--rate", rate], 0, &[]).await;
        becomes(&self.stage, &self.sink, |line| rows(line) > 0).await;
    }

    /// Waits until the repair is over, at its pace or without one.
    async fn ends(&self) {
        becomes(&self.stage, &self.sink, is("done")).await;
    }

    async fn equal(&self) {
        self.stage.equal(&self.sink).await;
    }

    fn restart_capture(&mut self) {
        self.capture.kill9();
        self.capture = self.stage.start_with(&CAPTURE);
    }

    fn restart_sink(&mut self) {
        self.sink.kill9();
        self.sink = self.stage.start_with(&SINK);
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("capture:\n{}", self.capture.logs());
        }
    }
}

/// Rows at the end of the table: their chunk comes last.
const LATE: &str = "UPDATE t SET v = 'late' WHERE id > 2900; DELETE FROM t WHERE id = 2800;
    UPDATE t SET id = id + 10000 WHERE id = 2850";
/// How many of them the target shows as they are, and how many as they were.
const SHOWN: &str = "SELECT count(*) FILTER (WHERE v = 'late') || ' ' ||
    count(*) FILTER (WHERE id IN (2800, 2850)) || ' ' || count(*) FILTER (WHERE id = 12850) FROM t";

/// A repair that has begun, and a commit of [`LATE`] that nobody at the source sees yet. The target takes no part in
/// what waits there.
async fn repairs_beside_limbo() -> (Line, JoinHandle<()>) {
    let line = Line::whole(Setting::apart(), 3_000).await;
    line.repairs("1000").await;
    let held = in_limbo(&line.stage, LATE).await;
    (line, held)
}

#[tokio::test]
async fn a_commit_in_limbo_while_its_chunk_is_read_is_not_undone() {
    let (line, held) = repairs_beside_limbo().await;
    line.ends().await;
    // The target has both by now: the change, and the older rows of the chunk that lacks it.
    assert_eq!(line.stage.target_text(SHOWN).await, "100 0 1");
    let source = "SELECT count(*)::text FROM t WHERE v = 'late'";
    assert_eq!(line.stage.source_text(source).await, "0");
    release(&line.stage).await;
    held.await.expect("commits");
    line.equal().await;
}

#[tokio::test]
async fn a_new_capture_reads_nothing_while_a_commit_is_in_limbo() {
    let (mut line, held) = repairs_beside_limbo().await;
    line.stage.target_shows(&line.sink, SHOWN, "100 0 1").await;
    line.restart_capture();
    Stage::logs(&line.capture, "E1122").await;
    let came = rows(&backfill::line(&line.stage, "replica").await);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let more = rows(&backfill::line(&line.stage, "replica").await);
    assert!(came == more && more < 3_000, "{came} {more}");
    release(&line.stage).await;
    held.await.expect("commits");
    line.ends().await;
    line.equal().await;
}

/// What the clean-up of old deletes would do, done too early: the sink then refuses the older rows of chunks rather
/// than let them bring a row back.
#[tokio::test]
async fn deletes_that_were_forgotten_during_a_chunk_bring_nothing_back() {
    let (mut line, held) = repairs_beside_limbo().await;
    line.stage.target_shows(&line.sink, SHOWN, "100 0 1").await;
    line.sink.kill9();
    line.stage
        .target_sql(
            "INSERT INTO millrace.table_floor (relation, cleanup_floor)
             SELECT relation, max(version::text)::uuid FROM millrace.tombstone GROUP BY relation
             ON CONFLICT (relation) DO UPDATE SET cleanup_floor = excluded.cleanup_floor;
             DELETE FROM millrace.tombstone",
        )
        .await;
    line.sink = line.stage.start_with(&SINK);
    Stage::logs(&line.sink, "asking for the rows again").await;
    assert_eq!(line.stage.target_text(SHOWN).await, "100 0 1");
    release(&line.stage).await;
    held.await.expect("commits");
    line.ends().await;
    line.equal().await;
}

/// Each life of a sink begins with a clean-up: no process need live for long.
#[tokio::test]
async fn old_deletes_are_kept_for_an_open_chunk_and_forgotten_behind_it() {
    const OLD: &str = "UPDATE millrace.tombstone SET deleted_at = now() - interval '1 hour'";
    const REMEMBERED: &str = "SELECT count(*)::text FROM millrace.tombstone";
    let (mut line, held) = repairs_beside_limbo().await;
    line.stage.target_shows(&line.sink, SHOWN, "100 0 1").await;
    line.sink.kill9();
    line.stage.target_sql(OLD).await;
    line.sink = line.stage.start_with(&TALKATIVE);
    Stage::logs(&line.sink, "old deletes forgotten").await;
    // Of the row that was deleted and of the key that was left.
    assert_eq!(line.stage.target_text(REMEMBERED).await, "2");
    release(&line.stage).await;
    held.await.expect("commits");
    line.ends().await;
    line.equal().await;
    let logs = line.sink.logs();
    assert!(!logs.contains("asking for the rows again"), "{logs}");
    // One that is too young to be forgotten stays alone.
    line.stage.sql("DELETE FROM t WHERE id = 5").await;
    line.equal().await;
    line.restart_sink();
    line.stage.target_shows(&line.sink, REMEMBERED, "1").await;
    let floor = "SELECT count(*)::text FROM millrace.table_floor \
                 WHERE cleanup_floor > '00000001-0000-0000-0000-000000000000'";
    assert_eq!(line.stage.target_text(floor).await, "1");
    line.equal().await;
}

#[tokio::test]
async fn a_table_that_is_rewritten_between_chunks_is_right() {
    let line = Line::whole(Setting::default(), backfill::ROWS).await;
    let (stop, traffic) = backfill::traffic(&line.stage).await;
    line.repairs("20000").await;
    for sql in [
        "VACUUM FULL t",
        "ALTER TABLE t ALTER v TYPE varchar(200)",
        "CLUSTER t USING t_pkey",
    ] {
        line.stage.sql(sql).await;
        tokio::time::sleep(Duration::from_millis(400)).await;
    }
    line.ends().await;
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    traffic.await.expect("traffic");
    line.equal().await;
    let logs = line.capture.logs();
    assert!(logs.contains("its chunk is read again"), "{logs}");
}

#[tokio::test]
async fn rows_that_wait_to_be_applied_do_not_outlive_their_end() {
    let mut line = Line::whole(Setting::default(), 5_000).await;
    line.repairs("1500").await;
    // Chunks are read, and lie there.
    line.sink.pause().expect("signal");
    tokio::time::sleep(Duration::from_secs(1)).await;
    line.stage
        .sql(
            "DELETE FROM t WHERE id % 3 = 0; INSERT INTO t SELECT i, 'again' FROM generate_series(3, 600, 6) i;
             UPDATE t SET id = id + 20000 WHERE id % 7 = 0",
        )
        .await;
    line.sink.resume().expect("signal");
    line.ends().await;
    line.equal().await;

    line.repairs("1400").await;
    line.sink.pause().expect("signal");
    tokio::time::sleep(Duration::from_secs(1)).await;
    let truncate = "TRUNCATE t; INSERT INTO t SELECT i, 'new' FROM generate_series(1, 5000, 5) i";
    line.stage.sql(truncate).await;
    line.sink.resume().expect("signal");
    line.ends().await;
    assert_eq!(line.stage.equal(&line.sink).await.rows, 1_000);
}

#[tokio::test]
async fn a_load_that_waits_to_be_applied_does_not_outlive_a_truncate() {
    let mut line = Line::loaded("'old'").await;
    line.stage
        .sql("TRUNCATE t; INSERT INTO t SELECT i, 'new' FROM generate_series(1, 30000, 100) i")
        .await;
    line.sink.resume().expect("signal");
    assert_eq!(line.stage.equal(&line.sink).await.rows, 300);
}

/// Capture is held at any point of a chunk, between its snapshot and its publishing too, while the table is emptied.
#[tokio::test]
async fn a_truncate_between_a_chunks_snapshot_and_its_publishing_counts() {
    let mut rng = seeded();
    let mut line = Line::whole(Setting::default(), 5_000).await;
    line.repairs("1000").await;
    for round in 0..6 {
        random_moment(&mut rng, 300).await;
        line.capture.pause().expect("signal");
        let client = line.stage.postgres.connect("source").await;
        let client = client.expect("connects");
        // It waits for a chunk that is being read, and capture must go on for that.
        let truncate = tokio::spawn(async move {
            let sql = format!(
                "BEGIN; TRUNCATE t; INSERT INTO t SELECT i, 'round {round}' FROM generate_series(1, 5000) i; COMMIT"
            );
            client.batch_execute(&sql).await.expect("truncates");
        });
        tokio::time::sleep(Duration::from_millis(100)).await;
        line.capture.resume().expect("signal");
        truncate.await.expect("truncates");
    }
    says(&line.stage, &LIFTED, 0, &[]).await;
    line.ends().await;
    assert_eq!(line.stage.equal(&line.sink).await.rows, 5_000);
}

/// Its changes lie below the chunk's version, and its commit above: versioned by where they lie, they would lose.
#[tokio::test]
async fn a_transaction_that_writes_before_a_chunk_and_commits_behind_it_is_not_undone() {
    let line = Line::whole(Setting::default(), 3_000).await;
    line.repairs("1000").await;
    let writer = line.stage.postgres.connect("source").await;
    let writer = writer.expect("connects");
    writer
        .batch_execute(&format!("BEGIN; {LATE}"))
        .await
        .expect("writes");
    line.ends().await;
    let shown = "SELECT count(*)::text FROM t WHERE v = 'late'";
    assert_eq!(line.stage.target_text(shown).await, "0");
    writer.batch_execute("COMMIT").await.expect("commits");
    line.equal().await;
    assert_eq!(line.stage.target_text(SHOWN).await, "100 0 1");
}

/// The stream does not come as far as the chunk's snapshot before the table is emptied.
#[tokio::test]
async fn a_truncate_behind_a_chunk_that_waits_to_be_published_counts() {
    let line = Line::whole(Setting::default(), 5_000).await;
    line.repairs("500").await;
    let sender = "SELECT pid::text FROM pg_stat_replication";
    let sender = line.stage.source_text(sender).await;
    let signal = |name: &str| {
        let sent = std::process::Command::new("kill")
            .args([name, &sender])
            .status();
        assert!(sent.expect("is sent").success());
    };
    signal("-STOP");
    // Another chunk is due within a second.
    tokio::time::sleep(Duration::from_secs(2)).await;
    line.stage
        .sql("TRUNCATE t; INSERT INTO t SELECT i, 'new' FROM generate_series(1, 5000, 5) i")
        .await;
    signal("-CONT");
    says(&line.stage, &LIFTED, 0, &[]).await;
    line.ends().await;
    assert_eq!(line.stage.equal(&line.sink).await.rows, 1_000);
}

#[tokio::test]
async fn capture_and_the_sink_may_be_killed_by_turns_between_any_two_chunks() {
    let mut rng = seeded();
    let mut line = Line::whole(Setting::default(), backfill::ROWS).await;
    let (stop, traffic) = backfill::traffic(&line.stage).await;
    line.repairs("5000").await;
    for round in 0..8 {
        random_moment(&mut rng, 900).await;
        match (round + u32::from(rng.random::<bool>())) % 2 {
            0 => line.restart_capture(),
            _ => line.restart_sink(),
        }
    }
    let shown = backfill::line(&line.stage, "replica").await;
    assert_eq!(shown["state"], "chunks", "it was over before: {shown}");
    says(&line.stage, &LIFTED, 0, &[]).await;
    line.ends().await;
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    traffic.await.expect("traffic");
    line.equal().await;
}

#[tokio::test]
async fn a_table_is_published_while_a_transaction_that_wrote_it_is_open() {
    let mut line = Line::whole(
        Setting {
            schema: "CREATE TABLE t (id int PRIMARY KEY, v text);
                     CREATE TABLE late (id int PRIMARY KEY, v text);
                     INSERT INTO late SELECT i, 'row ' || i FROM generate_series(1, 500) i",
            ..Setting::default()
        },
        100,
    )
    .await;
    line.capture.kill9();
    line.sink.kill9();
    // The other table leaves the publication, and comes back with a repair.
    let open = line.stage.postgres.connect("source").await;
    let open = open.expect("connects");
    line.stage
        .sql("ALTER PUBLICATION millrace_shop DROP TABLE t")
        .await;
    open.batch_execute(
        "BEGIN; UPDATE late SET v = 'open' WHERE id < 100; DELETE FROM late WHERE id = 200;
         INSERT INTO late VALUES (1000, 'open'); UPDATE t SET v = 'open' WHERE id < 50;
         DELETE FROM t WHERE id = 60; INSERT INTO t VALUES (1000, 'open')",
    )
    .await
    .expect("open");
    line.stage.folder = line
        .stage
        .same_config()
        .table("public.late", "")
        .write()
        .expect("folder");
    line.capture = line.stage.start_with(&CAPTURE);
    line.sink = line.stage.start_with(&SINK);
    says(&line.stage, &["start", "t"], 0, &[]).await;
    Stage::logs(&line.sink, "copy requested").await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let early =
        "UPDATE late SET v = 'early' WHERE id > 450; UPDATE t SET v = 'early' WHERE id > 90";
    line.stage.sql(early).await;
    let commit = "UPDATE late SET v = 'open too' WHERE id = 300; UPDATE t SET v = 'open too' WHERE id = 70; COMMIT";
    open.batch_execute(commit).await.expect("commits");
    line.ends().await;
    let tables = [Compared::same("public.t"), Compared::same("public.late")];
    let compared = line.stage.equal_as(&line.sink, &tables).await;
    assert_eq!(compared.rows, 600);
}

/// What the broker does to the copy stream.
enum Loss {
    Stream,
    AllMessages,
    LastMessages,
}

async fn lose(stage: &Stage, loss: &Loss) {
    let jetstream = jetstream::new(stage.nats.client().await.expect("nats"));
    let name = subject::copy_stream_name("shop", "replica");
    if matches!(loss, Loss::Stream) {
        jetstream.delete_stream(name).await.expect("deleted");
        return;
    }
    let mut stream = jetstream.get_stream(name).await.expect("copy stream");
    if matches!(loss, Loss::AllMessages) {
        stream.purge().await.expect("purged");
        return;
    }
    let state = stream.info().await.expect("info").state.clone();
    assert!(state.messages > 0, "nothing to lose");
    for seq in (state.first_sequence..=state.last_sequence).rev().take(3) {
        stream.delete_message(seq).await.expect("deleted");
    }
}

async fn chunks_survive(loss: Loss) {
    let mut line = Line::whole(Setting::default(), 6_000).await;
    line.repairs("1400").await;
    line.sink.pause().expect("signal");
    tokio::time::sleep(Duration::from_secs(1)).await;
    lose(&line.stage, &loss).await;
    line.stage
        .sql("UPDATE t SET v = 'meanwhile' WHERE id % 50 = 0")
        .await;
    line.sink.resume().expect("signal");
    line.ends().await;
    line.equal().await;
}

#[tokio::test]
async fn chunks_come_again_after_their_stream_was_deleted() {
    chunks_survive(Loss::Stream).await;
}

#[tokio::test]
async fn chunks_come_again_after_their_stream_was_emptied() {
    chunks_survive(Loss::AllMessages).await;
}

#[tokio::test]
async fn chunks_come_again_after_their_stream_lost_its_end() {
    chunks_survive(Loss::LastMessages).await;
}

async fn a_load_survives(loss: Loss) {
    let mut line = Line::loaded("repeat(md5(i::text), 20)").await;
    lose(&line.stage, &loss).await;
    line.stage
        .sql("UPDATE t SET v = 'meanwhile' WHERE id % 50 = 0; DELETE FROM t WHERE id % 50 = 1")
        .await;
    line.sink.resume().expect("signal");
    assert_eq!(line.stage.equal(&line.sink).await.rows, 19_600);
}

#[tokio::test]
async fn a_load_comes_in_chunks_after_its_stream_was_deleted() {
    a_load_survives(Loss::Stream).await;
}

#[tokio::test]
async fn a_load_comes_in_chunks_after_its_stream_was_emptied() {
    a_load_survives(Loss::AllMessages).await;
}

#[tokio::test]
async fn a_load_comes_in_chunks_after_its_stream_lost_its_end() {
    a_load_survives(Loss::LastMessages).await;
}

#[tokio::test]
async fn a_repair_of_an_idle_source_ends_without_waiting_for_a_heartbeat() {
    let setting = Setting {
        source: "heartbeat_interval = \"5m\"",
        ..Setting::default()
    };
    let line = Line::whole(setting, 2_000).await;
    corrupt(&line.stage).await;
    let began = Instant::now();
    says(&line.stage, &["start", "t", "--wait"], 0, &["done"]).await;
    let took = began.elapsed();
    assert!(took < Duration::from_secs(20), "{took:?}");
    let compared = line.stage.compared().await.expect("compare");
    assert!(compared.is_equal(), "{compared:?}");
}

/// The table's claim on the stream lapses before its load may even begin.
#[tokio::test]
async fn a_load_that_the_stream_does_not_wait_for_goes_on_in_chunks() {
    let mut line = Line::whole(
        Setting {
            schema: "CREATE TABLE t (id int PRIMARY KEY, v text);
                     CREATE TABLE late (id int PRIMARY KEY, v text);
                     INSERT INTO late SELECT i, 'row ' || i FROM generate_series(1, 2000) i",
            stream: "confirm = \"acked\"\nretention = { max_bytes = \"1MiB\" }",
            ..Setting::default()
        },
        10,
    )
    .await;
    let Line {
        stage,
        capture,
        sink,
    } = &mut line;
    for part in [&mut *sink, &mut *capture] {
        part.terminate().expect("signal");
        assert_eq!(part.wait(PATIENCE).await.expect("ends"), 0);
    }
    // The load's snapshot waits for it.
    let open = stage.postgres.connect("source").await.expect("connects");
    let begin = "BEGIN; UPDATE t SET v = 'open' WHERE id = 1";
    open.batch_execute(begin).await.expect("open");
    let config = stage.same_config().table("public.late", "");
    stage.folder = config.write().expect("folder");
    *capture = stage.start_with(&CAPTURE);
    *sink = stage.start_with(&SINK);
    Stage::logs(sink, "copy requested").await;
    for sql in [
        "UPDATE late SET v = 'before the load' WHERE id <= 100",
        "DO $$ BEGIN FOR i IN 1001..2400 LOOP
             INSERT INTO t VALUES (i, repeat(md5(i::text), 32)); COMMIT;
         END LOOP; END $$",
        "UPDATE late SET v = 'long after it' WHERE id <= 50",
    ] {
        stage.sql(sql).await;
    }
    let came = "SELECT count(*)::text FROM t WHERE id > 1000";
    stage.target_shows(sink, came, "1400").await;
    open.batch_execute("COMMIT").await.expect("commits");
    let tables = [Compared::same("public.t"), Compared::same("public.late")];
    assert_eq!(stage.equal_as(sink, &tables).await.rows, 3_410);
    Stage::logs(sink, "they are copied again, in chunks").await;
}
