//! How far backfills are: decided from what is known, and written for people and programs. Pure.

use std::time::Duration;

use comfy_table::{Table, presets};
use millrace_config::Condition;
use millrace_event::work::{BackfillOrder, CopyStatus};
use millrace_sink::progress::{Chunks, CopyState};
use serde::Serialize;

use super::super::status::trimmed;
use super::bucket::Told;
use super::orders::At;

/// The longest condition that a line of the table shows, in characters.
const FILTER_SHOWN_MAX: usize = 40;

/// The answer to `backfill status`.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Report {
    /// Each table of each sink.
    pub(super) backfills: Vec<Line>,
    /// What could not be asked, so that something is missing above.
    pub(super) unreachable: Vec<Unreachable>,
}

/// A part that does not answer.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Unreachable {
    /// `source`, `stream`, or `sink <name>`.
    pub(super) part: String,
    /// The condition's code.
    pub(super) code: String,
    /// Why.
    pub(super) reason: String,
}

impl Unreachable {
    /// A part, and why it does not answer.
    pub(super) fn new(part: &str, condition: &Condition) -> Self {
        Self {
            part: part.to_owned(),
            code: condition.code.to_string(),
            reason: condition.message.clone(),
        }
    }
}

/// What a table of a sink is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Stage {
    /// The target cannot be asked.
    Unreachable,
    /// The sink has not seen the table yet.
    New,
    /// Nothing of it has come yet: neither of a first load nor of a backfill.
    Queued,
    /// Its first load is under way.
    Loading,
    /// Its first load is there, and changes that were made meanwhile are being applied.
    CatchingUp,
    /// Its rows come in chunks, beside its changes.
    Chunks,
    /// So they would, if nobody had paused them.
    Paused,
    /// The sink has not yet heard that it was cancelled.
    Cancelling,
    /// The target refuses the table.
    Parked,
    /// It has every row, and nothing is under way.
    Done,
}

impl Stage {
    fn text(self) -> &'static str {
        match self {
            Self::Unreachable => "unreachable",
            Self::New => "new",
            Self::Queued => "queued",
            Self::Loading => "loading",
            Self::CatchingUp => "catching up",
            Self::Chunks => "chunks",
            Self::Paused => "paused",
            Self::Cancelling => "cancelling",
            Self::Parked => "parked",
            Self::Done => "done",
        }
    }
}

/// One table of one sink.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Line {
    /// The table at the source.
    pub(super) table: String,
    /// The sink.
    pub(super) sink: String,
    /// What it is at.
    pub(super) state: Stage,
    /// Rows that came since it began.
    pub(super) rows: Option<u64>,
    /// Of so many, as the source estimates; none where it does not know, and of a part of a table or of one that is
    /// captured in part.
    pub(super) of: Option<u64>,
    /// `rows` of `of`, in percent.
    pub(super) percent: Option<f64>,
    /// Rows a second on average since it began, pauses not counted.
    pub(super) rows_per_second: Option<f64>,
    /// The seconds that are left at that pace.
    pub(super) eta_seconds: Option<u64>,
    /// The order behind it; none where it goes on by itself.
    pub(super) order: Option<String>,
    /// The condition on its rows.
    #[serde(rename = "where")]
    pub(super) filter: Option<String>,
    /// At most so many rows a second.
    pub(super) rate: Option<u32>,
    /// Why nothing comes for now.
    pub(super) reason: Option<String>,
}

/// Everything that is known about a table of a sink.
#[derive(Clone, Copy, Debug)]
pub(super) struct Known<'k> {
    /// The table, and how it stands in the target.
    pub(super) at: At<'k>,
    /// What is told about the sink's copies.
    pub(super) told: &'k Told,
    /// How many rows the source thinks that the table has.
    pub(super) estimate: Option<u64>,
    /// Whether a condition of its settings leaves rows of it out: nobody knows how many.
    pub(super) filtered: bool,
    /// Why the sink does nothing of the kind for now, whatever the table.
    pub(super) held: Option<&'static str>,
    /// This machine's clock, microseconds since 1970.
    pub(super) now_us: i64,
}

impl Known<'_> {
    /// How far it is.
    pub(super) fn line(&self) -> Line {
        let at = &self.at;
        let orders = &self.told.orders;
        let listed = at.find(orders).map(|index| &orders[index]);
        let state = at
            .progress
            .map(|progress| progress.map(|p| p.tables.get(at.table)));
        let mut line = Line {
            table: at.table.to_string(),
            sink: at.sink.to_owned(),
            state: Stage::Unreachable,
            rows: None,
            of: None,
            percent: None,
            rows_per_second: None,
            eta_seconds: None,
            order: None,
            filter: None,
            rate: None,
            reason: None,
        };
        line.state = match state {
            Err(condition) => {
                line.reason = Some(condition.message.clone());
                line.show_order(listed);
                return line;
            }
            Ok(None | Some(None)) => Stage::New,
            Ok(Some(Some(state))) => match state {
                CopyState::Pending { .. } => Stage::Queued,
                CopyState::Loading { rows, .. } => {
                    line.rows = Some(*rows);
                    Stage::Loading
                }
                CopyState::Loaded { .. } => Stage::CatchingUp,
                CopyState::Parked { .. } | CopyState::Lapsed { .. } | CopyState::Refused { .. } => {
                    Stage::Parked
                }
                CopyState::Copied { .. } => {
                    let open = listed.filter(|order| !order.cancelled && !order.adopts);
                    line.show_order(open);
                    open.map_or(Stage::Done, |order| stage(Stage::Queued, Some(order)))
                }
                CopyState::Chunks(chunks) => {
                    // One that waits behind the running one is not the one that runs.
                    let own = chunks.order.as_ref();
                    let listed =
                        own.map_or(listed, |own| orders.iter().find(|order| order.id == own.id));
                    let order = listed.or(own);
                    line.show_order(order);
                    line.filter = own.and_then(|own| own.filter.clone());
                    line.progress(chunks, self.now_us);
                    stage(Stage::Chunks, order)
                }
            },
        };
        let under_way = !matches!(line.state, Stage::Done | Stage::New | Stage::Parked);
        if under_way {
            line.reason = self
                .told
                .status
                .as_ref()
                .and_then(|status| self.trouble(status))
                .or_else(|| self.held.map(ToOwned::to_owned));
            line.estimate(self.of());
        }
        line
    }

    fn trouble(&self, status: &CopyStatus) -> Option<String> {
        let mut troubles = status.troubles.iter();
        let own = troubles.find(|(table, _)| table == self.at.table);
        own.map(|(_, reason)| reason.clone())
    }

    /// How many rows there are, as it was when the copy began, else as it is.
    fn of(&self) -> Option<u64> {
        if self.filtered {
            return None;
        }
        let told = self.told.status.as_ref().and_then(|status| {
            let mut estimates = status.estimates.iter();
            estimates.find(|(table, _)| table == self.at.table)
        });
        let told = told.map(|(_, rows)| *rows).filter(|rows| *rows > 0);
        told.or(self.estimate)
    }
}

/// What an order makes of a stage.
fn stage(without: Stage, order: Option<&BackfillOrder>) -> Stage {
    match order {
        Some(order) if order.cancelled && !order.adopts => Stage::Cancelling,
        Some(order) if order.paused => Stage::Paused,
        _ => without,
    }
}

impl Line {
    fn show_order(&mut self, order: Option<&BackfillOrder>) {
        let Some(order) = order else { return };
        self.order = Some(order.id.clone());
        self.filter.clone_from(&order.filter);
        self.rate = order.rows_per_second;
    }

    fn progress(&mut self, chunks: &Chunks, now_us: i64) {
        self.rows = Some(chunks.rows);
        // Two machines' clocks: the sink's wrote when it began, and when it was paused.
        let took = chunks.took(now_us);
        if took >= Duration::from_secs(1) {
            self.rows_per_second = Some(round(chunks.rows as f64 / took.as_secs_f64()));
        }
    }

    fn estimate(&mut self, of: Option<u64>) {
        if self.filter.is_some() {
            return;
        }
        self.of = of;
        let (Some(rows), Some(of)) = (self.rows, of) else {
            return;
        };
        // It is not done before it is done, whatever the estimate says.
        self.percent = Some(round(100.0 * rows as f64 / of as f64).min(99.9));
        let pace = self.rows_per_second.filter(|pace| *pace > 0.0);
        if let Some(pace) = pace.filter(|_| self.state == Stage::Chunks && rows < of) {
            self.eta_seconds = Some(((of - rows) as f64 / pace).ceil() as u64);
        }
    }

    /// The line in one sentence.
    pub(super) fn in_words(&self) -> String {
        let mut text = format!(
            "{} at sink {}: {}",
            self.table,
            self.sink,
            self.state.text()
        );
        if self.rows.is_some() {
            text.push_str(&format!(", {} rows", self.rows_text()));
        }
        if self.rows_per_second.is_some() {
            text.push_str(&format!(", {} rows/s", self.pace_text()));
        }
        if self.eta_seconds.is_some() {
            text.push_str(&format!(", {} left", self.eta_text()));
        }
        if let Some(reason) = &self.reason {
            text.push_str(&format!("; {reason}"));
        }
        text
    }

    /// Rows, and of how many.
    fn rows_text(&self) -> String {
        let of = self
            .of
            .map(|of| format!(" of about {of}"))
            .unwrap_or_default();
        let percent = self.percent.map(|percent| format!(" ({percent:.1} %)"));
        match self.rows {
            Some(rows) => format!("{rows}{of}{}", percent.unwrap_or_default()),
            None => "-".to_owned(),
        }
    }

    /// Rows a second.
    fn pace_text(&self) -> String {
        self.rows_per_second
            .map_or_else(|| "-".to_owned(), |pace| format!("{pace:.0}"))
    }

    /// What is left.
    fn eta_text(&self) -> String {
        let text = |seconds| humantime::format_duration(Duration::from_secs(seconds)).to_string();
        self.eta_seconds.map_or_else(|| "-".to_owned(), text)
    }

    fn details(&self) -> String {
        let mut parts = Vec::new();
        parts.extend(self.order.as_ref().map(|order| format!("order {order}")));
        parts.extend(self.rate.map(|rate| format!("at most {rate} rows/s")));
        parts.extend(
            self.filter
                .as_ref()
                .map(|filter| format!("where {}", shown(filter))),
        );
        parts.extend(self.reason.clone());
        parts.join(", ")
    }
}

/// One decimal.
fn round(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

/// A condition on one line, and not too long.
fn shown(filter: &str) -> String {
    let line = filter.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(FILTER_SHOWN_MAX) {
        Some((end, _)) => format!("{}..", &line[..end]),
        None => line,
    }
}

impl Report {
    /// For people.
    pub(super) fn render(&self) -> String {
        let mut table = Table::new();
        table
            .load_style(presets::NOTHING)
            .set_header(["TABLE", "SINK", "STATE", "ROWS", "ROWS/s", "LEFT", ""]);
        for line in &self.backfills {
            table.add_row([
                line.table.clone(),
                line.sink.clone(),
                line.state.text().to_owned(),
                line.rows_text(),
                line.pace_text(),
                line.eta_text(),
                line.details(),
            ]);
        }
        let mut text = format!("{}\n", trimmed(&table));
        for part in &self.unreachable {
            text.push_str(&format!(
                "{} does not answer: {}: {}\n",
                part.part, part.code, part.reason
            ));
        }
        text
    }
}

#[cfg(test)]
mod tests;
