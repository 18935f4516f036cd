//! `backfill start --wait`: follows what was started to its end.

use std::collections::BTreeSet;
use std::io::{IsTerminal, Write};
use std::time::Duration;

use millrace_config::{Condition, Config, Exit};
use millrace_event::TableName;
use millrace_event::work::BackfillOrder;
use millrace_sink::progress::{CopyProgress, CopyState};
use tokio::time::Instant;

use super::bucket::{Bucket, Listed};
use super::report::Line;
use super::selection::Pair;
use crate::command::say;

/// How often each sink is looked at. It keeps an order that it has carried out on its list for a second longer: what
/// was cancelled is seen as such.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// How often progress is told on a terminal, and elsewhere.
const SHOW_INTERVAL: Duration = Duration::from_secs(2);
const TELL_INTERVAL: Duration = Duration::from_secs(10);

/// A backfill that is followed.
#[derive(Clone, Debug)]
pub(super) struct Followed {
    sink: String,
    table: TableName,
    id: String,
    /// The list's revision that has its order: an older list is of no account.
    revision: u64,
    /// Somebody cancelled it.
    cancelled: bool,
}

/// How a backfill has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// Every row is there.
    Done,
    /// Somebody cancelled it.
    Cancelled,
    /// The target refuses the table.
    Parked,
}

impl Followed {
    /// An order that was just written.
    pub(super) fn new(sink: &str, order: &BackfillOrder, revision: u64) -> Self {
        Self {
            sink: sink.to_owned(),
            table: order.table.clone(),
            id: order.id.clone(),
            revision,
            cancelled: false,
        }
    }

    /// Whether it has ended, by how the sink's tables stood, and by a list that was read after that.
    fn outcome(&mut self, progress: &CopyProgress, listed: &Listed) -> Option<Outcome> {
        if listed.revision < self.revision {
            return None;
        }
        let order = listed.orders.iter().find(|order| order.id == self.id);
        self.cancelled |= order.is_some_and(|order| order.cancelled);
        let ended = match self.cancelled {
            true => Outcome::Cancelled,
            false => Outcome::Done,
        };
        if progress.finished.contains(&self.id) {
            return Some(ended);
        }
        match progress.tables.get(&self.table) {
            Some(state) if state.is_parked() => Some(Outcome::Parked),
            Some(CopyState::Chunks(chunks))
                if chunks.order.as_ref().is_some_and(|own| own.id == self.id) =>
            {
                None
            }
            // The sink strikes only what it has carried out.
            _ => order.is_none().then_some(ended),
        }
    }
}

/// Follows these to their ends. What does not answer is asked again.
pub(super) async fn wait(config: &Config, bucket: &Bucket, mut followed: Vec<Followed>) -> Exit {
    let terminal = std::io::stderr().is_terminal();
    let interval = if terminal {
        SHOW_INTERVAL
    } else {
        TELL_INTERVAL
    };
    let mut exit = Exit::Ok;
    let mut told_at: Option<Instant> = None;
    let mut was_silent = false;
    while !followed.is_empty() {
        tokio::time::sleep(LOOK_INTERVAL).await;
        let mut left = Vec::new();
        let mut silent = None;
        let sinks: BTreeSet<String> = followed.iter().map(|one| one.sink.clone()).collect();
        for sink in sinks {
            let (own, others): (Vec<_>, _) = followed.into_iter().partition(|one| one.sink == sink);
            followed = others;
            let seen = look(config, bucket, &sink).await;
            for mut one in own {
                let outcome = seen.as_ref().ok();
                let outcome = outcome.and_then(|(progress, listed)| one.outcome(progress, listed));
                let Some(outcome) = outcome else {
                    left.push(one);
                    continue;
                };
                clear(terminal);
                tell_end(&one, outcome);
                if outcome != Outcome::Done {
                    exit = Exit::Finding;
                }
            }
            silent = seen.err().or(silent);
        }
        followed = left;
        if let Some(condition) = silent.as_ref().filter(|_| !was_silent) {
            clear(terminal);
            say(&format!("{condition}; asking again"));
        }
        was_silent = silent.is_some();
        if !followed.is_empty() && told_at.is_none_or(|at| at.elapsed() >= interval) {
            told_at = Some(Instant::now());
            show(terminal, &progress(config, &followed).await);
        }
    }
    exit
}

/// How a sink's tables stand, and then its list.
async fn look(
    config: &Config,
    bucket: &Bucket,
    sink: &str,
) -> Result<(CopyProgress, Listed), Condition> {
    let settings = config.sink(sink).expect("it was selected");
    let seen = crate::command::status::target(settings).await?;
    let progress = seen.row.map(|row| row.copy).unwrap_or_default();
    Ok((progress, bucket.orders(sink).await?))
}

fn tell_end(one: &Followed, outcome: Outcome) {
    let Followed { table, sink, .. } = one;
    let what = match outcome {
        Outcome::Done => "done",
        Outcome::Cancelled => "was cancelled; what came is right, the rest is as it was",
        Outcome::Parked => {
            "is parked: the target refuses the table (see `millrace status`); the order stays"
        }
    };
    crate::command::answer(&format!("{table} at sink {sink}: {what}\n"));
}

async fn progress(config: &Config, followed: &[Followed]) -> Vec<String> {
    let is_followed = |sink: &str, table: &TableName| {
        let mut those = followed.iter();
        those.any(|one| one.sink == sink && one.table == *table)
    };
    let mut pairs = Vec::new();
    for sink in &config.sinks {
        let tables = config.tables_of(&sink.name);
        let tables = tables.filter(|table| is_followed(&sink.name, &table.name));
        pairs.extend(tables.map(|table| Pair { sink, table }));
    }
    let report = Box::pin(super::look(config, &pairs)).await;
    report.backfills.iter().map(Line::in_words).collect()
}

/// On a terminal one line stands for all; elsewhere each has its own.
fn show(terminal: bool, lines: &[String]) {
    if !terminal {
        for line in lines {
            say(line);
        }
        return;
    }
    let mut text = lines.first().cloned().unwrap_or_default();
    if lines.len() > 1 {
        text.push_str(&format!(", and {} more", lines.len() - 1));
    }
    let mut stderr = std::io::stderr().lock();
    let _ = write!(stderr, "\r\x1b[K{text}").and_then(|()| stderr.flush());
}

fn clear(terminal: bool) {
    if terminal {
        let mut stderr = std::io::stderr().lock();
        let _ = write!(stderr, "\r\x1b[K").and_then(|()| stderr.flush());
    }
}

#[cfg(test)]
mod tests {
    use millrace_event::{Lsn, Position};
    use millrace_sink::progress::Chunks;

    use super::*;

    fn order() -> BackfillOrder {
        BackfillOrder::new("o".to_owned(), TableName::new("public", "t"))
    }

    fn seen(state: CopyState, finished: bool) -> CopyProgress {
        let mut progress = CopyProgress::default();
        progress.tables.insert(order().table, state);
        if finished {
            progress.finished.insert("o".to_owned());
        }
        progress
    }

    fn listed(orders: &[BackfillOrder], revision: u64) -> Listed {
        Listed {
            orders: orders.to_vec(),
            revision,
        }
    }

    #[test]
    fn an_order_is_followed_to_its_end() {
        let copied = || CopyState::Copied { lsn: Lsn(1) };
        let chunks = || {
            let position = Position::new(1, Lsn(9), 0);
            CopyState::Chunks(Chunks::begin(position, Some(order()), 0))
        };
        let (own, none) = (listed(&[order()], 5), listed(&[], 6));
        let mut one = Followed::new("wh", &order(), 5);
        assert_eq!(one.outcome(&seen(copied(), false), &own), None);
        assert_eq!(one.outcome(&seen(chunks(), false), &own), None);
        // A replica of the bucket that has not heard of the order.
        assert_eq!(one.outcome(&seen(copied(), false), &listed(&[], 4)), None);
        // What was struck before a look, and what is not struck yet.
        let done = Some(Outcome::Done);
        assert_eq!(one.outcome(&seen(copied(), false), &none), done);
        assert_eq!(one.outcome(&seen(copied(), true), &own), done);
        // The target was seen before the list was struck.
        assert_eq!(one.outcome(&seen(chunks(), false), &none), None);
        let lapsed = CopyState::Lapsed { refused_at_us: 0 };
        let parked = Some(Outcome::Parked);
        assert_eq!(one.outcome(&seen(lapsed, false), &own), parked);

        let cancelled = BackfillOrder {
            cancelled: true,
            ..order()
        };
        let cancelled = listed(&[cancelled], 6);
        assert_eq!(one.outcome(&seen(chunks(), false), &cancelled), None);
        let ended = Some(Outcome::Cancelled);
        assert_eq!(one.outcome(&seen(copied(), true), &cancelled), ended);
        assert_eq!(one.outcome(&seen(copied(), false), &none), ended);
    }
}
