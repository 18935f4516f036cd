//! How a sink finds the incomplete rows that it asks for.

use tokio::time::Instant;

use super::Copies;
use super::answer::Answer;
use super::healing::{self, Found, Room};
use crate::error::Error;
use crate::life::Life;
use crate::progress::CopyState;

impl Copies {
    /// Looks for rows that are incomplete, in the tables of which none are awaited: one whose rows cannot be read for now
    /// keeps no other from being healed.
    pub(super) async fn find_debts(&mut self, life: &mut Life<'_>) -> Result<(), Error> {
        let awaited = self.answer.as_ref().map(Answer::awaited_keys);
        let awaited = awaited.unwrap_or_default();
        let now = Instant::now();
        self.healing.forget_old(now);
        self.debts.retain(|(table, _)| awaited.contains(table));
        let mut tables = life
            .progress
            .those(|state| matches!(state, CopyState::Copied { .. }));
        tables.retain(|table| !awaited.contains(table));
        let mut room = Room::beside(&self.debts);
        for table in self.healing.in_turn(tables) {
            let after = self.healing.place(&table);
            let mut found = life.incomplete(&table, after, healing::ROWS_MAX).await?;
            let mut fits = self.healing.found(&table, &mut found, room);
            if fits == Found::Squeezed {
                // What gives way is asked for again after a while.
                self.debts.retain(|(table, _)| !awaited.contains(table));
                room = Room::beside(&self.debts);
                fits = self.healing.found(&table, &mut found, room);
            }
            if fits == Found::Squeezed {
                self.healing.waits(table);
                continue;
            }
            let keys = life.key_texts(&table, &found).await?;
            let fresh = self.healing.ask(&table, keys, now);
            if !fresh.is_empty() {
                room.take(&fresh);
                tracing::info!(
                    sink = %life.settings.name, %table, rows = fresh.len(),
                    "rows of which columns are missing are read again"
                );
                self.debts.push((table, fresh));
            }
        }
        Ok(())
    }
}
