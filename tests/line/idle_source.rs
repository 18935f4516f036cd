//! An idle source in a busy cluster: its slot must not keep the others' WAL.

use std::time::{Duration, Instant};

use millrace_event::Lsn;

use crate::stage::{PATIENCE, Setting, Stage};

#[tokio::test]
async fn the_slot_of_an_idle_database_follows_what_the_others_write() {
    let stage = Stage::set(Setting::default()).await;
    let mut pipeline = stage.start();
    Stage::readyz(&mut pipeline, 200, "streaming").await;
    stage
        .postgres
        .create_database("other")
        .await
        .expect("database");
    let other = stage.postgres.connect("other").await.expect("connected");
    other
        .batch_execute(
            "CREATE TABLE busy AS SELECT i, repeat('x', 500) FROM generate_series(1, 20000) i",
        )
        .await
        .expect("written");
    let written = stage.ask("SELECT pg_current_wal_insert_lsn()::text").await;
    let written: Lsn = written.expect("a text").parse().expect("an LSN");
    let deadline = Instant::now() + PATIENCE;
    loop {
        // restart_lsn moves when the slot passes a record of the running transactions.
        other
            .batch_execute("SELECT pg_log_standby_snapshot()")
            .await
            .ok();
        let slot = stage
            .ask(
                "SELECT least(confirmed_flush_lsn, restart_lsn)::text FROM pg_replication_slots \
                 WHERE slot_name = 'millrace_shop'",
            )
            .await;
        let slot: Lsn = slot.expect("a slot").parse().expect("an LSN");
        if slot >= written {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "the slot is at {slot}, the WAL was at {written}\n{}",
            pipeline.logs()
        );
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}
