//! Tables of which changes were left out, because their key does not tell them apart: remembered durably until a
//! backfill is ordered.
//!
//! Old WAL may have another key than the table has now, and nothing can change the WAL. The changes are left out,
//! and every row is read again once the stream holds all that was written before the table had the key that it has.
//! What was ordered stays remembered: the same WAL is read again after each start, as far as the slot keeps it.

use async_nats::jetstream::kv;
use millrace_config::{Code, Config};
use millrace_event::{Lsn, TableName, work};
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;
use tokio_postgres::Client;

use crate::life::Stream;
use crate::orders::order_backfill;
use crate::relation::RelationError;
use crate::settled::Settled;
use crate::source::SourceTable;
use crate::{Error, identity, source};

/// Where it is remembered.
const KEY: &str = "left_out";

/// The tables of which changes were left out.
pub(crate) struct LeftOut {
    /// Each table once.
    entries: Mutex<Vec<Entry>>,
    /// The source's timeline.
    timeline: u32,
}

/// One table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    #[serde(flatten)]
    table: TableName,
    /// The commit LSN of the first change that was left out: it names the backfill.
    since: String,
    /// The changes that the ordered rows have; `None` until the backfill is ordered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ordered: Option<Settled>,
    /// Where the WAL ended when this life began: everything that is left out is below it, because a change of the
    /// key ends a life.
    #[serde(skip)]
    below: Option<Lsn>,
}

impl Entry {
    /// Whether the backfill that is remembered has a change of this commit too.
    fn has(&self, commit_lsn: Lsn, timeline: u32) -> bool {
        match &self.ordered {
            Some(ordered) => ordered.has(commit_lsn, timeline),
            None => self.below.is_some_and(|below| commit_lsn < below),
        }
    }

    /// Whether its backfill can be ordered, once the stream holds everything up to `covered`: up to where it has
    /// everything then.
    fn due(&self, covered: Lsn) -> Option<Lsn> {
        let below = self.below.filter(|_| self.ordered.is_none());
        below.filter(|below| covered >= *below)
    }
}

impl LeftOut {
    /// Reads what is remembered, before a life streams.
    ///
    /// # Errors
    /// The source or the broker is away.
    pub(crate) async fn read(
        state: &kv::Store,
        client: &Client,
        timeline: u32,
    ) -> Result<Self, Error> {
        let entries: Option<Vec<Entry>> = identity::read(state, KEY).await?;
        let mut entries = entries.unwrap_or_default();
        if !entries.is_empty() {
            let end = source::wal_position(client).await?;
            entries.iter_mut().for_each(|entry| entry.below = Some(end));
        }
        Ok(Self {
            entries: Mutex::new(entries),
            timeline,
        })
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
        let mut entries = self.entries.lock().await;
        let mut known = entries.iter().filter(|known| known.table == *error.table());
        if known.any(|known| known.has(commit_lsn, self.timeline)) {
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
            ordered: None,
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
        let mut entries = self.entries.lock().await;
        let mut ordered = false;
        for entry in entries.iter_mut() {
            let Some(below) = entry.due(covered) else {
                continue;
            };
            if !tables.iter().any(|table| table.name == entry.table) {
                continue;
            }
            let id = format!(
                "left-out-{}-{}",
                work::schema_key(&entry.table),
                entry.since
            );
            order_backfill(config, stream, &entry.table, &id).await?;
            entry.ordered = Some(Settled::new(below, self.timeline));
            ordered = true;
        }
        if !ordered {
            return Ok(());
        }
        store(&stream.state, &entries).await
    }
}

async fn store(state: &kv::Store, entries: &[Entry]) -> Result<(), Error> {
    let value = serde_json::to_vec(entries).expect("plain JSON");
    identity::store(state, KEY, value).await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(ordered: Option<Settled>, below: Option<Lsn>) -> Entry {
        Entry {
            table: TableName::new("public", "t"),
            since: Lsn(50).to_string(),
            ordered,
            below,
        }
    }

    #[test]
    fn what_was_ordered_stays_known_and_is_not_ordered_again() {
        let noted = entry(None, None);
        assert!(!noted.has(Lsn(50), 1));
        assert_eq!(noted.due(Lsn(500)), None);
        let next_life = entry(None, Some(Lsn(100)));
        assert!(next_life.has(Lsn(99), 1) && !next_life.has(Lsn(100), 1));
        assert_eq!(next_life.due(Lsn(99)), None);
        assert_eq!(next_life.due(Lsn(100)), Some(Lsn(100)));
        // A life after that, whose WAL ends elsewhere.
        let ordered = entry(Some(Settled::new(Lsn(100), 1)), Some(Lsn(900)));
        assert!(ordered.has(Lsn(99), 1) && !ordered.has(Lsn(100), 1));
        assert!(!ordered.has(Lsn(99), 2));
        assert_eq!(ordered.due(Lsn(1_000)), None);
    }

    #[test]
    fn what_an_older_release_remembered_is_still_due() {
        let text = r#"[{"schema":"public","table":"t","since":"0/32"}]"#;
        let read: Vec<Entry> = serde_json::from_str(text).expect("understood");
        assert_eq!(read, [entry(None, None)]);
        assert_eq!(serde_json::to_string(&read).expect("plain JSON"), text);
    }
}
