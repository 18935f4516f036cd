//! What the parts of a running process say about themselves.
//!
//! Nothing here is on the path of a row: parts write when their state changes and after a commit at most.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use millrace_config::limits::SHUTDOWN_DEADLINE;
use millrace_config::{Condition, State};
use millrace_event::{Position, TableName};

use super::live::{Live, LivePart, LiveSink, LiveSource, LiveTable, lag_seconds};

/// How long nothing may be written before the process counts as stuck; longer than a drain may take.
const SILENCE_MAX: Duration = Duration::from_secs(30);

const _: () = assert!(SILENCE_MAX.as_secs() > SHUTDOWN_DEADLINE.as_secs());

/// The states of all parts of the process, shared between them and the endpoint.
#[derive(Debug)]
pub(crate) struct Board {
    source: String,
    parts: Mutex<Parts>,
}

#[derive(Debug)]
struct Parts {
    capture: Option<Part>,
    /// Tables that the capture has parked, for every sink.
    parked: BTreeMap<TableName, Part>,
    sinks: BTreeMap<String, SinkPart>,
    /// When any part was last written.
    written: Instant,
}

/// A part and, where it is halted or parked, why.
#[derive(Clone, Debug)]
struct Part {
    state: State,
    condition: Option<Condition>,
}

#[derive(Debug)]
struct SinkPart {
    part: Part,
    tables: BTreeMap<TableName, Part>,
    watermark: Option<Watermark>,
}

/// Up to where a sink has everything.
#[derive(Clone, Copy, Debug)]
struct Watermark {
    position: Position,
    source_ts_us: i64,
}

impl Part {
    fn new(state: State) -> Self {
        Self {
            state,
            condition: None,
        }
    }

    fn live(&self) -> LivePart {
        let reason = match &self.state {
            State::Retrying(reason) | State::Paused(reason) => Some(reason.clone()),
            _ => None,
        };
        let condition = self.condition.as_ref();
        let code = match &self.state {
            State::Halted(code) => Some(*code),
            _ => condition.map(|condition| condition.code),
        };
        LivePart {
            state: self.state.name().to_owned(),
            reason: condition
                .map(|condition| condition.message.clone())
                .or(reason),
            code: code.map(|code| code.to_string()),
            remedy: condition.map(|condition| condition.remedy.clone()),
        }
    }
}

impl Board {
    /// A board whose parts are all starting: the capture if this process has one, and these sinks.
    pub(crate) fn new(
        source: impl Into<String>,
        capture: bool,
        sinks: impl IntoIterator<Item = String>,
    ) -> Self {
        let starting = || Part::new(State::Starting);
        let sink = |name| {
            (
                name,
                SinkPart {
                    part: starting(),
                    tables: BTreeMap::new(),
                    watermark: None,
                },
            )
        };
        let parts = Parts {
            capture: capture.then(starting),
            parked: BTreeMap::new(),
            sinks: sinks.into_iter().map(sink).collect(),
            written: Instant::now(),
        };
        Self {
            source: source.into(),
            parts: Mutex::new(parts),
        }
    }

    fn parts(&self) -> MutexGuard<'_, Parts> {
        // Each write is complete in itself: a panic elsewhere leaves nothing half done.
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The capture's state.
    pub(crate) fn set_capture(&self, state: State) {
        self.update_capture(Part::new(state));
    }

    /// The capture's state, and what an operator is told of it or of what fails beside it.
    pub(crate) fn set_capture_with(&self, state: State, condition: Condition) {
        self.update_capture(Part {
            state,
            condition: Some(condition),
        });
    }

    /// The capture met a condition that an operator must resolve.
    pub(crate) fn halt_capture(&self, condition: Condition) {
        self.update_capture(halted(condition));
    }

    /// A sink's state.
    pub(crate) fn set_sink(&self, name: &str, state: State) {
        self.update_sink(name, |sink| sink.part = Part::new(state));
    }

    /// A sink's state, and what an operator is told of it.
    pub(crate) fn set_sink_with(&self, name: &str, state: State, condition: Condition) {
        self.update_sink(name, |sink| {
            sink.part = Part {
                state,
                condition: Some(condition),
            };
        });
    }

    /// A sink met a condition that an operator must resolve.
    pub(crate) fn halt_sink(&self, name: &str, condition: Condition) {
        self.update_sink(name, |sink| sink.part = halted(condition));
    }

    /// One table of a sink cannot go on; the others do.
    pub(crate) fn park_table(&self, sink: &str, table: &TableName, condition: Condition) {
        let part = Part {
            state: State::Parked(table.clone()),
            condition: Some(condition),
        };
        self.update_sink(sink, |sink| drop(sink.tables.insert(table.clone(), part)));
    }

    /// One table of a sink flows on, and there is something that an operator is told of it.
    pub(crate) fn tell_table(&self, sink: &str, table: &TableName, condition: Condition) {
        let part = Part {
            state: State::Streaming,
            condition: Some(condition),
        };
        self.update_sink(sink, |sink| drop(sink.tables.insert(table.clone(), part)));
    }

    /// The tables that the capture cannot go on with; the others flow.
    pub(crate) fn park_captured(&self, tables: Vec<(TableName, Condition)>) {
        let part = |(table, condition): (TableName, Condition)| {
            let part = Part {
                state: State::Parked(table.clone()),
                condition: Some(condition),
            };
            (table, part)
        };
        self.parts().parked = tables.into_iter().map(part).collect();
    }

    /// Only these sinks are left, with these tables each.
    pub(crate) fn keep_only(&self, sinks: &[(String, Vec<TableName>)]) {
        let mut parts = self.parts();
        parts.sinks.retain(|name, sink| {
            let kept = sinks.iter().find(|(kept, _)| kept == name);
            if let Some((_, tables)) = kept {
                sink.tables.retain(|table, _| tables.contains(table));
            }
            kept.is_some()
        });
    }

    /// What one table of a sink needs fails for now, and is tried again.
    pub(crate) fn retry_table(&self, sink: &str, table: &TableName, condition: Condition) {
        let part = Part {
            state: State::Retrying(condition.message.clone()),
            condition: Some(condition),
        };
        self.update_sink(sink, |sink| drop(sink.tables.insert(table.clone(), part)));
    }

    /// One table of a sink has a state of its own, such as [`State::Snapshotting`]; `None`: that of its sink.
    pub(crate) fn set_table(&self, sink: &str, table: &TableName, state: Option<State>) {
        self.update_sink(sink, |sink| match state {
            Some(state) => drop(sink.tables.insert(table.clone(), Part::new(state))),
            None => drop(sink.tables.remove(table)),
        });
    }

    /// A sink has committed everything up to here, which the source committed or wrote at `source_ts_us`
    /// (microseconds since 1970).
    pub(crate) fn set_watermark(&self, sink: &str, position: Position, source_ts_us: i64) {
        let watermark = Watermark {
            position,
            source_ts_us,
        };
        self.update_sink(sink, |sink| sink.watermark = Some(watermark));
    }

    /// Whether whoever keeps the board still does: it is written to many times a second.
    pub(crate) fn is_live(&self) -> bool {
        self.parts().written.elapsed() < SILENCE_MAX
    }

    /// The state of the whole: the worst of its parts. A parked table is no state of the whole.
    pub(crate) fn state(&self) -> State {
        self.parts().overall().state
    }

    /// Whether the process does what it is for: changes flow, are copied, or another process sees to it.
    pub(crate) fn is_ready(&self) -> bool {
        matches!(
            self.state(),
            State::Streaming | State::Standby | State::Snapshotting
        )
    }

    /// For each sink that has committed anything: how long ago the source wrote what it has, in seconds of the
    /// clock that `now_us` was read from. Goes on rising while the sink is stuck.
    pub(crate) fn lags(&self, now_us: i64) -> Vec<(String, f64)> {
        let live = self.live(now_us);
        live.sinks
            .into_iter()
            .filter_map(|sink| Some((sink.name, sink.lag_seconds?)))
            .collect()
    }

    /// Everything, for `GET /status`.
    pub(crate) fn live(&self, now_us: i64) -> Live {
        let parts = self.parts();
        let sinks = parts.sinks.iter().map(|(name, sink)| LiveSink {
            name: name.clone(),
            part: sink.part.live(),
            lag_seconds: sink
                .watermark
                .and_then(|at| lag_seconds(now_us, at.source_ts_us)),
            position: sink.watermark.map(|at| at.position.to_string()),
        });
        let tables = parts.sinks.iter().flat_map(|(sink, part)| {
            part.tables.iter().map(|(name, part)| LiveTable {
                name: name.to_string(),
                sink: Some(sink.clone()),
                part: part.live(),
            })
        });
        let parked = parts.parked.iter().map(|(name, part)| LiveTable {
            name: name.to_string(),
            sink: None,
            part: part.live(),
        });
        let capture = parts.capture.as_ref().map(Part::live);
        Live {
            overall: parts.overall().live(),
            version: crate::arguments::VERSION.clone(),
            source: LiveSource {
                name: self.source.clone(),
                capture,
            },
            sinks: sinks.collect(),
            tables: parked.chain(tables).collect(),
        }
    }

    fn update_capture(&self, part: Part) {
        let mut parts = self.parts();
        parts.capture = Some(part);
        parts.written = Instant::now();
    }

    fn update_sink(&self, name: &str, update: impl FnOnce(&mut SinkPart)) {
        let mut parts = self.parts();
        parts.written = Instant::now();
        let sink = parts
            .sinks
            .entry(name.to_owned())
            .or_insert_with(|| SinkPart {
                part: Part::new(State::Starting),
                tables: BTreeMap::new(),
                watermark: None,
            });
        update(sink);
    }
}

impl Parts {
    fn overall(&self) -> Part {
        let parts = self
            .capture
            .iter()
            .chain(self.sinks.values().map(|sink| &sink.part));
        // Of several as bad, the one that tells a remedy, then capture: what a sink waits for is told there.
        let says = |part: &Part| (severity(&part.state), part.condition.is_some());
        let worst = parts.rev().max_by_key(|part| says(part));
        worst.cloned().unwrap_or(Part::new(State::Starting))
    }
}

fn halted(condition: Condition) -> Part {
    Part {
        state: State::Halted(condition.code),
        condition: Some(condition),
    }
}

/// How much a part's state says about the whole.
fn severity(state: &State) -> u8 {
    match state {
        State::Streaming => 0,
        State::Standby => 1,
        State::Snapshotting => 2,
        State::Parked(_) => 3,
        State::Starting => 4,
        State::Paused(_) => 5,
        State::Retrying(_) => 6,
        State::Halted(_) => 7,
    }
}

#[cfg(test)]
mod tests {
    use millrace_config::Code;
    use millrace_event::Lsn;

    use super::*;

    fn board() -> Board {
        Board::new("shop", true, ["a".to_owned(), "b".to_owned()])
    }

    #[test]
    fn the_whole_is_as_its_worst_part() {
        let board = board();
        assert_eq!(board.state(), State::Starting);
        board.set_capture(State::Streaming);
        board.set_sink("a", State::Streaming);
        assert!(!board.is_ready());
        board.set_sink("b", State::Snapshotting);
        assert!(board.is_ready());
        board.set_sink("b", State::Streaming);
        assert_eq!(board.state(), State::Streaming);
        board.set_sink("a", State::Retrying("no route".to_owned()));
        assert_eq!(board.live(0).overall.reason.as_deref(), Some("no route"));
        board.halt_capture(Condition::new(Code::SlotLost, "gone", "drop"));
        let live = board.live(0);
        assert_eq!(
            (live.overall.state.as_str(), live.overall.code.as_deref()),
            ("halted", Some("E1104"))
        );
        assert_eq!(live.overall.remedy.as_deref(), Some("drop"));
        assert!(!board.is_ready());
        board.set_capture(State::Standby);
        board.set_sink("a", State::Streaming);
        assert!(board.is_ready());
    }

    #[test]
    fn of_several_parts_as_bad_the_whole_is_the_one_that_tells_what_to_do() {
        let board = board();
        let retrying = |reason: &str| State::Retrying(reason.to_owned());
        let reason = |board: &Board| board.live(0).overall.reason.expect("it is retrying");
        board.set_sink("a", retrying("waiting for capture"));
        board.set_capture(retrying("no answer"));
        board.set_sink("b", retrying("waiting for capture"));
        assert_eq!(reason(&board), "no answer");
        let condition = Condition::new(Code::StreamStorage, "no room", "make room");
        board.set_capture_with(retrying("refused"), condition);
        assert_eq!(reason(&board), "no room");
        board.set_capture(State::Streaming);
        assert_eq!(reason(&board), "waiting for capture");
    }

    #[test]
    fn a_parked_table_is_listed_and_leaves_the_whole_alone() {
        let board = board();
        for sink in ["a", "b"] {
            board.set_sink(sink, State::Streaming);
        }
        board.set_capture(State::Streaming);
        let table = TableName::new("public", "orders");
        board.set_table("a", &table, Some(State::Parked(table.clone())));
        assert!(board.is_ready());
        let live = board.live(0);
        assert_eq!(live.tables.len(), 1);
        assert_eq!(live.tables[0].name, "public.orders");
        assert_eq!(live.tables[0].part.state, "parked");
        assert!(board.is_live());
        let text = serde_json::to_string(&live).expect("json");
        assert_eq!(serde_json::from_str::<Live>(&text).expect("the same"), live);
        board.set_table("a", &table, None);
        assert!(board.live(0).tables.is_empty());
    }

    #[test]
    fn what_is_not_configured_any_more_is_not_shown() {
        let board = board();
        let [orders, items] = ["orders", "items"].map(|name| TableName::new("public", name));
        for table in [&orders, &items] {
            board.set_table("a", table, Some(State::Snapshotting));
        }
        let parked = Condition::new(Code::PublicationDrift, "left", "ALTER ..");
        board.park_captured(vec![(items.clone(), parked)]);
        board.keep_only(&[("a".to_owned(), vec![orders.clone()])]);
        let live = board.live(0);
        assert_eq!(live.sinks.len(), 1);
        let tables = live
            .tables
            .iter()
            .map(|table| (table.name.as_str(), table.sink.as_deref()));
        let expected = [("public.items", None), ("public.orders", Some("a"))];
        assert_eq!(tables.collect::<Vec<_>>(), expected);
        board.park_captured(Vec::new());
        assert_eq!(board.live(0).tables.len(), 1);
    }

    #[test]
    fn a_lag_rises_with_the_clock_and_begins_with_the_first_commit() {
        let board = board();
        assert!(board.lags(5_000_000).is_empty());
        board.set_watermark("a", Position::new(1, Lsn(7), 1), 3_000_000);
        assert_eq!(board.lags(5_500_000), [("a".to_owned(), 2.5)]);
        assert_eq!(board.lags(9_000_000), [("a".to_owned(), 6.0)]);
        assert_eq!(board.lags(1), [("a".to_owned(), 0.0)]);
    }
}
