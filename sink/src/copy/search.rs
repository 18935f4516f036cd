//! One look for incomplete rows: which of those that are found get into the request. Pure.

use millrace_event::TableName;
use tokio::time::Instant;

use super::healing::{FoundKey, Healing, Picked, Room, TooLong};
use super::quiet::Pace;
use crate::asking::Debts;

/// A look.
pub(super) struct Search<'a> {
    healing: &'a mut Healing,
    /// What is asked for: what is awaited, and what this look adds.
    debts: &'a mut Debts,
    /// The tables of which keys are awaited.
    awaited: &'a [TableName],
    room: Room,
    standing: Standing,
    now: Instant,
}

/// How the request that is being answered stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// It has few keys: others join it, which replaces it.
    Joined,
    /// It has many keys, which are answered one table after the other, or a load that is under way: it is not replaced
    /// for others before.
    Kept,
    /// It brings nothing: others join it, and where they have no room, its keys give way.
    Quiet,
}

impl<'a> Search<'a> {
    /// Begins a look beside keys that are awaited, which `debts` has and which leave `room`; `pace`: how their request
    /// goes on.
    pub(super) fn begin(
        healing: &'a mut Healing,
        debts: &'a mut Debts,
        awaited: &'a [TableName],
        room: Room,
        pace: Pace,
        now: Instant,
    ) -> Self {
        healing.forget_old(now);
        let standing = match pace {
            Pace::Quiet => Standing::Quiet,
            Pace::Brings if room.is_joined() => Standing::Joined,
            Pace::Brings | Pace::Loads => Standing::Kept,
        };
        Self {
            healing,
            debts,
            awaited,
            room,
            standing,
            now,
        }
    }

    /// Those of the tables that are searched now, the one that waits for room first.
    pub(super) fn in_order(&mut self, tables: Vec<TableName>) -> Vec<TableName> {
        match self.standing {
            Standing::Kept => Vec::new(),
            Standing::Joined | Standing::Quiet => self.healing.in_order(tables),
        }
    }

    /// Behind which key a table's incomplete rows are looked for.
    pub(super) fn place(&self, table: &TableName) -> &str {
        self.healing.place(table)
    }

    /// Up to [`super::healing::ROWS_MAX`] keys were found in a table. Returns how many of them are asked for, and, once
    /// the table is searched to its end, of how many that cannot be.
    pub(super) fn found(
        &mut self,
        table: &TableName,
        found: Vec<FoundKey>,
    ) -> (usize, Option<TooLong>) {
        let (mut picked, mut too_long) = self.healing.pick(table, &found, self.room, self.now);
        if picked == Picked::Squeezed && self.standing == Standing::Quiet {
            // What gives way is asked for again after a while.
            let awaited = self.awaited;
            self.debts.retain(|(table, _)| !awaited.contains(table));
            self.room = self.room.again(self.debts);
            (picked, too_long) = self.healing.pick(table, &found, self.room, self.now);
        }
        let rows = match picked {
            Picked::Squeezed => {
                self.healing.waits(table.clone());
                0
            }
            Picked::Keys(keys) => {
                let rows = keys.len();
                if rows > 0 {
                    self.room.take(table, &keys);
                    self.debts.push((table.clone(), keys));
                }
                rows
            }
        };
        (rows, too_long)
    }
}

#[cfg(test)]
mod tests;
