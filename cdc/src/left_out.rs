//! Tables of which changes were left out, because their key does not tell them apart: remembered durably until a
//! backfill is ordered.
//!
//! Old WAL may have another key than the table has now, and nothing can change the WAL. The changes are left out,
//! and every row is read again once the stream holds all that was written before the table had the key that it has.

use async_nats::jetstream::kv;
use millrace_config::{Code, Config};
use millrace_event::{Lsn, TableName, work};
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;
use tokio_postgres::Client;

use crate::life::Stream;
use crate::orders::order_backfill;
use crate::relation::RelationError;
use crate::source::SourceTable;
use crate::{Error, identity, source};

/// Where it is remembered.
const KEY: &str = "left_out";

/// The tables, each once.
pub(crate) struct LeftOut(Mutex<Vec<Entry>>);

/// One table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    #[serde(flatten)]
    table: TableName,
    /// The commit LSN of the first change that was left out: it names the backfill.
    since: String,
    /// Where the WAL ended when this life began: everything that is left out is below it, because a change of the
    /// key ends a life.
    #[serde(skip)]
    below: Option<Lsn>,
}

impl LeftOut {
    /// Reads what is remembered, before a life streams.
    ///
    /// # Errors
    /// The source or the broker is away.
    pub(crate) async fn read(state: &kv::Store, client: &Client) -> Result<Self, Error> {
        let entries: Option<Vec<Entry>> = identity::read(state, KEY).await?;
        let mut entries = entries.unwrap_or_default();
        if !entries.is_empty() {
            let end = source::wal_position(client).await?;
            entries.iter_mut().for_each(|entry| entry.below = Some(end));
        }
        Ok(Self(Mutex::new(entries)))
    }

    /// Remembers that a change was left out.
    ///
    /// # Errors
    /// The broker is away. Or the table is new here: the next life knows up to where changes may be left out.
    pub(crate) async fn note(
        &self,
        state: &kv::Store,
        error: &RelationError,
        commit_lsn: Lsn,
    ) -> Result<(), Error> {
        let mut entries = self.0.lock().await;
        let mut known = entries.iter().filter(|known| known.table == *error.table());
        if known.any(|known| known.below.is_some_and(|below| commit_lsn < below)) {
            return Ok(());
        }
        let table = error.table().clone();
        tracing::warn!(
            %table, code = Code::NoReplicaIdentity.as_str(), %commit_lsn,
            "{error}: they are left out, and the table's rows are read again"
        );
        entries.retain(|known| known.table != table);
        entries.push(Entry {
            table,
            since: commit_lsn.to_string(),
            below: None,
        });
        store(state, &entries).await?;
        Err(Error::retry_because("changes were left out"))
    }

    /// Orders the backfills of tables of which nothing more can be left out, once the stream holds everything up to
    /// `covered`. A table that is not among the captured `tables` waits: nobody reads it.
    ///
    /// # Errors
    /// The broker is away.
    pub(crate) async fn order(
        &self,
        config: &Config,
        stream: &Stream,
        tables: &[SourceTable],
        covered: Lsn,
    ) -> Result<(), Error> {
        let mut entries = self.0.lock().await;
        let is_due = |entry: &Entry| {
            entry.below.is_some_and(|below| covered >= below)
                && tables.iter().any(|table| table.name == entry.table)
        };
        let due: Vec<_> = entries.iter().filter(|entry| is_due(entry)).collect();
        if due.is_empty() {
            return Ok(());
        }
        for entry in due {
            let id = format!(
                "left-out-{}-{}",
                work::schema_key(&entry.table),
                entry.since
            );
            order_backfill(config, stream, &entry.table, &id).await?;
        }
        entries.retain(|entry| !is_due(entry));
        store(&stream.state, &entries).await
    }
}

async fn store(state: &kv::Store, entries: &[Entry]) -> Result<(), Error> {
    let value = serde_json::to_vec(entries).expect("plain JSON");
    identity::store(state, KEY, value).await
}
