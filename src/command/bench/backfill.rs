//! `millrace bench-backfill`: the initial copy against that of native logical replication, in one run.

use std::fmt;

use millrace_config::Exit;
use millrace_lab::LabError;
use serde::Serialize;

use super::contender::Contender;
use super::machine::Machine;
use super::report::{Goal, cpu_table, limits, peak, rate, rounded, table};
use super::stage::Stage;
use super::turn::{self, Turn};
use super::{BULK_TRANSACTION_ROWS, conclude, rotated, say};
use crate::arguments::BenchBackfillArguments;

const CONTENDERS: [Contender; 2] = [Contender::NativeSync, Contender::Load];

const RATIO: Goal = Goal::ratio_at_least("ratio_vs_native", 1.0);

/// What was measured, as it is written to the output file.
#[derive(Debug, Serialize)]
struct Report {
    /// Our rate in native rates, both medians.
    ratio_vs_native: f64,
    native_rows_per_second: f64,
    millrace_rows_per_second: f64,
    /// The most memory that one of our processes had, in MiB.
    peak_rss_mib: Option<f64>,
    machine: Machine,
    rows: u64,
    goals: [Goal; 1],
    /// The turns in the order they were taken.
    turns: Vec<Turn>,
}

/// Measures it.
pub(crate) async fn run(arguments: BenchBackfillArguments) -> Exit {
    if cfg!(debug_assertions) {
        say("warning: this is a debug build; its numbers mean nothing");
    }
    let report = Box::pin(perform(&arguments)).await;
    conclude(report, &arguments.output, |report| {
        RATIO.is_missed(report.ratio_vs_native)
    })
}

async fn perform(arguments: &BenchBackfillArguments) -> Result<Report, LabError> {
    let rows = arguments.rows.max(1);
    let runs = arguments.runs.max(1);
    let machine = Machine::read(&Stage::start(&[], &[]).await?).await?;
    say(&machine.to_string());
    let mut turns = Vec::new();
    for round in 0..runs {
        say(&format!("round {} of {runs}", round + 1));
        turns.extend(copies(rows, round).await?);
    }
    Ok(Report::new(machine, rows, turns))
}

/// One round: both contenders copy the same table.
async fn copies(rows: u64, round: u32) -> Result<Vec<Turn>, LabError> {
    let stage = Stage::start(&CONTENDERS, &[]).await?;
    say(&format!("  loading {rows} rows"));
    let backlog = stage.load(rows, BULK_TRANSACTION_ROWS).await?;
    stage.rest().await?;
    let mut turns = Vec::new();
    for contender in rotated(&CONTENDERS, round) {
        let turn = turn::take(&stage, contender, &backlog).await?;
        say(&format!(
            "  {}: {:.0} rows/s, verified",
            contender.label(),
            turn.rows_per_second
        ));
        turns.push(turn);
    }
    Ok(turns)
}

impl Report {
    fn new(machine: Machine, rows: u64, turns: Vec<Turn>) -> Self {
        let median = |contender| rate(&turns, contender).unwrap_or(0.0);
        let (native, ours) = (median(Contender::NativeSync), median(Contender::Load));
        Self {
            ratio_vs_native: rounded(ours / native),
            native_rows_per_second: rounded(native),
            millrace_rows_per_second: rounded(ours),
            peak_rss_mib: peak(&turns, &[Contender::Load]).map(rounded),
            machine,
            rows,
            goals: [RATIO],
            turns,
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rates = table([
            "measured",
            "contender",
            "median",
            "ratio",
            "floor",
            "target",
        ]);
        let what = format!("initial copy, {} rows", self.rows);
        let native = format!("{:.0} rows/s", self.native_rows_per_second);
        let ours = format!("{:.0} rows/s", self.millrace_rows_per_second);
        let ratio = format!("{:.2}", self.ratio_vs_native);
        let [floor, target] = limits(Some(RATIO));
        let label = Contender::NativeSync.label();
        rates.add_row([&what, &label, &native, "", "", ""]);
        let label = Contender::Load.label();
        rates.add_row(["", &label, &ours, &ratio, &floor, &target]);
        if let Some(peak) = self.peak_rss_mib {
            let peak = format!("{peak:.1} MiB");
            rates.add_row(["peak memory", &label, &peak, "", "", ""]);
        }
        writeln!(
            f,
            "{rates}\n\n{}\n\n{}",
            cpu_table(&[("rows", &self.turns)]),
            self.machine
        )?;
        writeln!(
            f,
            "All of it on one machine. Native: from CREATE SUBSCRIPTION until its table is in sync. Millrace: the \
             whole process, from its\nstart with empty servers to its end with the table complete. fsync is off \
             on both Postgres servers."
        )?;
        if RATIO.is_missed(self.ratio_vs_native) {
            writeln!(f, "missed its floor: {}", RATIO.key())?;
        }
        Ok(())
    }
}
