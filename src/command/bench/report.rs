//! What the measurements say: medians, ratios, and the floors they must hold.

use std::collections::BTreeMap;
use std::fmt;

use comfy_table::{Table, presets};
use serde::Serialize;

use super::contender::Contender;
use super::latency::{Latency, RATE};
use super::machine::Machine;
use super::turn::Turn;

/// A number that is promised: below `floor` the benchmark fails, `target` is what is aimed at.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Goal {
    key: &'static str,
    sense: Sense,
    floor: Option<f64>,
    target: Option<f64>,
}

/// Which way is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Sense {
    AtLeast,
    AtMost,
}

const fn goal(key: &'static str, sense: Sense, floor: Option<f64>, target: Option<f64>) -> Goal {
    Goal {
        key,
        sense,
        floor,
        target,
    }
}

const CAPTURE: Goal = goal(
    "capture_vs_recvlogical",
    Sense::AtLeast,
    Some(0.4),
    Some(0.6),
);
const CAPTURE_PACKED: Goal = goal(
    "capture_packed_vs_recvlogical",
    Sense::AtLeast,
    None,
    Some(1.0),
);
const REPLICA: Goal = goal("replica_vs_native", Sense::AtLeast, Some(0.4), Some(0.6));
const REPLICA_PACKED: Goal = goal("replica_packed_vs_native", Sense::AtLeast, None, Some(1.0));
const OLTP: Goal = goal("oltp_vs_native", Sense::AtLeast, Some(1.0), Some(2.0));
const OLTP_PACKED: Goal = goal("oltp_packed_vs_native", Sense::AtLeast, None, Some(2.0));
const P50: Goal = goal("latency_p50_ms", Sense::AtMost, None, Some(3.0));
const P99: Goal = goal("latency_p99_ms", Sense::AtMost, Some(50.0), Some(15.0));
const PEAK_RSS: Goal = goal("peak_rss_mib", Sense::AtMost, Some(64.0), Some(64.0));
const PEAK_RSS_PACKED: Goal = goal("peak_rss_packed_mib", Sense::AtMost, None, Some(64.0));

impl Goal {
    /// A ratio that is promised: `floor` is what is aimed at, too.
    pub(super) const fn ratio_at_least(key: &'static str, floor: f64) -> Self {
        goal(key, Sense::AtLeast, Some(floor), Some(floor))
    }

    /// The number's key in the output file.
    pub(super) fn key(&self) -> &'static str {
        self.key
    }

    pub(super) fn is_missed(&self, value: f64) -> bool {
        self.floor.is_some_and(|floor| match self.sense {
            Sense::AtLeast => value < floor,
            Sense::AtMost => value > floor,
        })
    }
}

/// All that was measured, as it is written to the output file.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// Every key of the issue and more: ratios, milliseconds, MiB.
    #[serde(flatten)]
    pub(super) numbers: BTreeMap<&'static str, f64>,
    pub(super) missed: Vec<&'static str>,
    pub(super) machine: Machine,
    pub(super) rows: u64,
    pub(super) transactions: u64,
    pub(super) goals: Vec<Goal>,
    /// Each contender's turn at the rows, in the order they were taken.
    pub(super) bulk: Vec<Turn>,
    /// The same at the single-row transactions.
    pub(super) oltp: Vec<Turn>,
    pub(super) latency: Vec<Latency>,
}

/// What was measured.
#[derive(Debug)]
pub(super) struct Measured {
    pub(super) rows: u64,
    pub(super) transactions: u64,
    pub(super) bulk: Vec<Turn>,
    pub(super) oltp: Vec<Turn>,
    pub(super) latency: Vec<Latency>,
}

impl Report {
    pub(super) fn new(machine: Machine, measured: Measured) -> Self {
        use Contender::{Capture, CapturePacked, Native, PgRecvlogical, Replica, ReplicaPacked};
        let Measured {
            rows,
            transactions,
            bulk,
            oltp,
            latency,
        } = measured;
        let ratio = |turns, one, other| Some(rate(turns, one)? / rate(turns, other)?);
        let millis = |contender, value: fn(&Latency) -> f64| {
            let of = latency.iter().filter(|seen| seen.contender == contender);
            median(of.map(value).collect())
        };
        let numbers = [
            (CAPTURE.key, ratio(&bulk, Capture, PgRecvlogical)),
            (
                CAPTURE_PACKED.key,
                ratio(&bulk, CapturePacked, PgRecvlogical),
            ),
            (REPLICA.key, ratio(&bulk, Replica, Native)),
            (REPLICA_PACKED.key, ratio(&bulk, ReplicaPacked, Native)),
            (OLTP.key, ratio(&oltp, Replica, Native)),
            (OLTP_PACKED.key, ratio(&oltp, ReplicaPacked, Native)),
            (P50.key, millis(Replica, |seen| seen.p50_ms)),
            (P99.key, millis(Replica, |seen| seen.p99_ms)),
            ("native_latency_p50_ms", millis(Native, |seen| seen.p50_ms)),
            ("native_latency_p99_ms", millis(Native, |seen| seen.p99_ms)),
            (PEAK_RSS.key, peak(&bulk, &[Capture, Replica])),
            (
                PEAK_RSS_PACKED.key,
                peak(&bulk, &[CapturePacked, ReplicaPacked]),
            ),
        ];
        let numbers: BTreeMap<_, _> = numbers
            .into_iter()
            .filter_map(|(key, value)| Some((key, rounded(value?))))
            .collect();
        let goals = vec![
            CAPTURE,
            CAPTURE_PACKED,
            REPLICA,
            REPLICA_PACKED,
            OLTP,
            OLTP_PACKED,
            P50,
            P99,
            PEAK_RSS,
            PEAK_RSS_PACKED,
        ];
        let missed = goals
            .iter()
            .filter(|goal| match numbers.get(goal.key) {
                Some(value) => goal.is_missed(*value),
                None => goal.floor.is_some(),
            })
            .map(|goal| goal.key)
            .collect();
        Self {
            numbers,
            missed,
            machine,
            rows,
            transactions,
            goals,
            bulk,
            oltp,
            latency,
        }
    }

    fn table(&self) -> Table {
        use Contender::{Capture, CapturePacked, Native, PgRecvlogical, Replica, ReplicaPacked};
        let mut table = table([
            "measured",
            "contender",
            "median",
            "ratio",
            "floor",
            "target",
        ]);
        let mut turns =
            |what: String, turns: &[Turn], unit, lines: &[(Contender, Option<Goal>)]| {
                let mut what = what;
                for (contender, goal) in lines {
                    let median = rate(turns, *contender).unwrap_or(0.0);
                    let median = format!("{median:.0} {unit}");
                    let ratio = goal.and_then(|goal| self.numbers.get(goal.key));
                    let ratio = ratio.map_or_else(String::new, |ratio| format!("{ratio:.2}"));
                    let [floor, target] = limits(*goal);
                    let what = std::mem::take(&mut what);
                    table.add_row([what, contender.label(), median, ratio, floor, target]);
                }
            };
        turns(
            format!("WAL -> JetStream, {} rows", self.rows),
            &self.bulk,
            "rows/s",
            &[
                (PgRecvlogical, None),
                (Capture, Some(CAPTURE)),
                (CapturePacked, Some(CAPTURE_PACKED)),
            ],
        );
        turns(
            format!("source -> replica, {} rows", self.rows),
            &self.bulk,
            "rows/s",
            &[
                (Native, None),
                (Replica, Some(REPLICA)),
                (ReplicaPacked, Some(REPLICA_PACKED)),
            ],
        );
        turns(
            format!("source -> replica, {} transactions", self.transactions),
            &self.oltp,
            "tx/s",
            &[
                (Native, None),
                (Replica, Some(OLTP)),
                (ReplicaPacked, Some(OLTP_PACKED)),
            ],
        );
        let mut number = |what: &str, contender: Contender, key, unit, goal: Option<Goal>| {
            let [floor, target] = limits(goal);
            let value = self
                .numbers
                .get(key)
                .map_or("unknown".to_owned(), |value| format!("{value:.1} {unit}"));
            let cells = [what, &contender.label(), &value, "", &floor, &target];
            table.add_row(cells);
        };
        let p50 = format!("commit -> visible at {RATE} tx/s, p50");
        number(&p50, Native, "native_latency_p50_ms", "ms", None);
        number("", Replica, P50.key, "ms", Some(P50));
        number("the same, p99", Native, "native_latency_p99_ms", "ms", None);
        number("", Replica, P99.key, "ms", Some(P99));
        number(
            "peak memory of the bulk loads",
            Replica,
            PEAK_RSS.key,
            "MiB",
            Some(PEAK_RSS),
        );
        let packed = PEAK_RSS_PACKED;
        number("", ReplicaPacked, packed.key, "MiB", Some(packed));
        table
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{}\n\n{}\n\n{}",
            self.table(),
            cpu_table(&[("rows", &self.bulk), ("transactions", &self.oltp)]),
            self.machine
        )?;
        writeln!(
            f,
            "All of it on one machine: servers, contenders, and for the latency the load. The start of a \
             process counts.\nfsync is off on both Postgres servers; the broker flushes as it does by default."
        )?;
        for key in &self.missed {
            writeln!(f, "missed its floor: {key}")?;
        }
        Ok(())
    }
}

/// Where the processor time went, for those who look for what is in the way.
pub(super) fn cpu_table(groups: &[(&str, &[Turn])]) -> Table {
    let columns = [
        "cpu seconds, median",
        "contender",
        "own process",
        "source",
        "nats",
        "target",
    ];
    let mut table = table(columns);
    for (what, turns) in groups {
        let mut contenders: Vec<Contender> = Vec::new();
        for turn in *turns {
            if !contenders.contains(&turn.contender) {
                contenders.push(turn.contender);
            }
        }
        contenders.sort_by_key(|contender| *contender as u8);
        for contender in contenders {
            let cell = |value: fn(&Turn) -> Option<f64>| {
                let of = turns.iter().filter(|turn| turn.contender == contender);
                let median = median(of.filter_map(value).collect());
                median.map_or_else(String::new, |seconds| format!("{seconds:.1}"))
            };
            table.add_row([
                (*what).to_owned(),
                contender.name().to_owned(),
                cell(|turn| Some(turn.process?.cpu_seconds)),
                cell(|turn| turn.servers_cpu_seconds.source),
                cell(|turn| turn.servers_cpu_seconds.nats),
                cell(|turn| turn.servers_cpu_seconds.target),
            ]);
        }
    }
    table
}

pub(super) fn table<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header);
    table
}

pub(super) fn limits(goal: Option<Goal>) -> [String; 2] {
    let text = |limit: Option<f64>| limit.map_or_else(String::new, |limit| limit.to_string());
    goal.map_or_else(Default::default, |goal| {
        [text(goal.floor), text(goal.target)]
    })
}

/// The median of a contender's rates.
pub(super) fn rate(turns: &[Turn], contender: Contender) -> Option<f64> {
    let of = turns.iter().filter(|turn| turn.contender == contender);
    median(of.map(|turn| turn.rows_per_second).collect())
}

/// The most memory that a process of these ever had, in MiB.
pub(super) fn peak(turns: &[Turn], contenders: &[Contender]) -> Option<f64> {
    let of = turns
        .iter()
        .filter(|turn| contenders.contains(&turn.contender));
    of.filter_map(|turn| Some(turn.process?.peak_rss_mib))
        .max_by(f64::total_cmp)
}

/// The middle value; of an even number of values the mean of the middle two.
fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let upper = values.len() / 2;
    match values.len() % 2 {
        1 => Some(values[upper]),
        _ => Some((values.get(upper.checked_sub(1)?)? + values[upper]) / 2.0),
    }
}

/// To three digits behind the point.
pub(super) fn rounded(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0]), Some(3.0));
        assert_eq!(median(vec![9.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 9.0]), Some(3.0));
    }

    #[test]
    fn a_floor_is_held_by_a_value_that_equals_it() {
        assert!(!CAPTURE.is_missed(0.4) && CAPTURE.is_missed(0.399));
        assert!(!P99.is_missed(50.0) && P99.is_missed(50.001));
        assert!(!P50.is_missed(1e9), "it has a target only");
    }
}
