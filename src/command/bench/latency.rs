//! From the commit at the source until the row is visible in the target, under a steady load.

use std::time::{Duration, Instant};

use millrace_lab::{LabError, Pipeline, shop};
use serde::Serialize;
use tokio_postgres::Client;

use super::contender::Contender;
use super::stage::{DATABASE, LIMIT, Stage, TABLE};
use super::turn::subscription;
use super::wal;

/// Single-row transactions a second.
pub(super) const RATE: u32 = 1_000;

/// How long the load lasts that counts, in seconds.
const SECONDS: u64 = 10;

/// The first second does not count: caches and connections warm up.
const WARM_UP_SECONDS: u64 = 1;

/// Between the first row's arrival and the load.
const PAUSE: Duration = Duration::from_secs(1);

/// What the source must record. The target's record would not do: a native subscription commits with the
/// source's time there. Its WAL has the true one.
pub(super) const SETTINGS: [(&str, &str); 1] = [("track_commit_timestamp", "on")];

/// What was seen.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Latency {
    pub(super) contender: Contender,
    pub(super) p50_ms: f64,
    pub(super) p99_ms: f64,
    pub(super) max_ms: f64,
    /// Rows that count.
    pub(super) rows: usize,
    /// What the load generator reached.
    pub(super) transactions_per_second: f64,
}

/// Measures the contender that comes as the `nth` on this stage, from 0.
pub(super) async fn measure(
    stage: &Stage,
    contender: Contender,
    nth: u64,
) -> Result<Latency, LabError> {
    let total = (SECONDS + WARM_UP_SECONDS) * u64::from(RATE);
    let first = nth * (total + 1) + 1;
    stage.settle().await?;
    let mut run = None;
    if contender == Contender::Native {
        subscription(stage, contender, "ENABLE").await?;
    } else {
        let folder = stage.folder(contender);
        run = Some(Pipeline::spawn(&stage.bin, folder, &["run"])?);
    }
    // Once a row has arrived it is at work, and done with what the others were given.
    shop::fill_orders(&stage.client, first, 1, 1).await?;
    let arrived = stage.until_visible(contender, (first, first), 1, run.as_mut());
    arrived.await?;
    tokio::time::sleep(PAUSE).await;

    let wal_start = wal::position(&stage.target.connect(contender.name()).await?).await?;
    let began = Instant::now();
    shop::pace_orders(&stage.source.url(DATABASE), first + 1, total, RATE).await?;
    let rate = total as f64 / began.elapsed().as_secs_f64();
    let range = (first + 1, first + total);
    let arrived = stage.until_visible(contender, range, total, run.as_mut());
    arrived.await?;
    match &mut run {
        Some(run) => {
            run.terminate()?;
            run.wait(LIMIT).await?;
        }
        None => subscription(stage, contender, "DISABLE").await?,
    }
    let committed = commits(&stage.client, range).await?;
    let target = stage.target.connect(contender.name()).await?;
    let visible = wal::commits(stage, &target, &wal_start, range).await?;
    let millis = latencies(&committed, &visible);
    Ok(Latency {
        contender,
        p50_ms: percentile(&millis, 0.50),
        p99_ms: percentile(&millis, 0.99),
        max_ms: percentile(&millis, 1.0),
        rows: millis.len(),
        transactions_per_second: rate,
    })
}

/// When each row was committed at the source, in microseconds, by id.
async fn commits(client: &Client, (first, last): (u64, u64)) -> Result<Vec<(i64, i64)>, LabError> {
    let query = format!(
        "SELECT id, (extract(epoch FROM pg_xact_commit_timestamp(xmin)) * 1000000)::bigint \
         FROM {TABLE} WHERE id BETWEEN {first} AND {last} ORDER BY id"
    );
    let rows = client.query(&query, &[]).await;
    let rows = rows.map_err(LabError::postgres("read commit times"))?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

/// Milliseconds between two lists of the same ids, rising, without the warm-up.
fn latencies(committed: &[(i64, i64)], visible: &[(i64, i64)]) -> Vec<f64> {
    let warm_up = i64::try_from(WARM_UP_SECONDS * 1_000_000).unwrap_or(i64::MAX);
    let began = committed.iter().map(|(_, at)| *at).min().unwrap_or(0);
    let mut millis: Vec<f64> = committed
        .iter()
        .zip(visible)
        .filter(|((id, at), (other, _))| id == other && *at >= began + warm_up)
        .map(|((_, at), (_, seen))| (seen - at) as f64 / 1e3)
        .collect();
    millis.sort_by(f64::total_cmp);
    millis
}

/// The smallest value that `part` of the values do not exceed; 0 where there is none.
fn percentile(sorted: &[f64], part: f64) -> f64 {
    let rank = (sorted.len() as f64 * part).ceil() as usize;
    let value = sorted.get(rank.max(1) - 1).or(sorted.last());
    value.copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_second_does_not_count() {
        let committed = [
            (1, 5_000_000),
            (2, 5_999_999),
            (3, 6_000_000),
            (4, 7_000_000),
        ];
        let visible = [
            (1, 9_000_000),
            (2, 9_000_000),
            (3, 6_002_500),
            (4, 7_001_000),
        ];
        assert_eq!(latencies(&committed, &visible), [1.0, 2.5]);
    }

    #[test]
    fn percentiles_are_values_that_were_seen() {
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(percentile(&hundred, 0.50), 50.0);
        assert_eq!(percentile(&hundred, 0.99), 99.0);
        assert_eq!(percentile(&hundred, 1.0), 100.0);
        assert_eq!((percentile(&[7.0], 0.5), percentile(&[], 0.5)), (7.0, 0.0));
    }
}
