//! What is done for the application while the broker is away: a table that lost its replica identity does not stay
//! published, because Postgres refuses its updates and deletes for as long.
//!
//! That a table was taken out need not be stored first. What is stored names the membership that published it, and
//! that one is gone with it: the next life finds the table gone or another one there, and takes its changes for lost.
//! What a process remembers here is only that it may be put back without an operator.

use millrace_config::Config;
use millrace_connect::clock::now_us;
use millrace_event::TableName;
use tokio_postgres::Client;

use super::{Stream, relieve};
use crate::Error;
use crate::identity::published::{Drift, Earlier};
use crate::source::{self, Refused, SourceTable};

/// What a process knows of its tables from one life to the next.
#[derive(Debug, Default)]
pub(crate) struct Away {
    /// Those of the last life that streamed; `None` before one did.
    captured: Option<Vec<TableName>>,
    /// Those that were taken out of the publication since, and are not stored as such.
    withdrawn: Vec<TableName>,
}

impl Away {
    /// A life streams with these tables, and without those.
    pub(super) fn streams(&mut self, tables: &[SourceTable], refused: &[Refused]) {
        let tables = tables.iter().map(|table| &table.name);
        let refused = refused.iter().map(|table| &table.name);
        self.captured = Some(tables.chain(refused).cloned().collect());
    }

    /// Whether this process goes on after a failure to reach the broker, and puts back what it takes out. One that has
    /// not streamed yet ends where an operator must act.
    pub(super) fn outlasts(&self, error: &Error) -> bool {
        self.captured.is_some() || matches!(error, Error::Retry { .. })
    }

    /// Takes tables out of the publication that were captured, cannot be as they are now, and that keep the application
    /// from its own rows while they are in it. A process that has not streamed yet goes by the source: where the slot is
    /// there a capture has begun with the publication, and where nobody reads it no other process sees to its tables.
    ///
    /// # Errors
    /// The source is away too.
    pub(super) async fn relieve(
        &mut self,
        config: &Config,
        client: &Client,
        version: i32,
        refused: &[Refused],
    ) -> Result<(), Error> {
        let left = |table: &&Refused| {
            let captured = self.captured.as_ref();
            captured.is_none_or(|captured| captured.contains(&table.name))
                && !self.withdrawn.contains(&table.name)
        };
        let ours: Vec<_> = refused.iter().filter(left).cloned().collect();
        if ours.is_empty() || (self.captured.is_none() && !is_left_alone(config, client).await?) {
            return Ok(());
        }
        let name = source::publication_name(&config.source.name);
        let members = source::published_tables(client, version, &name).await?;
        let done = relieve(client, config, &ours, &members).await?;
        for table in ours.iter().filter(|table| done.contains(&table.name)) {
            let condition = &table.condition;
            tracing::warn!(
                table = %table.name, code = condition.code.as_str(), remedy = %condition.remedy,
                "{}; its changes are not captured, and it is read again once that is mended and the stream can be \
                 reached", condition.message
            );
        }
        self.withdrawn.extend(done);
        Ok(())
    }

    /// Stores what was taken out, once the broker is there again.
    ///
    /// # Errors
    /// The broker is away.
    pub(super) async fn settle(
        &mut self,
        earlier: &mut Earlier,
        stream: &Stream,
    ) -> Result<(), Error> {
        let drift = Drift {
            refused: self.withdrawn.clone(),
            ..Drift::default()
        };
        earlier.lose(stream, &drift, now_us()).await?;
        self.withdrawn.clear();
        Ok(())
    }
}

/// Whether a capture has begun at this source, and no process goes on with it.
async fn is_left_alone(config: &Config, client: &Client) -> Result<bool, Error> {
    let slot = source::find_slot(client, &source::slot_name(&config.source.name)).await?;
    Ok(slot.is_some_and(|slot| slot.active_pid.is_none()))
}
