//! `millrace bench`: the measurements of the README. Throwaway servers, the contenders in turn in the
//! same run and in another order each round; every result is verified before it counts. The initial copy has a
//! verb of its own, `millrace bench-backfill`.

mod backfill;
mod contender;
mod latency;
mod machine;
mod report;
mod stage;
mod turn;
mod usage;
mod wal;

use std::fmt;
use std::path::Path;

use millrace_config::{Exit, chain};
use millrace_lab::LabError;
use serde::Serialize;

pub(crate) use self::backfill::run as run_backfill;
use self::contender::Contender;
use self::latency::Latency;
use self::machine::Machine;
use self::report::{Measured, Report};
use self::stage::Stage;
use self::turn::Turn;
use super::{answer, say};
use crate::arguments::BenchArguments;

/// Rows in a transaction of the bulk load.
const BULK_TRANSACTION_ROWS: u64 = 1_000;

const BULK: [Contender; 6] = [
    Contender::PgRecvlogical,
    Contender::Capture,
    Contender::CapturePacked,
    Contender::Native,
    Contender::Replica,
    Contender::ReplicaPacked,
];

const OLTP: [Contender; 3] = [
    Contender::Native,
    Contender::Replica,
    Contender::ReplicaPacked,
];

const LATENCY: [Contender; 2] = [Contender::Native, Contender::Replica];

/// Measures it.
pub(crate) async fn run(arguments: BenchArguments) -> Exit {
    if cfg!(debug_assertions) {
        say("warning: this is a debug build; its numbers mean nothing");
    }
    let report = Box::pin(perform(&arguments)).await;
    conclude(report, &arguments.output, |report| {
        !report.missed.is_empty()
    })
}

/// Prints and writes what was measured; `has_missed` tells whether a floor was missed.
fn conclude<R: Serialize + fmt::Display>(
    report: Result<R, LabError>,
    output: &Path,
    has_missed: impl Fn(&R) -> bool,
) -> Exit {
    let written = report.and_then(|report| {
        answer(&report.to_string());
        write(&report, output)?;
        Ok(has_missed(&report))
    });
    match written {
        Ok(false) => Exit::Ok,
        Ok(true) => Exit::Finding,
        Err(error) => {
            say(&format!("error: {}", chain(&error)));
            Exit::Environment
        }
    }
}

async fn perform(arguments: &BenchArguments) -> Result<Report, LabError> {
    let mut measured = Measured {
        rows: arguments.rows.max(1),
        transactions: arguments.transactions.max(1),
        bulk: Vec::new(),
        oltp: Vec::new(),
        latency: Vec::new(),
    };
    let machine = Machine::read(&Stage::start(&[], &[]).await?).await?;
    say(&machine.to_string());
    for round in 0..arguments.runs.max(1) {
        say(&format!("round {} of {}", round + 1, arguments.runs.max(1)));
        let turns = backlog(&BULK, measured.rows, BULK_TRANSACTION_ROWS, round).await?;
        measured.bulk.extend(turns);
        let turns = backlog(&OLTP, measured.transactions, 1, round).await?;
        measured.oltp.extend(turns);
        measured.latency.extend(latencies(round).await?);
    }
    Ok(Report::new(machine, measured))
}

/// One round: all contenders at the same backlog.
async fn backlog(
    contenders: &[Contender],
    rows: u64,
    per_transaction: u64,
    round: u32,
) -> Result<Vec<Turn>, LabError> {
    let stage = Stage::start(contenders, &[]).await?;
    say(&format!(
        "  loading {rows} rows, {per_transaction} a transaction"
    ));
    let backlog = stage.load(rows, per_transaction).await?;
    let mut turns = Vec::new();
    for contender in rotated(contenders, round) {
        let turn = turn::take(&stage, contender, &backlog).await?;
        say(&format!(
            "  {}: {:.0} rows/s, verified",
            contender.name(),
            turn.rows_per_second
        ));
        turns.push(turn);
    }
    Ok(turns)
}

async fn latencies(round: u32) -> Result<Vec<Latency>, LabError> {
    let stage = Stage::start(&LATENCY, &latency::SETTINGS).await?;
    let mut all = Vec::new();
    for (nth, contender) in (0..).zip(rotated(&LATENCY, round)) {
        let seen = latency::measure(&stage, contender, nth).await?;
        say(&format!(
            "  {}: commit -> visible p50 {:.1} ms, p99 {:.1} ms at {:.0} tx/s",
            contender.name(),
            seen.p50_ms,
            seen.p99_ms,
            seen.transactions_per_second
        ));
        all.push(seen);
    }
    Ok(all)
}

/// The contenders, another one first in each round.
fn rotated(contenders: &[Contender], round: u32) -> impl Iterator<Item = Contender> {
    let skip = round as usize % contenders.len();
    contenders
        .iter()
        .copied()
        .cycle()
        .skip(skip)
        .take(contenders.len())
}

fn write(report: &impl Serialize, path: &Path) -> Result<(), LabError> {
    let cannot = || LabError::io(format!("write {}", path.display()));
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).map_err(cannot())?;
    }
    let mut text = serde_json::to_vec_pretty(report)
        .map_err(|error| LabError::Unexpected(format!("the report has no JSON: {error}")))?;
    text.push(b'\n');
    std::fs::write(path, text).map_err(cannot())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_contender_is_first_once() {
        let first = |round| rotated(&BULK, round).next();
        let firsts: Vec<_> = (0..6).filter_map(first).collect();
        assert_eq!(firsts, BULK);
        assert_eq!(rotated(&BULK, 8).count(), BULK.len());
    }
}
