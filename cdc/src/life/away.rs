//! What is done for the application while the broker is away: a table that lost its replica identity does not stay
//! published, because Postgres refuses its updates and deletes for as long.
//!
//! That a table was taken out need not be stored first. What is stored names the membership that published it, and
//! that one is gone with it: the next life finds the table gone or another one there, and takes its changes for lost.
//! What a process remembers here is only that it may be put back without an operator.

use millrace_config::Config;
use millrace_event::TableName;
use tokio_postgres::Client;

use super::{Stream, now_us, relieve};
use crate::Error;
use crate::identity::published::{Drift, Earlier};
use crate::source::{self, Refused, SourceTable};

/// What a process knows of its tables from one life to the next.
#[derive(Debug, Default)]
pub(crate) struct Away {
    /// Those of the last life that streamed.
    captured: Vec<TableName>,
    /// Those that were taken out of the publication since, and are not stored as such.
    withdrawn: Vec<TableName>,
}

impl Away {
    /// A life streams with these tables, and without those.
    pub(super) fn streams(&mut self, tables: &[SourceTable], refused: &[Refused]) {
        let tables = tables.iter().map(|table| &table.name);
        let refused = refused.iter().map(|table| &table.name);
        self.captured = tables.chain(refused).cloned().collect();
    }

    /// Takes tables out of the publication that this process captured, cannot capture as they are now, and that keep
    /// the application from its own rows while they are in it.
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
        let is_ours = |table: &&Refused| {
            self.captured.contains(&table.name) && !self.withdrawn.contains(&table.name)
        };
        let ours: Vec<_> = refused.iter().filter(is_ours).cloned().collect();
        if ours.is_empty() {
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
