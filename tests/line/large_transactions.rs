//! A transaction of any size arrives as a whole, in modest memory.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::stage::{Setting, Stage};

const ROWS: u64 = 100_000;
/// Between two looks of a reader: it should not take the machine from the product.
const READ_INTERVAL: Duration = Duration::from_millis(10);
/// What the process may ever hold, in a debug build.
const MEMORY_KIB_MAX: u64 = 128 * 1024;
/// Bytes of a wide row. So many of them are far more than that.
const WIDE_BYTES: u64 = 5_000;
const WIDE_ROWS: u64 = 50_000;
const _: () = assert!(WIDE_ROWS * WIDE_BYTES > 3 * MEMORY_KIB_MAX * 1024 / 2);

/// Reads `query` at the target until told to stop, and checks every answer.
struct Reader {
    stop: Arc<AtomicBool>,
    reads: Arc<AtomicU64>,
    task: tokio::task::JoinHandle<()>,
}

impl Reader {
    async fn start(stage: &Stage, query: &'static str, allowed: &'static [&'static str]) -> Self {
        let client = stage.postgres.connect("target").await.expect("connects");
        let (stop, reads) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let (stopped, counted) = (Arc::clone(&stop), Arc::clone(&reads));
        let task = tokio::spawn(async move {
            while !stopped.load(Ordering::Relaxed) {
                let row = client.query_one(query, &[]).await.expect("reads");
                let found: String = row.get(0);
                assert!(allowed.contains(&found.as_str()), "{query} shows {found}");
                counted.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(READ_INTERVAL).await;
            }
        });
        Self { stop, reads, task }
    }

    async fn finish(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.expect("the reader saw half a transaction");
        assert!(
            self.reads.load(Ordering::Relaxed) > 3,
            "it hardly ever looked"
        );
    }
}

/// The most memory that a process had so far.
pub(crate) fn peak_memory_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .expect("a peak");
    line.trim()
        .trim_end_matches(" kB")
        .parse()
        .expect("a number")
}

#[tokio::test]
async fn a_reader_never_sees_half_of_a_hundred_thousand_rows() {
    let stage = Stage::set(Setting {
        schema: "CREATE TABLE t (id int PRIMARY KEY, marker int NOT NULL, v text)",
        ..Setting::default()
    })
    .await;
    stage.sql("INSERT INTO t VALUES (0, 0, 'copied')").await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    stage.sql("DELETE FROM t").await;
    stage.equal(&pipeline).await;

    let count = "SELECT count(*)::text FROM t";
    let reader = Reader::start(&stage, count, &["0", "100000"]).await;
    stage
        .sql(&format!(
            "INSERT INTO t SELECT i, 0, 'the row number ' || i FROM generate_series(1, {ROWS}) i"
        ))
        .await;
    // Cheaper to ask for than a comparison, until it is there.
    stage.target_shows(&pipeline, count, "100000").await;
    assert_eq!(stage.equal(&pipeline).await.rows, ROWS);
    reader.finish().await;

    let query = "SELECT min(marker) || ' to ' || max(marker) || ' in ' || count(*) FROM t";
    let reader = Reader::start(&stage, query, &["0 to 0 in 100000", "1 to 1 in 100000"]).await;
    stage.sql("UPDATE t SET marker = 1").await;
    stage
        .target_shows(&pipeline, query, "1 to 1 in 100000")
        .await;
    assert_eq!(stage.equal(&pipeline).await.rows, ROWS);
    reader.finish().await;

    let reader = Reader::start(&stage, count, &["0", "100000"]).await;
    stage.sql("DELETE FROM t").await;
    stage.target_shows(&pipeline, count, "0").await;
    assert_eq!(stage.equal(&pipeline).await.rows, 0);
    reader.finish().await;

    let peak = peak_memory_kib(pipeline.pid());
    assert!(peak < MEMORY_KIB_MAX, "peak memory: {peak} KiB");
}

#[tokio::test]
async fn a_transaction_larger_than_memory_is_held_nowhere() {
    let stage = Stage::set(Setting::default()).await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    stage
        .sql(&format!(
            "INSERT INTO t SELECT i, repeat('wide ', {WIDE_BYTES} / 5) FROM generate_series(1, {WIDE_ROWS}) i"
        ))
        .await;
    let count = "SELECT count(*)::text FROM t";
    stage
        .target_shows(&pipeline, count, &WIDE_ROWS.to_string())
        .await;
    let peak = peak_memory_kib(pipeline.pid());
    assert!(peak < MEMORY_KIB_MAX, "peak memory: {peak} KiB");
}
