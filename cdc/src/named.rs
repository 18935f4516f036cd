//! Tables that a transaction changed under another name: the changes went to that name's replicas, so the rows of both
//! are read again.

use async_nats::jetstream::kv;
use millrace_config::Config;
use millrace_event::TableName;
use serde::{Deserialize, Serialize};

use crate::capture::Named;
use crate::life::{Source, Stream};
use crate::orders::order_backfill;
use crate::settled::Settled;
use crate::{Error, identity, source};

/// Where it is remembered what was ordered.
const KEY: &str = "named";

/// So many names are remembered; of one that was forgotten the rows are read once more.
const NAMES_MAX: usize = 256;

/// A name under which a table was changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    /// The table's OID.
    oid: u32,
    /// The table.
    table: TableName,
    /// The other name.
    name: TableName,
    /// The changes that the ordered rows have.
    ordered: Settled,
}

impl Entry {
    fn is_of(&self, table: &TableName, named: &Named) -> bool {
        self.oid == named.oid && self.table == *table && self.name == named.name
    }
}

/// Has the rows of a table, and those of the table whose name it had, read again; once, however often the WAL is read.
///
/// # Errors
/// The source or the broker is away.
pub(crate) async fn order(
    config: &Config,
    source: &Source,
    stream: &Stream,
    table: &TableName,
    named: &Named,
) -> Result<(), Error> {
    let entries: Option<Vec<Entry>> = identity::read(&stream.state, KEY).await?;
    let entries = entries.unwrap_or_default();
    if is_settled(&entries, table, named, source.timeline) {
        return Ok(());
    }
    // Before the order: the rows are read after it.
    let end = source::wal_position(&source.client).await?;
    tracing::info!(%table, name = %named.name, "the table was changed under another name: its rows are read again");
    let id = format!("named-{}-{}", named.oid, named.commit_lsn);
    order_backfill(config, stream, table, &id).await?;
    // They went to that table's replicas, if it has some.
    order_backfill(config, stream, &named.name, &id).await?;
    let ordered = Settled::new(end, source.timeline);
    store(&stream.state, &with(entries, table, named, ordered)).await
}

fn is_settled(entries: &[Entry], table: &TableName, named: &Named, timeline: u32) -> bool {
    let mut of = entries.iter().filter(|entry| entry.is_of(table, named));
    of.any(|entry| entry.ordered.has(named.commit_lsn, timeline))
}

/// The entries with one more, which takes the place of an older one of the same name.
fn with(mut entries: Vec<Entry>, table: &TableName, named: &Named, ordered: Settled) -> Vec<Entry> {
    entries.retain(|entry| !entry.is_of(table, named));
    let surplus = (entries.len() + 1).saturating_sub(NAMES_MAX);
    entries.drain(..surplus);
    entries.push(Entry {
        oid: named.oid,
        table: table.clone(),
        name: named.name.clone(),
        ordered,
    });
    entries
}

async fn store(state: &kv::Store, entries: &[Entry]) -> Result<(), Error> {
    let value = serde_json::to_vec(entries).expect("plain JSON");
    identity::store(state, KEY, value).await
}

#[cfg(test)]
mod tests {
    use millrace_event::Lsn;

    use super::*;

    fn named(oid: u32, name: &str, commit_lsn: u64) -> Named {
        Named {
            oid,
            name: TableName::new("public", name),
            commit_lsn: Lsn(commit_lsn),
        }
    }

    #[test]
    fn a_name_that_is_met_again_in_the_same_wal_is_settled() {
        let table = TableName::new("public", "t");
        let settled = Settled::new(Lsn(100), 1);
        let entries = with(Vec::new(), &table, &named(7, "old", 50), settled.clone());
        // The next life may begin behind the first change.
        for commit_lsn in [50, 60, 99] {
            assert!(is_settled(
                &entries,
                &table,
                &named(7, "old", commit_lsn),
                1
            ));
        }
        assert!(!is_settled(&entries, &table, &named(7, "old", 100), 1));
        assert!(!is_settled(&entries, &table, &named(7, "old", 50), 2));
        assert!(!is_settled(&entries, &table, &named(7, "older", 50), 1));
        assert!(!is_settled(&entries, &table, &named(8, "old", 50), 1));
        let now = TableName::new("public", "now");
        assert!(!is_settled(&entries, &now, &named(7, "old", 50), 1));
        let later = with(
            entries,
            &table,
            &named(7, "old", 120),
            Settled::new(Lsn(200), 1),
        );
        assert_eq!(later.len(), 1);
        assert!(is_settled(&later, &table, &named(7, "old", 150), 1));
    }

    #[test]
    fn the_oldest_names_are_forgotten() {
        let table = TableName::new("public", "t");
        let mut entries = Vec::new();
        for oid in 0..300 {
            entries = with(
                entries,
                &table,
                &named(oid, "old", 1),
                Settled::new(Lsn(9), 1),
            );
        }
        assert_eq!(entries.len(), NAMES_MAX);
        assert!(is_settled(&entries, &table, &named(299, "old", 1), 1));
        assert!(!is_settled(&entries, &table, &named(0, "old", 1), 1));
    }
}
