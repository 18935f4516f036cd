//! A replica joins while everybody writes, and transaction ids that need more than 32 bits.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use millrace_lab::{Compared, Pipeline, PostgresOptions, compare, shop};

use crate::backfill::{self, becomes, corrupt, is, may_begin, says};
use crate::kill::{seeded, shop_setting, traffic};
use crate::stage::{PATIENCE, Setting, Stage};

/// How much a test of a joining replica does.
struct Join {
    /// Rows that are there before.
    orders: u64,
    /// Transactions a second at the source.
    rate: u32,
    /// How long before the second sink starts, and after it has everything.
    before: Duration,
    after: Duration,
    /// The least part of the rate that must have been reached: the machine may be busy.
    reached: f64,
    /// How far the first sink may fall behind, in seconds.
    lag_max: f64,
}

/// How far a sink is behind, in seconds.
async fn lag(sink: &mut Pipeline) -> Option<f64> {
    let (_, text) = sink.get("/metrics").await.ok()?;
    let line = text.lines().find(|line| {
        line.starts_with("millrace_replication_lag_seconds{") && line.contains("replica")
    })?;
    line.rsplit(' ').next()?.parse().ok()
}

async fn joins(join: Join) {
    let mut rng = seeded();
    let mut stage = Stage::set(shop_setting()).await;
    shop::fill_orders(&stage.source, 1, join.orders, 1_000)
        .await
        .expect("orders");
    stage
        .postgres
        .create_database("second")
        .await
        .expect("database");
    let second_url = stage.postgres.url("second");
    let config = stage.same_config().sink("second", &second_url);
    stage.folder = config.write().expect("folder");
    let capture = stage.start_with(&["run", "--only", "capture"]);
    let mut first = stage.start_with(&["run", "--only", "sink:replica"]);
    stage.equal(&first).await;

    let traffic = traffic(&stage, &mut rng, join.rate).await;
    tokio::time::sleep(join.before).await;
    let (began, before) = (Instant::now(), traffic.progress());
    let second = stage.start_with(&["run", "--only", "sink:second"]);
    let mut lag_max = 0_f64;
    let mut joined: Option<Instant> = None;
    while joined.is_none_or(|at| at.elapsed() < join.after) {
        if let Some(lag) = lag(&mut first).await {
            lag_max = lag_max.max(lag);
        }
        let is_whole = || {
            let logs = second.logs();
            shop::TABLES.iter().all(|table| {
                logs.lines()
                    .any(|line| line.contains("up to date") && line.contains(table))
            })
        };
        if joined.is_none() && is_whole() {
            joined = Some(Instant::now());
        }
        assert!(
            began.elapsed() < PATIENCE * 5,
            "{}\n{}",
            second.logs(),
            capture.logs()
        );
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let joined = joined.map_or(Duration::ZERO, |at| at - began);
    let (took, now) = (began.elapsed(), traffic.progress());
    let rate = (now.transactions - before.transactions) as f64 / took.as_secs_f64();
    println!(
        "{rate:.0} transactions/s, {} changes in {took:.1?}; joined in {joined:.1?}; the first sink was at most \
         {lag_max:.1} s behind",
        now.changes - before.changes
    );
    traffic.stop().await.expect("traffic");
    stage.equal(&first).await;
    let tables = shop::TABLES.map(Compared::same);
    let deadline = Instant::now() + PATIENCE;
    loop {
        let compared = compare(&stage.postgres.url("source"), &second_url, &tables).await;
        if compared.as_ref().is_ok_and(|compared| compared.is_equal()) {
            break;
        }
        assert!(Instant::now() < deadline, "{compared:?}\n{}", second.logs());
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!(
        rate > f64::from(join.rate) * join.reached,
        "only {rate:.0} transactions/s"
    );
    assert!(lag_max < join.lag_max, "{lag_max} s behind");
}

#[tokio::test]
async fn a_replica_joins_under_traffic() {
    joins(Join {
        orders: 5_000,
        rate: 300,
        before: Duration::from_secs(1),
        after: Duration::from_secs(6),
        reached: 0.3,
        lag_max: 15.0,
    })
    .await;
}

#[tokio::test]
#[ignore = "takes over a minute and the whole machine: `make test-long`"]
async fn a_replica_joins_under_2000_transactions_a_second() {
    joins(Join {
        orders: 300_000,
        rate: 2_000,
        before: Duration::from_secs(10),
        after: Duration::from_secs(60),
        reached: 0.9,
        lag_max: 15.0,
    })
    .await;
}

#[tokio::test]
async fn transaction_ids_of_another_epoch_are_told_apart() {
    const NEXT: u64 = (6 << 32) - 400;
    let mut stage = Stage::set(Setting {
        postgres: PostgresOptions {
            settings: vec![("autovacuum".into(), "off".into())],
            ..PostgresOptions::default()
        },
        target_postgres: Some(PostgresOptions::default()),
        ..Setting::default()
    })
    .await;
    let rows = backfill::ROWS;
    stage
        .sql(&format!(
            "INSERT INTO t SELECT i, 'row ' || i FROM generate_series(1, {rows}) i"
        ))
        .await;
    stage.postgres.restart_at_xid(NEXT).await.expect("restarts");
    stage.reconnect().await;
    let id = "SELECT pg_current_xact_id()::text";
    let id = stage.source_text(id).await.parse::<u64>().expect("an id");
    assert!((NEXT..NEXT + 100).contains(&id), "{id}");

    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    may_begin(&stage, &pipeline).await;
    // The first chunks are read before the epoch ends, the others after.
    corrupt(&stage).await;
    let snapshot = "SELECT pg_snapshot_xmin(pg_current_snapshot())::text";
    says(&stage, &["start", "t", "--rate", "10000"], 0, &[]).await;
    becomes(&stage, &pipeline, |line| backfill::rows(line) > 0).await;
    let began = stage.source_text(snapshot).await;
    assert!(began.parse::<u64>().expect("an id") < 6 << 32, "{began}");
    let (stop, traffic) = backfill::traffic(&stage).await;
    let use_up =
        "DO $$ BEGIN FOR i IN 1..400 LOOP PERFORM pg_current_xact_id(); COMMIT; END LOOP; END $$";
    stage.sql(use_up).await;
    becomes(&stage, &pipeline, is("done")).await;
    stop.store(true, Ordering::Relaxed);
    traffic.await.expect("traffic");
    let ended = stage.source_text(snapshot).await;
    assert!(ended.parse::<u64>().expect("an id") > 6 << 32, "{ended}");
    stage.equal(&pipeline).await;
    // A second one, wholly in the new epoch, while everybody writes.
    corrupt(&stage).await;
    let (stop, traffic) = backfill::traffic(&stage).await;
    says(&stage, &["start", "t", "--wait"], 0, &["done"]).await;
    stop.store(true, Ordering::Relaxed);
    traffic.await.expect("traffic");
    stage.equal(&pipeline).await;
}
