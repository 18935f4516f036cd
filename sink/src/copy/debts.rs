//! How a sink finds the incomplete rows that it asks for.

use millrace_event::TableName;
use tokio::time::Instant;

use super::Copies;
use super::answer::Answer;
use super::healing::{ROWS_MAX, Room, TooLong};
use super::quiet::Pace;
use super::search::Search;
use crate::asking;
use crate::error::Error;
use crate::life::Life;
use crate::progress::CopyState;

impl Copies {
    /// Looks for rows that are incomplete, in the tables of which none are awaited: one whose rows cannot be read for now
    /// keeps no other from being healed.
    pub(super) async fn find_debts(&mut self, life: &mut Life<'_>) -> Result<(), Error> {
        let answer = self.answer.as_ref();
        let awaited = answer.map(Answer::awaited_keys).unwrap_or_default();
        self.debts.retain(|(table, _)| awaited.contains(table));
        let stays = answer.is_some_and(|answer| {
            asking::must_stay(&answer.machine.request().tables, &life.progress)
        });
        // Nothing else is asked for meanwhile, so nothing is to be remembered as asked for.
        if stays || self.clearing {
            return Ok(());
        }
        let now = Instant::now();
        let pace = answer.map_or(Pace::Brings, |answer| {
            let request = &answer.machine.request().id;
            self.quiet
                .pace(request, answer.brought(&life.progress), now)
        });
        let max_payload = life.jetstream.client().server_info().max_payload;
        let room = Room::beside(&self.debts, max_payload);
        let (healing, debts) = (&mut self.healing, &mut self.debts);
        let mut search = Search::begin(healing, debts, &awaited, room, pace, now);
        let mut tables = life
            .progress
            .those(|state| matches!(state, CopyState::Copied { .. }));
        tables.retain(|table| !awaited.contains(table));
        for table in search.in_order(tables) {
            let after = search.place(&table);
            let found = life.incomplete(&table, after, ROWS_MAX).await?;
            let found = life.key_texts(&table, found).await?;
            let (rows, too_long) = search.found(&table, found);
            if rows > 0 {
                tracing::info!(
                    sink = %life.settings.name, %table, rows,
                    "rows of which columns are missing are read again"
                );
            }
            if let Some(too_long) = too_long {
                tell_too_long(life, &table, too_long);
            }
        }
        Ok(())
    }
}

/// Lets the status tell of a table's rows of which the keys are too long, and the log once.
fn tell_too_long(life: &Life<'_>, table: &TableName, too_long: TooLong) {
    let Some(settings) = life.tables.get(table) else {
        return;
    };
    let condition = too_long.condition(table, &settings.target);
    let said = condition.clone();
    if life.status.tell(table, condition)
        && let Some(condition) = said
    {
        tracing::warn!(
            sink = %life.settings.name, %table,
            code = condition.code.as_str(), remedy = %condition.remedy, "{}", condition.message
        );
    }
}
