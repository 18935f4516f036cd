//! What becomes of a sink's orders. Pure.

use millrace_config::{Code, Condition};
use millrace_event::TableName;
use millrace_event::work::BackfillOrder;
use millrace_sink::progress::{Chunks, CopyProgress, CopyState};

use crate::arguments::Pace;

/// A table of a sink, and how it stands.
#[derive(Clone, Copy, Debug)]
pub(super) struct At<'a> {
    /// The sink.
    pub(super) sink: &'a str,
    /// The table.
    pub(super) table: &'a TableName,
    /// How the sink's tables stand; `None` where the sink has never run, an error where that cannot be seen.
    pub(super) progress: Result<Option<&'a CopyProgress>, &'a Condition>,
}

/// What an operator wants of a backfill that there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// No more rows for now.
    Pause,
    /// On, at another pace if one is given.
    Resume(Option<Pace>),
    /// It ends where it is.
    Cancel,
}

/// The decision about one table: the orders from now on, and what is said about it.
pub(super) type Decision = Result<(Vec<BackfillOrder>, String), Condition>;

/// The decisions about several tables of one sink.
#[derive(Debug)]
pub(super) struct Decided {
    /// The orders from now on.
    pub(super) orders: Vec<BackfillOrder>,
    /// A line for each table that something was decided about.
    pub(super) said: Vec<String>,
    /// Why nothing was decided about the others.
    pub(super) refused: Vec<Condition>,
}

impl Decided {
    /// Nothing is decided yet.
    pub(super) fn from(orders: &[BackfillOrder]) -> Self {
        Self {
            orders: orders.to_vec(),
            said: Vec::new(),
            refused: Vec::new(),
        }
    }

    /// Takes a decision about a table.
    pub(super) fn note(&mut self, decision: Decision) {
        match decision {
            Ok((orders, said)) => {
                self.orders = orders;
                self.said.push(said);
            }
            Err(condition) => self.refused.push(condition),
        }
    }

    /// Keeps the orders as they were when something was refused.
    pub(super) fn all_or_nothing(mut self, before: &[BackfillOrder]) -> Self {
        if !self.refused.is_empty() {
            self.orders = before.to_vec();
            self.said.clear();
        }
        self
    }

    /// What is said, as lines.
    pub(super) fn lines(&self) -> String {
        self.said.iter().fold(String::new(), |mut text, line| {
            text.push_str(line);
            text.push('\n');
            text
        })
    }
}

/// A name for an order, which no other of the sink has: the clock, and a number within the command.
pub(super) fn new_id(now_us: i64, number: usize) -> String {
    format!("{now_us:x}-{number}")
}

impl<'a> At<'a> {
    fn state(&self) -> Option<&'a CopyState> {
        self.progress.ok()??.tables.get(self.table)
    }

    fn chunks(&self) -> Option<&'a Chunks> {
        match self.state() {
            Some(CopyState::Chunks(chunks)) => Some(chunks),
            _ => None,
        }
    }

    /// Whether the table's rows come because the replica needs them, whoever paces them.
    fn is_owed(&self) -> bool {
        let by_itself = |chunks: &Chunks| {
            let order = chunks.order.as_ref();
            order.is_none_or(|order| order.adopts || order.owed)
        };
        self.chunks().is_some_and(by_itself)
    }

    /// The place of the table's order that is not carried out: of several the one that is not cancelled.
    pub(super) fn find(&self, orders: &[BackfillOrder]) -> Option<usize> {
        let finished = |id: &String| {
            let progress = self.progress.ok().flatten();
            progress.is_some_and(|progress| progress.finished.contains(id))
        };
        let open = |order: &BackfillOrder| order.table == *self.table && !finished(&order.id);
        let live = orders
            .iter()
            .rposition(|order| open(order) && !order.is_cancelled());
        live.or_else(|| orders.iter().rposition(open))
    }

    fn refused(&self, code: Code, what: &str, remedy: impl Into<String>) -> Condition {
        let Self { sink, table, .. } = self;
        Condition::new(code, format!("table {table} of sink {sink} {what}"), remedy)
    }

    fn said(&self, what: &str) -> String {
        format!("{} at sink {}: {what}", self.table, self.sink)
    }

    fn show(&self) -> String {
        format!(
            "see `millrace backfill status {} --sink {}`",
            self.table, self.sink
        )
    }
}

/// Adds an order for a table that is whole and has none.
pub(super) fn start(orders: &[BackfillOrder], at: &At<'_>, new: &BackfillOrder) -> Decision {
    let listed = at.find(orders).map(|index| &orders[index]);
    let twice = |what: &str| Err(at.refused(Code::BackfillTwice, what, at.show()));
    if let Some(order) = listed.filter(|order| !order.cancelled) {
        return twice(&format!("has backfill {} already", order.id));
    }
    let not_ready =
        |what: &str, remedy: &str| Err(at.refused(Code::BackfillNotReady, what, remedy));
    let by_itself = "wait until `millrace backfill status` shows it as done; it goes on by itself";
    match (at.progress.map_err(Condition::clone)?, at.state()) {
        (None, _) => not_ready(
            "has no replica yet: the sink has never run",
            "start `millrace run`: it makes the replica whole by itself",
        ),
        (Some(_), None) => not_ready(
            "has no replica yet: the sink has not seen the table since it was configured",
            "start `millrace run` again: it makes the replica whole by itself",
        ),
        (_, Some(CopyState::Pending { .. } | CopyState::Loading { .. })) => {
            not_ready("is in its first load", by_itself)
        }
        (_, Some(CopyState::Loaded { .. })) => {
            not_ready("is catching up with the others", by_itself)
        }
        (
            _,
            Some(CopyState::Parked { .. } | CopyState::Lapsed { .. } | CopyState::Refused { .. }),
        ) => not_ready(
            "is parked: the target refuses it",
            "`millrace status` says why; once the target takes the table it becomes whole by itself",
        ),
        (_, Some(CopyState::Chunks(chunks))) => {
            let ends = chunks.order.as_ref().is_some_and(|own| {
                let listed = orders.iter().find(|order| order.id == own.id);
                !own.adopts && listed.is_some_and(BackfillOrder::is_cancelled)
            });
            match ends {
                true => Ok(added(orders, at, new)),
                false => twice("is being copied in chunks already"),
            }
        }
        (_, Some(CopyState::Copied { .. })) => Ok(added(orders, at, new)),
    }
}

fn added(
    orders: &[BackfillOrder],
    at: &At<'_>,
    new: &BackfillOrder,
) -> (Vec<BackfillOrder>, String) {
    let mut next = orders.to_vec();
    next.push(new.clone());
    let pace = new.rows_per_second.map(paced).unwrap_or_default();
    (
        next,
        at.said(&format!("backfill {} is queued{pace}", new.id)),
    )
}

fn paced(rows: u32) -> String {
    format!(", at most {rows} rows/s")
}

/// Changes the table's order. Chunks that began by themselves get one, named `id`.
pub(super) fn change(
    orders: &[BackfillOrder],
    at: &At<'_>,
    change: Change,
    id: String,
) -> Decision {
    let mut next = orders.to_vec();
    let found = at.find(orders);
    // A list that was lost does not end what it began.
    let unlisted = at.chunks().filter(|chunks| {
        let own = chunks.order.as_ref();
        own.is_none_or(|own| orders.iter().all(|order| order.id != own.id))
    });
    let order = match (found, unlisted) {
        (Some(index), _) => &mut next[index],
        (None, Some(chunks)) => {
            let own = chunks.order.clone().unwrap_or_else(|| BackfillOrder {
                adopts: true,
                ..BackfillOrder::new(id, at.table.clone())
            });
            next.push(own);
            next.last_mut().expect("just pushed")
        }
        (None, None) => return Err(not_there(at)),
    };
    if order.is_cancelled() && change != Change::Cancel {
        let what = "is at its end: its backfill was cancelled";
        return Err(at.refused(Code::BackfillNone, what, at.show()));
    }
    let before = order.clone();
    let said = match change {
        Change::Pause => pause(order),
        Change::Resume(pace) => resume(order, pace),
        Change::Cancel if at.is_owed() || order.adopts || order.owed => {
            let what = "is copied because its replica lacks rows: that cannot be cancelled";
            let remedy = format!(
                "let it end, or hold it with `millrace backfill pause {} --sink {}`; without it the replica \
                 stays wrong",
                at.table, at.sink
            );
            return Err(at.refused(Code::BackfillOwed, what, remedy));
        }
        Change::Cancel if order.cancelled => "is cancelled already".to_owned(),
        Change::Cancel => {
            order.cancelled = true;
            "cancelled; what came is right, the rest stays as it was".to_owned()
        }
    };
    if *order == before {
        next = orders.to_vec();
    }
    Ok((next, at.said(&said)))
}

fn pause(order: &mut BackfillOrder) -> String {
    let was = std::mem::replace(&mut order.paused, true);
    let said = if was { "is paused already" } else { "paused" };
    said.to_owned()
}

fn resume(order: &mut BackfillOrder, pace: Option<Pace>) -> String {
    let was = std::mem::replace(&mut order.paused, false);
    let mut said = if was { "resumed" } else { "is not paused" }.to_owned();
    if let Some(pace) = pace {
        order.rows_per_second = pace.limit();
        let now = pace.limit().map(paced);
        said.push_str(now.as_deref().unwrap_or(", as fast as it goes"));
    }
    said
}

/// Why the table has nothing that could be changed.
fn not_there(at: &At<'_>) -> Condition {
    match (at.progress, at.state()) {
        (Err(condition), _) => condition.clone(),
        (_, Some(CopyState::Pending { .. } | CopyState::Loading { .. })) => at.refused(
            Code::BackfillOwed,
            "is in its first load: that reads one snapshot, and can neither be paused nor cancelled",
            "let it end; to give the replica up, take the sink out of the table's file",
        ),
        _ => at.refused(
            Code::BackfillNone,
            "has no backfill under way",
            "see `millrace backfill status`",
        ),
    }
}

#[cfg(test)]
mod tests;
