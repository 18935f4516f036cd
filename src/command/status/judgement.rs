//! What the parts add up to. Pure.

use std::collections::BTreeMap;

use millrace_cdc::Captured;
use millrace_config::{Code, Condition, Config, Table};
use millrace_sink::progress::CopyState;

use super::probe::SinkSeen;
use super::publication::Missing;
use super::report::{SinkReport, SourceReport, StreamReport, TableReport};
use crate::admin::{Live, LivePart};

/// Why nothing shows a table's rows to be missing, and it is not called complete all the same.
const UNSEEN: &str =
    "whether rows are missing is not known: what is stored beside the stream cannot be read";

const REBUILD: &str = "run `millrace drop`, then `millrace run`: the tables are copied again";

/// From the best state to the worst.
const SEVERITY: [&str; 12] = [
    "available",
    "streaming",
    "standby",
    "snapshotting",
    "new",
    "stopped",
    "starting",
    "paused",
    "parked",
    "retrying",
    "unreachable",
    "halted",
];

/// How bad a part stands. Of two in the same state the one with a code is worse: its operator has something to do.
fn severity(part: &LivePart) -> (Option<usize>, bool) {
    let state = SEVERITY.iter().position(|state| *state == part.state);
    (state, part.code.is_some())
}

/// The capture's state: by the process that answers, else as the servers show it.
pub(super) fn capture(
    live: Option<&Live>,
    source: &SourceReport,
    stream: &StreamReport,
) -> LivePart {
    if let Some(part) = live.and_then(|live| live.source.capture.clone()) {
        return part;
    }
    if !source.part.state.is_empty() {
        return source.part.clone();
    }
    let gap = |code: Code, message: &str| {
        LivePart::because("halted", &Condition::new(code, message, REBUILD))
    };
    let stream_ever = stream.last_seq.is_some_and(|last| last > 0);
    match &source.slot {
        Some(slot) if slot.active_pid.is_some() => LivePart::of("streaming"),
        Some(_) if stream.reachable && stream.last_seq.is_none() => gap(
            Code::StreamMissing,
            "the slot exists, but its stream does not",
        ),
        Some(_) => LivePart::of("stopped"),
        None if stream_ever => gap(
            Code::SlotMissing,
            "the stream exists, but its slot does not",
        ),
        None => LivePart::of("new"),
    }
}

/// The state of the whole: by the process that answers, else the worst of the parts.
pub(super) fn overall(
    live: Option<&Live>,
    capture: &LivePart,
    stream: &LivePart,
    sinks: &[SinkReport],
) -> LivePart {
    if let Some(live) = live {
        return live.overall.clone();
    }
    let parts = sinks.iter().map(|sink| &sink.part);
    parts
        .chain([stream, capture])
        .max_by_key(|part| severity(part))
        .cloned()
        .unwrap_or_default()
}

/// Each table as the worst of its sinks shows it.
pub(super) fn tables(
    config: &Config,
    live: Option<&Live>,
    seen: &BTreeMap<&str, &SinkSeen>,
    sinks: &[SinkReport],
    stream: &StreamReport,
    capture: &LivePart,
) -> Vec<TableReport> {
    let table = |table: &Table| {
        let relation = table.target.to_string();
        let mut report = TableReport {
            name: table.name.to_string(),
            part: LivePart::default(),
            complete: true,
            dead_letters: 0,
        };
        let mut seen_all = stream.captured.is_some();
        for sink in sinks.iter().filter(|sink| table.sinks.contains(&sink.name)) {
            let seen = seen.get(sink.name.as_str());
            let letters = seen
                .and_then(|seen| seen.dead_letters.get(&relation))
                .copied()
                .unwrap_or(0);
            let row = seen.and_then(|seen| seen.row.as_ref());
            let copied = row.is_some_and(|row| {
                matches!(
                    row.copy.tables.get(&table.name),
                    Some(CopyState::Copied { .. })
                )
            });
            let part = table_part(&report.name, sink, live, copied, letters);
            // An order that nobody has begun: rows are known to be missing or wrong, or may be.
            let orders = stream.ordered.get(&sink.name);
            seen_all &= orders.is_some();
            let due = orders.into_iter().flatten().any(|order| {
                let finished = row.is_some_and(|row| row.copy.finished.contains(&order.id));
                order.table == table.name && !order.cancelled && !finished
            });
            report.complete &= copied && !due && letters == 0 && part.state != "parked";
            report.dead_letters += letters;
            if report.part.state.is_empty() || severity(&part) > severity(&report.part) {
                report.part = part;
            }
        }
        let mut known = stream.captured.iter().flatten();
        if known.any(|known| known.parked && known.table == table.name) {
            report.complete = false;
            if report.part.state != "parked" {
                let message = "changes of it were not captured";
                let remedy = "do what the log of capture says; it is then read again by itself";
                let condition = Condition::new(Code::PublicationDrift, message, remedy);
                report.part = LivePart::because("parked", &condition);
            }
            return report;
        }
        if table.sinks.is_empty() {
            let parked = captured(&report.name, live);
            report.complete = parked.is_none();
            report.part = parked.unwrap_or(capture).clone();
        }
        if report.complete && !seen_all {
            report.complete = false;
            report.part.reason.get_or_insert_with(|| UNSEEN.to_owned());
        }
        report
    };
    config.tables.iter().map(table).collect()
}

/// The same tables, with what keeps them from being captured where no capture tells it; or why that is not known.
pub(super) fn without_missing(
    mut tables: Vec<TableReport>,
    captured: Option<&[Captured]>,
    missing: Result<Missing, Condition>,
) -> Vec<TableReport> {
    let missing = match missing {
        Ok(missing) => missing,
        Err(unread) => {
            for table in &mut tables {
                table.complete = false;
                let reason = format!("the publication cannot be looked at: {unread}");
                table.part.reason.get_or_insert(reason);
            }
            return tables;
        }
    };
    for (name, condition) in missing {
        let was_captured = captured
            .into_iter()
            .flatten()
            .any(|known| known.table == name);
        let name = name.to_string();
        let Some(table) = tables.iter_mut().find(|table| table.name == name) else {
            continue;
        };
        table.complete = false;
        let state = match was_captured {
            true => "parked",
            false => table.part.state.as_str(),
        };
        table.part = LivePart::because(state, &condition);
    }
    tables
}

/// What the capture says of a table that it has parked.
fn captured<'l>(name: &str, live: Option<&'l Live>) -> Option<&'l LivePart> {
    let mut tables = live.into_iter().flat_map(|live| &live.tables);
    let found = tables.find(|table| table.name == name && table.sink.is_none());
    found.map(|table| &table.part)
}

fn table_part(
    name: &str,
    sink: &SinkReport,
    live: Option<&Live>,
    copied: bool,
    dead_letters: u64,
) -> LivePart {
    if let Some(part) = captured(name, live) {
        return part.clone();
    }
    let mut tables = live.iter().flat_map(|live| &live.tables);
    if let Some(table) =
        tables.find(|table| table.name == name && table.sink.as_ref() == Some(&sink.name))
    {
        return table.part.clone();
    }
    let runs = matches!(sink.part.state.as_str(), "streaming" | "snapshotting");
    let state = match (runs, copied) {
        (true, true) => "streaming",
        (true, false) => "snapshotting",
        (false, _) => sink.part.state.as_str(),
    };
    let mut part = LivePart::of(state);
    if dead_letters > 0 {
        part.reason = Some(format!(
            "{dead_letters} open dead letters in sink {}",
            sink.name
        ));
    } else if !copied && state != "unreachable" {
        part.reason = Some(format!("not yet copied to sink {}", sink.name));
    }
    part
}

#[cfg(test)]
mod tests {
    use millrace_event::{Lsn, TableName};
    use millrace_sink::batch::PositionRow;

    use super::super::report::SlotReport;
    use super::*;

    fn source(active_pid: Option<i32>) -> SourceReport {
        let slot = SlotReport {
            name: "millrace_shop".to_owned(),
            active_pid,
            wal_status: Some("reserved".to_owned()),
            confirmed_lsn: "0/1".to_owned(),
            restart_lsn: None,
            lag_bytes: 0,
            retained_bytes: 0,
        };
        SourceReport {
            reachable: true,
            slot: Some(slot),
            ..SourceReport::default()
        }
    }

    fn stream(last_seq: Option<u64>) -> StreamReport {
        StreamReport {
            reachable: true,
            last_seq,
            ..StreamReport::default()
        }
    }

    #[test]
    fn without_a_process_the_servers_tell_what_a_start_would_find() {
        let state = |source: &SourceReport, last_seq| {
            let part = capture(None, source, &stream(last_seq));
            (part.state, part.code.unwrap_or_default())
        };
        let is = |state: &str, code: &str| (state.to_owned(), code.to_owned());
        let none = SourceReport {
            reachable: true,
            ..SourceReport::default()
        };
        assert_eq!(state(&source(Some(7)), Some(3)), is("streaming", ""));
        assert_eq!(state(&source(None), Some(3)), is("stopped", ""));
        assert_eq!(state(&source(None), None), is("halted", "E1202"));
        assert_eq!(state(&none, Some(3)), is("halted", "E1102"));
        assert_eq!(state(&none, Some(0)), is("new", ""));
        assert_eq!(state(&none, None), is("new", ""));
        let unreachable = StreamReport::default();
        assert_eq!(capture(None, &source(None), &unreachable).state, "stopped");
        let away = SourceReport {
            part: LivePart::of("unreachable"),
            ..SourceReport::default()
        };
        assert_eq!(state(&away, Some(3)), is("unreachable", ""));
    }

    #[test]
    fn a_process_knows_better() {
        let board = crate::admin::Board::new("shop", true, ["wh".to_owned()]);
        let live = board.live(0);
        assert_eq!(
            capture(Some(&live), &source(None), &stream(None)).state,
            "starting"
        );
        let (halted, available) = (LivePart::of("halted"), LivePart::of("available"));
        assert_eq!(
            overall(Some(&live), &halted, &available, &[]).state,
            "starting"
        );
        assert_eq!(overall(None, &halted, &available, &[]).state, "halted");
    }

    #[test]
    fn a_stream_that_is_out_of_reach_is_worse_than_no_process() {
        let (stopped, away) = (LivePart::of("stopped"), LivePart::of("unreachable"));
        assert_eq!(overall(None, &stopped, &away, &[]).state, "unreachable");
        let streaming = LivePart::of("streaming");
        let there = LivePart::of("available");
        assert_eq!(overall(None, &stopped, &there, &[]).state, "stopped");
        assert_eq!(overall(None, &streaming, &there, &[]).state, "streaming");
    }

    /// A configuration of one table and one sink, and a sink whose target has every row of it.
    fn copied() -> (Config, SinkSeen) {
        let folder = tempfile::tempdir().expect("made");
        let dir = folder.path();
        let text = "[source]\nname = \"shop\"\nurl = \"postgres://s/d\"\n[stream]\nservers = [\"nats://n\"]\n\
                    [sinks.wh]\ntype = \"postgres\"\nurl = \"postgres://t/d\"\n";
        std::fs::create_dir_all(dir.join("tables")).expect("made");
        std::fs::write(dir.join("millrace.toml"), text).expect("written");
        std::fs::write(dir.join("tables/public.a.toml"), "").expect("written");
        let config = Config::load(dir, &|_| None).expect("valid");
        let mut row = PositionRow::default();
        let state = CopyState::Copied { lsn: Lsn(1) };
        row.copy.tables.insert(TableName::new("public", "a"), state);
        let seen = SinkSeen {
            part: LivePart::of("streaming"),
            row: Some(row),
            dead_letters: BTreeMap::new(),
        };
        (config, seen)
    }

    #[test]
    fn what_could_not_be_looked_at_is_not_called_complete() {
        let (config, seen) = copied();
        let table = |stream: &StreamReport| {
            let sink = SinkReport::new("wh", &seen, None, None, 0);
            let seen = BTreeMap::from([("wh", &seen)]);
            let capture = LivePart::of("streaming");
            tables(&config, None, &seen, &[sink], stream, &capture).remove(0)
        };
        let all = StreamReport {
            captured: Some(Vec::new()),
            ordered: BTreeMap::from([("wh".to_owned(), Vec::new())]),
            ..stream(Some(1))
        };
        let whole = table(&all);
        assert!(whole.complete && whole.part.reason.is_none());
        let uncaptured = StreamReport {
            captured: None,
            ordered: all.ordered.clone(),
            ..stream(Some(1))
        };
        let ordered = StreamReport {
            captured: Some(Vec::new()),
            ..stream(Some(1))
        };
        for unseen in [uncaptured, ordered, StreamReport::default()] {
            let table = table(&unseen);
            assert!(!table.complete, "{unseen:?}");
            assert_eq!(table.part.state, "streaming");
            assert_eq!(table.part.reason.as_deref(), Some(UNSEEN));
        }
    }

    #[test]
    fn what_one_sink_tells_of_a_table_is_not_hidden_by_another_in_the_same_state() {
        let (mut config, seen) = copied();
        let sinks = ["a", "wh"].map(|name| SinkReport::new(name, &seen, None, None, 0));
        config.tables[0].sinks = vec!["a".to_owned(), "wh".to_owned()];
        let seen = BTreeMap::from([("a", &seen), ("wh", &seen)]);
        for tells in ["a", "wh"] {
            let mut live = crate::admin::Board::new("shop", true, []).live(0);
            live.tables = serde_json::from_value(serde_json::json!([{
                "name": "public.a", "sink": tells, "state": "streaming", "code": "E1318",
            }]))
            .expect("a table");
            let capture = LivePart::of("streaming");
            let stream = stream(Some(1));
            let tables = tables(&config, Some(&live), &seen, &sinks, &stream, &capture);
            assert_eq!(tables[0].part.code.as_deref(), Some("E1318"), "{tells}");
        }
    }
}
