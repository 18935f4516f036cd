//! What happens at the source while a load is under way. It stands still before a sink that does not read, so there is
//! time for it.

use std::time::{Duration, Instant};

use millrace_event::subject;
use millrace_event::work::{CopyApplied, CopyStatus, Wanted};

use super::stand::Line;
use crate::copy_faults::{held, small_copy_stream};
use crate::large_transactions::peak_memory_kib;
use crate::stage::{PATIENCE, Setting, Stage};

/// Rows of more than two ranges of blocks, and of more than a load puts before its sink.
const WIDE: &str = "ALTER TABLE first ALTER v SET STORAGE PLAIN;
    INSERT INTO first SELECT i, repeat('x', 1900) || i FROM generate_series(1, 6000) i";

impl Line {
    /// Is the sink that has applied what lies on the copy stream.
    async fn takes(&self, id: &str) {
        let name = subject::copy_stream_name("shop", "replica");
        let stream = self.jetstream.get_stream(name).await.expect("copy stream");
        let applied = CopyApplied {
            request: id.to_owned(),
            stream_seq: stream.cached_info().state.last_sequence,
            after: Vec::new(),
        };
        let value = serde_json::to_vec(&applied).expect("json");
        let put = self.copies.put("applied.replica", value.into());
        put.await.expect("applied");
    }

    /// Takes what comes until the status is as wanted.
    async fn takes_until(&self, id: &str, wanted: impl Fn(&CopyStatus) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !wanted(&self.told(id, |_| true).await) {
            assert!(Instant::now() < deadline, "{}", self.capture.logs());
            self.takes(id).await;
        }
    }
}

/// Large rows, of which the source holds little: a few blocks, so that one range has them all.
const LARGE_ROWS: &str = "CREATE TABLE t (id int PRIMARY KEY, v text);
    INSERT INTO t SELECT i, repeat('x', 24 * 1024 * 1024) FROM generate_series(1, 20) i";
/// All of them have 480 MiB. Two are with the broker; of what is read ahead there is one, and another is being read.
const MEMORY_KIB_MAX: u64 = 300 * 1024;

fn loads(status: &CopyStatus, table: &str) -> bool {
    let loading = status.loading.as_ref();
    loading.is_some_and(|loading| loading.table == table)
}

#[tokio::test]
async fn a_table_that_is_loaded_is_free_while_the_next_one_is_read() {
    let schema = format!(
        "CREATE TABLE first (id int PRIMARY KEY, v text); {WIDE}; CREATE TABLE t (LIKE first INCLUDING ALL);
         INSERT INTO t SELECT * FROM first"
    );
    let stage = Stage::set(Setting {
        schema: &schema,
        tables: &[("public.first", ""), ("public.t", "")],
        ..Setting::default()
    })
    .await;
    let line = Line::on(stage).await;
    small_copy_stream(&line.stage).await;
    line.ask("r1", &[("first", Wanted::Load), ("t", Wanted::Load)])
        .await;
    line.takes_until("r1", |status| loads(status, "t")).await;
    line.stage
        .sql("SET lock_timeout = '2s'; ALTER TABLE first ADD COLUMN more int")
        .await;
    let status = line.told("r1", |_| true).await;
    assert!(
        loads(&status, "t") && status.copied.len() == 1,
        "{status:?}"
    );
}

#[tokio::test]
async fn names_that_were_swapped_after_the_snapshot_let_nothing_out() {
    let schema = format!(
        "CREATE TABLE first (id int PRIMARY KEY, v text); {WIDE};
         CREATE TABLE t (id int PRIMARY KEY, ssn text, note text);
         INSERT INTO t SELECT i, 'secret ' || i, 'note ' || i FROM generate_series(1, 100) i"
    );
    let stage = Stage::set(Setting {
        schema: &schema,
        tables: &[
            ("public.first", ""),
            ("public.t", "columns.mask = { ssn = \"redact\" }"),
        ],
        ..Setting::default()
    })
    .await;
    let line = Line::on(stage).await;
    small_copy_stream(&line.stage).await;
    line.ask("r1", &[("first", Wanted::Load), ("t", Wanted::Load)])
        .await;
    line.told("r1", |status| loads(status, "first")).await;
    line.stage
        .sql(
            "BEGIN; ALTER TABLE t RENAME ssn TO other; ALTER TABLE t RENAME note TO ssn;
             ALTER TABLE t RENAME other TO note; COMMIT",
        )
        .await;
    // The check of the columns is one of the snapshot, which knows nothing of it.
    line.takes_until("r1", |status| {
        let copied = status.copied.iter().any(|table| table.table == "t");
        assert!(!copied, "its rows came under names that are not theirs");
        line.capture.logs().contains("names in it")
    })
    .await;
    assert!(line.capture.logs().contains("E1121"));
}

#[tokio::test]
async fn large_rows_are_not_read_far_ahead_of_a_sink_that_does_not_read() {
    let stage = Stage::set(Setting {
        schema: LARGE_ROWS,
        ..Setting::default()
    })
    .await;
    let line = Line::on(stage).await;
    line.ask("r1", &[("t", Wanted::Load)]).await;
    line.told("r1", |status| loads(status, "t")).await;
    let peak = || peak_memory_kib(line.capture.pid());
    let (deadline, mut before) = (Instant::now() + PATIENCE, 0);
    while peak() > before || held(&line.jetstream).await < 24 * 1024 * 1024 {
        assert!(Instant::now() < deadline, "{}", line.capture.logs());
        before = peak();
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
    assert!(peak() < MEMORY_KIB_MAX, "peak memory: {} KiB", peak());
    // All of it comes nevertheless.
    line.takes_until("r1", |status| status.copied.len() == 1)
        .await;
}

#[tokio::test]
async fn a_load_that_is_read_more_slowly_than_it_is_taken_gets_another_reader() {
    // A condition that costs about a millisecond a row.
    let stage = Stage::set(Setting {
        schema:
            "CREATE TABLE t (id int PRIMARY KEY, v text); ALTER TABLE t ALTER v SET STORAGE PLAIN;
            INSERT INTO t SELECT i, repeat('x', 1900) FROM generate_series(1, 6000) i",
        tables: &[(
            "public.t",
            "where = \"length(repeat('x', 120000 + id)) > 0\"\n",
        )],
        ..Setting::default()
    })
    .await;
    let line = Line::on(stage).await;
    line.ask("r1", &[("t", Wanted::Load)]).await;
    line.told("r1", |status| loads(status, "t")).await;
    let readers =
        "SELECT count(DISTINCT pid)::text FROM pg_stat_activity WHERE query LIKE 'COPY (SELECT%'";
    let deadline = Instant::now() + PATIENCE;
    while line.stage.source_text(readers).await != "2" {
        assert!(Instant::now() < deadline, "{}", line.capture.logs());
        line.takes("r1").await;
    }
    line.takes_until("r1", |status| status.copied.len() == 1)
        .await;
}
