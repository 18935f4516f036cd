//! What `status` answers, for people and for machines.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use bytesize::ByteSize;
use comfy_table::{Table, presets};
use millrace_cdc::Captured;
use millrace_event::work::BackfillOrder;
use serde::Serialize;

use super::probe::SinkSeen;
use crate::admin::{Live, LivePart, lag_seconds};

/// A lag beyond this is one that `--check` finds, where heartbeats come often.
const LAG_MAX: Duration = Duration::from_secs(300);

/// Where they come seldom: beyond so many heartbeat intervals. The lag of a sink that has everything rises to one
/// interval, because only heartbeats are newer than an idle source's last change.
const LAG_HEARTBEATS_MAX: u32 = 2;

/// States that `--check` finds: what should be running does not do its work.
const WRONG: [&str; 6] = [
    "halted",
    "retrying",
    "parked",
    "unreachable",
    "stopped",
    "new",
];

/// Everything that can be seen.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    #[serde(flatten)]
    pub(super) overall: LivePart,
    /// Whether a process answered at the admin address.
    pub(super) running: bool,
    pub(super) source: SourceReport,
    pub(super) stream: StreamReport,
    pub(super) sinks: Vec<SinkReport>,
    pub(super) tables: Vec<TableReport>,
}

/// The source and its slot.
#[derive(Debug, Default, Serialize)]
pub(super) struct SourceReport {
    pub(super) name: String,
    /// The capture's state; where the source is out of reach, that.
    #[serde(flatten)]
    pub(super) part: LivePart,
    pub(super) reachable: bool,
    pub(super) version: Option<i32>,
    pub(super) database: Option<String>,
    pub(super) wal_lsn: Option<String>,
    pub(super) slot: Option<SlotReport>,
}

impl SourceReport {
    /// The same with the capture's state.
    pub(super) fn with(self, part: LivePart) -> Self {
        Self { part, ..self }
    }
}

/// The replication slot.
#[derive(Debug, Serialize)]
pub(super) struct SlotReport {
    pub(super) name: String,
    pub(super) active_pid: Option<i32>,
    pub(super) wal_status: Option<String>,
    pub(super) confirmed_lsn: String,
    pub(super) restart_lsn: Option<String>,
    /// From the confirmed LSN to the end of the WAL.
    pub(super) lag_bytes: u64,
    /// What the source keeps on its disk for the slot.
    pub(super) retained_bytes: u64,
}

/// The stream.
#[derive(Debug, Default, Serialize)]
pub(super) struct StreamReport {
    pub(super) name: String,
    #[serde(flatten)]
    pub(super) part: LivePart,
    pub(super) reachable: bool,
    pub(super) messages: Option<u64>,
    pub(super) bytes: Option<u64>,
    pub(super) max_bytes: Option<u64>,
    pub(super) first_seq: Option<u64>,
    pub(super) last_seq: Option<u64>,
    /// The newest message's position.
    pub(super) position: Option<String>,
    pub(super) end_lsn: Option<String>,
    /// Tables that were captured, as it is stored beside the stream; `None`: that could not be read.
    #[serde(skip)]
    pub(super) captured: Option<Vec<Captured>>,
    /// Backfills that are ordered, by sink, as they are stored beside the stream; a sink whose orders could not be
    /// read is missing.
    #[serde(skip)]
    pub(super) ordered: BTreeMap<String, Vec<BackfillOrder>>,
}

/// One sink.
#[derive(Debug, Serialize)]
pub(super) struct SinkReport {
    pub(super) name: String,
    #[serde(flatten)]
    pub(super) part: LivePart,
    pub(super) lag_seconds: Option<f64>,
    pub(super) position: Option<String>,
    pub(super) stream_seq: Option<u64>,
    /// Messages of the stream that it has not applied.
    pub(super) pending_messages: Option<u64>,
    pub(super) dead_letters: u64,
}

impl SinkReport {
    /// What its target shows, and its state by the process that answers, where it works for this sink.
    pub(super) fn new(
        name: &str,
        seen: &SinkSeen,
        live: Option<&Live>,
        last_seq: Option<u64>,
        clock_us: i64,
    ) -> Self {
        let live = live.and_then(|live| live.sinks.iter().find(|sink| sink.name == name));
        let row = seen.row.as_ref().map(|row| &row.checkpoint);
        let stream_seq = row.map(|row| row.stream_seq);
        Self {
            name: name.to_owned(),
            part: live.map_or_else(|| seen.part.clone(), |live| live.part.clone()),
            lag_seconds: row.map_or(live.and_then(|live| live.lag_seconds), |row| {
                lag_seconds(clock_us, row.source_ts_us)
            }),
            position: row.map(|row| row.position.to_string()),
            stream_seq,
            pending_messages: stream_seq
                .zip(last_seq)
                .map(|(at, last)| last.saturating_sub(at)),
            dead_letters: seen.dead_letters.values().sum(),
        }
    }
}

/// One table: the worst that any of its sinks shows.
#[derive(Debug, Serialize)]
pub(super) struct TableReport {
    pub(super) name: String,
    #[serde(flatten)]
    pub(super) part: LivePart,
    /// Whether its replicas are known to have every row: nothing is being copied, parked or set aside. What could
    /// not be looked at is not known.
    pub(super) complete: bool,
    pub(super) dead_letters: u64,
}

/// A lag beyond this is one that `--check` finds.
fn lag_max(heartbeat_interval: Duration) -> Duration {
    LAG_MAX.max(heartbeat_interval.saturating_mul(LAG_HEARTBEATS_MAX))
}

impl Report {
    /// What is wrong, a line each, with a source that writes a heartbeat at this interval.
    pub(super) fn findings(&self, heartbeat_interval: Duration) -> Vec<String> {
        let lag_max = lag_max(heartbeat_interval).as_secs_f64();
        let source = ("source".to_owned(), &self.source.part);
        let parts = [source, ("stream".to_owned(), &self.stream.part)].into_iter();
        let sinks = self
            .sinks
            .iter()
            .map(|sink| (format!("sink {}", sink.name), &sink.part));
        let tables = self
            .tables
            .iter()
            .map(|table| (format!("table {}", table.name), &table.part));
        let wrong = parts
            .chain(sinks)
            .chain(tables)
            .filter(|(_, part)| WRONG.contains(&part.state.as_str()));
        let mut findings: Vec<_> = wrong
            .map(|(name, part)| format!("{name}: {}", explained(part)))
            .collect();
        for sink in &self.sinks {
            if let Some(lag) = sink.lag_seconds.filter(|lag| *lag > lag_max) {
                findings.push(format!("sink {}: {} behind", sink.name, seconds(lag)));
            }
        }
        findings
    }

    /// For people.
    pub(super) fn render(&self) -> String {
        let mut text = format!("{}\n", explained(&self.overall));
        if let Some(remedy) = &self.overall.remedy {
            let _ = writeln!(text, "  do: {remedy}");
        }
        if !self.running {
            text.push_str(
                "  no process answers at the admin address: this is what the servers show\n",
            );
        }
        let _ = writeln!(
            text,
            "\n{}\n\n{}",
            trimmed(&self.parts()),
            trimmed(&self.tables())
        );
        text
    }

    fn parts(&self) -> Table {
        let mut table = Table::new();
        table
            .load_style(presets::NOTHING)
            .set_header(["PART", "STATE", "LAG", "POSITION", ""]);
        let source = &self.source;
        let bytes = |bytes: u64| ByteSize::b(bytes).to_string();
        let slot = source.slot.as_ref();
        table.add_row([
            format!("source {}", source.name),
            source.part.state.clone(),
            slot.map_or_else(dash, |slot| bytes(slot.lag_bytes)),
            slot.map_or_else(dash, |slot| slot.confirmed_lsn.clone()),
            match (&source.part.reason, slot) {
                (Some(reason), _) => reason.clone(),
                (None, Some(slot)) => format!(
                    "slot {} {}, keeps {}",
                    slot.name,
                    slot.active_pid
                        .map_or("inactive".to_owned(), |pid| format!("read by {pid}")),
                    bytes(slot.retained_bytes)
                ),
                (None, None) => "no slot".to_owned(),
            },
        ]);
        let stream = &self.stream;
        table.add_row([
            format!("stream {}", stream.name),
            stream.part.state.clone(),
            dash(),
            stream.position.clone().unwrap_or_else(dash),
            match (
                &stream.part.reason,
                stream.messages,
                stream.bytes,
                stream.max_bytes,
            ) {
                (None, Some(messages), Some(size), Some(max)) => {
                    format!("{messages} messages, {} of {}", bytes(size), bytes(max))
                }
                (reason, ..) => reason.clone().unwrap_or_default(),
            },
        ]);
        for sink in &self.sinks {
            let mut details: Vec<String> = sink.part.reason.iter().cloned().collect();
            details.extend(
                sink.pending_messages
                    .map(|pending| format!("{pending} pending")),
            );
            if sink.dead_letters > 0 {
                details.push(format!("{} open dead letters", sink.dead_letters));
            }
            table.add_row([
                format!("sink {}", sink.name),
                sink.part.state.clone(),
                sink.lag_seconds.map_or_else(dash, seconds),
                sink.position.clone().unwrap_or_else(dash),
                details.join(", "),
            ]);
        }
        table
    }

    fn tables(&self) -> Table {
        let mut table = Table::new();
        table
            .load_style(presets::NOTHING)
            .set_header(["TABLE", "STATE", ""]);
        for row in &self.tables {
            let reason = row.part.reason.clone().unwrap_or_default();
            table.add_row([row.name.clone(), row.part.state.clone(), reason]);
        }
        table
    }
}

/// A state in one line: `halted: E1104: the slot ..`.
fn explained(part: &LivePart) -> String {
    let parts = [Some(&part.state), part.code.as_ref(), part.reason.as_ref()];
    parts
        .into_iter()
        .flatten()
        .map(String::as_str)
        .collect::<Vec<_>>()
        .join(": ")
}

fn dash() -> String {
    "-".to_owned()
}

/// A lag as people read it: whole seconds from ten on, milliseconds below.
fn seconds(lag: f64) -> String {
    let step = if lag >= 10.0 { 1.0 } else { 0.001 };
    let rounded = Duration::try_from_secs_f64((lag / step).round() * step).unwrap_or(Duration::MAX);
    humantime::format_duration(Duration::from_millis(
        u64::try_from(rounded.as_millis()).unwrap_or(u64::MAX),
    ))
    .to_string()
}

/// A table without the blanks at its lines' ends.
pub(in crate::command) fn trimmed(table: &Table) -> String {
    table
        .lines()
        .map(|line| line.trim_end().to_owned())
        .collect::<Vec<_>>()
        .join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let sink = SinkReport {
            name: "wh".to_owned(),
            part: LivePart::of("streaming"),
            lag_seconds: Some(1.25),
            position: Some("00".to_owned()),
            stream_seq: Some(7),
            pending_messages: Some(0),
            dead_letters: 0,
        };
        let table = TableReport {
            name: "public.orders".to_owned(),
            part: LivePart::of("streaming"),
            complete: true,
            dead_letters: 0,
        };
        Report {
            overall: LivePart::of("streaming"),
            running: true,
            source: SourceReport {
                name: "shop".to_owned(),
                ..SourceReport::default()
            },
            stream: StreamReport {
                name: "CDC_shop".to_owned(),
                ..StreamReport::default()
            },
            sinks: vec![sink],
            tables: vec![table],
        }
    }

    #[test]
    fn the_json_has_the_names_that_others_rely_on() {
        let json = serde_json::to_value(report()).expect("json");
        assert_eq!(json["state"], "streaming");
        assert!(json["code"].is_null() && json["remedy"].is_null());
        assert_eq!(json["source"]["name"], "shop");
        assert_eq!(json["stream"]["name"], "CDC_shop");
        assert_eq!(json["sinks"][0]["name"], "wh");
        assert_eq!(json["sinks"][0]["lag_seconds"], 1.25);
        assert_eq!(json["sinks"][0]["position"], "00");
        assert_eq!(json["tables"][0]["name"], "public.orders");
        assert_eq!(json["tables"][0]["state"], "streaming");
    }

    #[test]
    fn a_check_finds_bad_states_and_long_lags() {
        let mut report = report();
        let often = Duration::from_secs(5);
        assert!(report.findings(often).is_empty());
        report.sinks[0].lag_seconds = Some(301.0);
        assert_eq!(report.findings(often), ["sink wh: 5m 1s behind"]);
        report.tables[0].part = LivePart::of("parked");
        assert_eq!(report.findings(often).len(), 2);
    }

    #[test]
    fn a_lag_that_comes_of_rare_heartbeats_is_no_finding() {
        let mut report = report();
        let rarely = Duration::from_secs(600);
        for (lag, found) in [(301.0, 0), (1_200.0, 0), (1_201.0, 1)] {
            report.sinks[0].lag_seconds = Some(lag);
            assert_eq!(report.findings(rarely).len(), found, "{lag}");
        }
    }

    #[test]
    fn lags_are_short() {
        assert_eq!(seconds(1.2504), "1s 250ms");
        assert_eq!(seconds(3_725.4), "1h 2m 5s");
        assert_eq!(seconds(0.0), "0s");
    }
}
