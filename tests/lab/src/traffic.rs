//! Live traffic on the shop.

mod writer;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rand::SeedableRng as _;
use rand::rngs::StdRng;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior};

use crate::error::LabError;
use crate::postgres::connect;
use writer::Writer;

/// One connection is given up to so many transactions a second.
const RATE_PER_WRITER_MAX: u32 = 400;
const WRITERS_MAX: u32 = 8;
const RECONNECT_PAUSE: Duration = Duration::from_millis(100);
/// How long a lost source is waited for before the traffic gives up.
const RECONNECT_TIMEOUT: Duration = Duration::from_secs(120);

/// What the traffic committed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TrafficReport {
    /// Transactions whose commit was answered.
    pub transactions: u64,
    /// Rows they inserted, updated or deleted.
    pub changes: u64,
}

#[derive(Debug, Default)]
struct Counters {
    stop: AtomicBool,
    transactions: AtomicU64,
    changes: AtomicU64,
}

/// Running traffic; ends when it is stopped or dropped.
#[derive(Debug)]
pub struct Traffic {
    counters: Arc<Counters>,
    writers: Vec<JoinHandle<Result<(), LabError>>>,
}

impl Traffic {
    /// Writes about `rate` transactions a second to the shop at `url`. The choice of each writer's
    /// transactions follows from `seed`. Survives restarts of the source; can be started again
    /// on a shop that is not empty.
    ///
    /// # Errors
    ///
    /// Fails when the source cannot be reached or is no shop.
    pub async fn start(url: &str, seed: u64, rate: u32) -> Result<Self, LabError> {
        let rate = rate.max(1);
        let count = rate.div_ceil(RATE_PER_WRITER_MAX).min(WRITERS_MAX);
        let counters = Arc::new(Counters::default());
        let mut traffic = Self {
            counters: counters.clone(),
            writers: Vec::new(),
        };
        for number in 0..count {
            let rng = StdRng::seed_from_u64(seed.wrapping_add(u64::from(number)));
            let writer = Writer::open(connect(url).await?, number, count, rng).await?;
            let pause = Duration::from_secs(1) * count / rate;
            let task = drive(writer, url.to_owned(), pause, counters.clone());
            traffic.writers.push(tokio::spawn(task));
        }
        Ok(traffic)
    }

    /// What was committed until now.
    #[must_use]
    pub fn progress(&self) -> TrafficReport {
        TrafficReport {
            transactions: self.counters.transactions.load(Ordering::Relaxed),
            changes: self.counters.changes.load(Ordering::Relaxed),
        }
    }

    /// Lets the transactions under way finish and returns what was committed.
    ///
    /// # Errors
    ///
    /// Fails when a writer met an error other than the loss of its connection.
    pub async fn stop(mut self) -> Result<TrafficReport, LabError> {
        self.counters.stop.store(true, Ordering::Relaxed);
        for writer in std::mem::take(&mut self.writers) {
            writer
                .await
                .map_err(|error| LabError::Unexpected(format!("traffic: {error}")))??;
        }
        Ok(self.progress())
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        for writer in &self.writers {
            writer.abort();
        }
    }
}

async fn drive(
    mut writer: Writer,
    url: String,
    pause: Duration,
    counters: Arc<Counters>,
) -> Result<(), LabError> {
    let mut ticks = tokio::time::interval(pause);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    loop {
        ticks.tick().await;
        if counters.stop.load(Ordering::Relaxed) {
            return Ok(());
        }
        match writer.transact().await {
            Ok(changes) => {
                counters.transactions.fetch_add(1, Ordering::Relaxed);
                counters.changes.fetch_add(changes, Ordering::Relaxed);
            }
            // Whether an interrupted commit happened is unknown: the writer reads its keys anew.
            Err(error) if connection_lost(&error) => {
                let Some(again) = reopen(writer, &url, &counters).await? else {
                    return Ok(());
                };
                writer = again;
                ticks.reset();
            }
            Err(error) => return Err(LabError::postgres("write the traffic")(error)),
        }
    }
}

/// `None` when the traffic was stopped meanwhile.
async fn reopen(
    writer: Writer,
    url: &str,
    counters: &Counters,
) -> Result<Option<Writer>, LabError> {
    let deadline = Instant::now() + RECONNECT_TIMEOUT;
    let (number, count, rng) = writer.into_parts();
    loop {
        if counters.stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let opened = match connect(url).await {
            Ok(client) => Writer::open(client, number, count, rng.clone()).await,
            Err(error) => Err(error),
        };
        match opened {
            Ok(writer) => return Ok(Some(writer)),
            Err(error) if Instant::now() >= deadline => return Err(error),
            Err(_) => tokio::time::sleep(RECONNECT_PAUSE).await,
        }
    }
}

/// Class 57 is the server's own stop; without a code the socket failed.
fn connection_lost(error: &tokio_postgres::Error) -> bool {
    error.is_closed()
        || error
            .code()
            .is_none_or(|code| code.code().starts_with("57P"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::postgres::{Postgres, PostgresOptions};
    use crate::shop;

    #[tokio::test]
    async fn traffic_reaches_every_table_and_survives_a_restart() {
        let mut cluster = Postgres::start(PostgresOptions::default()).await.unwrap();
        let client = cluster.connect("postgres").await.unwrap();
        shop::create(&client).await.unwrap();
        shop::fill_orders(&client, 1, 250, 100).await.unwrap();

        let traffic = Traffic::start(&cluster.url("postgres"), 7, 800)
            .await
            .unwrap();
        tokio::time::sleep(Duration::from_millis(800)).await;
        let before = traffic.progress().transactions;
        cluster.stop_fast().await.unwrap();
        cluster.start_again().await.unwrap();
        tokio::time::sleep(Duration::from_millis(800)).await;
        let report = traffic.stop().await.unwrap();
        assert!(
            before > 50 && report.transactions > before + 50,
            "{before} {report:?}"
        );
        assert!(report.changes > report.transactions, "{report:?}");

        let client = cluster.connect("postgres").await.unwrap();
        for table in shop::TABLES {
            let row = client
                .query_one(&format!("SELECT count(*) FROM {table}"), &[])
                .await
                .unwrap();
            assert!(row.get::<_, i64>(0) > 0, "{table} is empty");
        }
    }
}
