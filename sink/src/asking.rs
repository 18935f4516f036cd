//! What a sink asks capture for, by how its tables stand and what its operator ordered. Pure.

use millrace_event::TableName;
use millrace_event::work::{BackfillOrder, CopyStatus, TableRequest, Wanted};

use crate::progress::{Chunks, CopyProgress, CopyState};
use millrace_event::Position;

/// Rows of which the target knows some columns only: their table, and the texts of their keys.
pub type Debts = Vec<(TableName, Vec<Vec<String>>)>;

/// Everything that a sink needs now: single rows first, because a table waits for few of them, then loads, which
/// share a snapshot, then chunks.
pub fn wanted(progress: &CopyProgress, debts: &Debts) -> Vec<TableRequest> {
    let mut wanted = Vec::new();
    for (table, keys) in debts {
        // Chunks that are to come bring these rows too.
        if let Some(CopyState::Copied { .. }) = progress.tables.get(table) {
            wanted.push(TableRequest {
                table: table.clone(),
                began_us: 0,
                rows: Wanted::Keys { keys: keys.clone() },
            });
        }
    }
    let mut chunks = Vec::new();
    for (table, state) in &progress.tables {
        match state {
            CopyState::Pending { began_us, .. } | CopyState::Loading { began_us, .. } => {
                wanted.push(TableRequest {
                    table: table.clone(),
                    began_us: *began_us,
                    rows: Wanted::Load,
                });
            }
            CopyState::Chunks(state) => chunks.push(TableRequest {
                table: table.clone(),
                began_us: state.began_us,
                rows: by_chunks(state),
            }),
            _ => {}
        }
    }
    wanted.extend(chunks);
    wanted
}

fn by_chunks(state: &Chunks) -> Wanted {
    let order = state.order.as_ref();
    Wanted::Chunks {
        after: state.after.clone(),
        filter: order.and_then(|order| order.filter.clone()),
        rows_per_second: order.and_then(|order| order.rows_per_second),
        paused: order.is_some_and(|order| order.paused),
    }
}

/// Whether a request that is being answered brings all that is wanted, in the way that it is wanted. One that was made
/// for an earlier copy of a table does not: what came of that one is given up.
pub fn brings(asked: &[TableRequest], wanted: &[TableRequest]) -> bool {
    let brings = |wanted: &TableRequest| {
        let asked = asked.iter().find(|asked| asked.table == wanted.table);
        asked.is_some_and(|asked| {
            asked.began_us == wanted.began_us && is_same(&asked.rows, &wanted.rows)
        })
    };
    wanted.iter().all(brings)
}

/// How far chunks have come makes no difference: they go on.
fn is_same(asked: &Wanted, wanted: &Wanted) -> bool {
    let from_the_start = |rows: &Wanted| match rows.clone() {
        Wanted::Chunks {
            filter,
            rows_per_second,
            paused,
            ..
        } => Wanted::Chunks {
            after: None,
            filter,
            rows_per_second,
            paused,
        },
        other => other,
    };
    from_the_start(asked) == from_the_start(wanted)
}

/// The tables of which a request's rows of single keys are awaited: capture has not `copied` them, or not all that it
/// has put on the copy stream is read.
pub fn awaited_keys(asked: &[TableRequest], copied: &[TableName], is_read: bool) -> Vec<TableName> {
    let asked = asked.iter().filter(|asked| {
        let keys = matches!(asked.rows, Wanted::Keys { .. });
        keys && !(is_read && copied.contains(&asked.table))
    });
    asked.map(|asked| asked.table.clone()).collect()
}

/// Whether a request must not be replaced for now: a snapshot that has been read in part cannot be read again.
pub fn must_stay(asked: &[TableRequest], progress: &CopyProgress) -> bool {
    asked.iter().any(|asked| {
        asked.rows == Wanted::Load
            && matches!(
                progress.tables.get(&asked.table),
                Some(CopyState::Loading { began_us, .. }) if *began_us == asked.began_us
            )
    })
}

/// How far a load of a request is of which no row is in the target yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Load {
    /// There is none, or capture can do nothing about it for now.
    None,
    /// Capture has taken it up, and is in no trouble with it. With another request it would begin anew, and wait once
    /// more for what it has waited for: while single rows are due now and again, it would never come.
    Begins {
        /// Its table.
        table: TableName,
        /// When this copy of the table began, microseconds since 1970.
        began_us: i64,
    },
    /// Its rows are on the copy stream: with another request all of them would be read again.
    Comes,
}

/// How far the load of a request is, of several the one that is furthest.
pub(crate) fn load_under_way(
    asked: &[TableRequest],
    progress: &CopyProgress,
    status: &CopyStatus,
) -> Load {
    let pending = asked.iter().filter(|asked| {
        asked.rows == Wanted::Load
            && !status.cut.contains(&asked.table)
            && matches!(
                progress.tables.get(&asked.table),
                Some(CopyState::Pending { began_us, .. }) if *began_us == asked.began_us
            )
    });
    let mut load = Load::None;
    for TableRequest {
        table, began_us, ..
    } in pending
    {
        if status.loading.as_ref() == Some(table) || status.copied.contains(table) {
            return Load::Comes;
        }
        let is_in_trouble = status.troubles.iter().any(|(of, _)| of == table);
        // Of a table that it leaves out capture tells no estimate, and its load never begins.
        let is_known = status.estimates.iter().any(|(of, _)| of == table);
        if load == Load::None && is_known && !is_in_trouble {
            load = Load::Begins {
                table: table.clone(),
                began_us: *began_us,
            };
        }
    }
    load
}

/// Tables whose load has ended before its end: nobody reads their snapshot any more. Their rows come in chunks
/// from here on, beside their changes.
///
/// `asked` is the request that is being answered, and `cut` what capture says of it.
pub fn cut_loads(
    progress: &CopyProgress,
    asked: Option<&str>,
    cut: &[TableName],
) -> Vec<TableName> {
    let answered = progress
        .reading
        .as_ref()
        .map(|reading| reading.request.as_str());
    progress
        .tables
        .iter()
        .filter(|(table, state)| match state {
            // Rows that came for a request came for one that is still answered, or nobody goes on with it.
            CopyState::Loading { .. } => asked != answered || cut.contains(table),
            CopyState::Pending { .. } => cut.contains(table),
            _ => false,
        })
        .map(|(table, _)| table.clone())
        .collect()
}

/// Lets these tables' rows come in chunks, from a sink that has read its stream up to `position`.
pub fn begin_chunks(
    progress: &mut CopyProgress,
    tables: &[TableName],
    position: Position,
    now_us: i64,
) {
    for table in tables {
        let chunks = CopyState::Chunks(Chunks::begin(position, None, now_us));
        progress.tables.insert(table.clone(), chunks);
    }
}

/// What the orders change, if they change anything.
pub fn follow_orders(
    progress: &CopyProgress,
    orders: &[BackfillOrder],
    position: Position,
    now_us: i64,
) -> Option<CopyProgress> {
    let mut next = progress.clone();
    next.finished
        .retain(|id| orders.iter().any(|order| order.id == *id));
    for order in orders
        .iter()
        .filter(|order| !progress.finished.contains(&order.id))
    {
        match next.tables.get_mut(&order.table) {
            Some(CopyState::Chunks(chunks)) => {
                // An order for all of it waits behind chunks that are under way: those read before it was given
                // may lack what it is about.
                let own = match &chunks.order {
                    Some(own) => own.id == order.id,
                    None => order.adopts,
                };
                // What began by itself must become whole, whoever paces it.
                let adopts = chunks.order.as_ref().is_none_or(|own| own.adopts);
                if own && order.is_cancelled() && adopts {
                    *chunks = chunks.clone().ordered(None, now_us);
                } else if own && order.is_cancelled() {
                    // Each row that came is right, and each that did not is as it was.
                    let lsn = millrace_event::Lsn::ZERO;
                    let copied = CopyState::Copied { lsn };
                    next.tables.insert(order.table.clone(), copied);
                    next.finished.insert(order.id.clone());
                } else if own && !order.is_cancelled() {
                    // What must be whole is not narrowed by an order that came later.
                    let filter = chunks.order.as_ref().and_then(|own| own.filter.clone());
                    let order = BackfillOrder {
                        filter,
                        adopts,
                        ..order.clone()
                    };
                    *chunks = chunks.clone().ordered(Some(order), now_us);
                }
            }
            Some(state @ CopyState::Copied { .. }) if !order.is_cancelled() && !order.adopts => {
                let order = Some(order.clone());
                *state = CopyState::Chunks(Chunks::begin(position, order, now_us));
            }
            Some(CopyState::Copied { .. }) | None => {
                next.finished.insert(order.id.clone());
            }
            // It waits until the table is where its sink is.
            Some(_) if order.is_cancelled() => {
                next.finished.insert(order.id.clone());
            }
            Some(_) => {}
        }
    }
    (next != *progress).then_some(next)
}

/// The tables whose rows come in chunks from `next` on, and did not before.
pub fn begun(before: &CopyProgress, next: &CopyProgress) -> Vec<TableName> {
    next.those(|state| matches!(state, CopyState::Chunks(_)))
        .into_iter()
        .filter(|table| !matches!(before.tables.get(table), Some(CopyState::Chunks(_))))
        .collect()
}

/// Has these tables' chunks doubt what the stream tells of up to `newest`.
pub fn doubt(progress: &mut CopyProgress, tables: &[TableName], newest: Position) {
    for table in tables {
        if let Some(CopyState::Chunks(chunks)) = progress.tables.get_mut(table) {
            chunks.doubt(newest);
        }
    }
}

#[cfg(test)]
mod tests;
