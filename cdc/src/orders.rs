//! Backfills that capture orders by itself: rows of a table have changed, and no change of them was captured.

mod unsynced;

use std::collections::BTreeSet;
use std::time::Duration;

use async_nats::jetstream::kv::{self, Operation};
use futures_util::TryStreamExt;
use millrace_config::Config;
use millrace_event::TableName;
use millrace_event::work::{self, BackfillOrder, orders_key};

use self::unsynced::Placed;
pub(crate) use self::unsynced::{Unsynced, renew};
use crate::Error;
use crate::life::Stream;
use crate::understood;

/// A list that others change at the same moment is tried so often, with a pause between.
const ATTEMPTS: u32 = 8;
const PAUSE: Duration = Duration::from_millis(50);

/// How many orders of ours a sink's list has of one table: of a sink that does not run, the newest say it all.
const ORDERS_OF_TABLE_MAX: usize = 4;

/// Why rows are read again: it begins an order's id, and tells our orders from an operator's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// The table was out of the publication for a while.
    Published,
    /// Other columns, masks or rows are selected.
    Selection,
    /// The table is not captured for a while.
    Removed,
}

impl Cause {
    fn word(self) -> &'static str {
        match self {
            Self::Published => "published",
            Self::Selection => "selection",
            Self::Removed => "removed",
        }
    }

    /// The id of the order that this causes. `revision` is that of the memory which showed it: the same again
    /// after a crash, and another one at the next time.
    pub(crate) fn order_id(self, table: &TableName, revision: u64) -> String {
        format!("{}-{}-{revision}", self.word(), work::schema_key(table))
    }
}

/// What the ids of our orders begin with; `schema` and `named` are those of [`crate::seen`], `left-out` those of
/// [`crate::left_out`]. An operator's begin with a number.
const OURS: [&str; 6] = [
    "published-",
    "selection-",
    "removed-",
    "schema-",
    "named-",
    "left-out-",
];

/// Has every sink read all rows of a table again: also one that is not configured now, or not with this table, and
/// that may come back. A sink without the table strikes the order off its list. The same `id` orders it once, however
/// often it is said, until it was carried out: name what has happened, not when it was noticed, and let no two tables
/// share one.
///
/// # Errors
/// The broker is away. Or a sink's list is not understood: what it orders must not be lost.
pub(crate) async fn order_backfill(
    config: &Config,
    stream: &Stream,
    table: &TableName,
    id: &str,
) -> Result<(), Error> {
    let mut placed = Vec::new();
    for sink in sinks(config, &stream.sinks).await? {
        let revision = order(&stream.copies, &sink, table, id).await?;
        tracing::info!(%sink, %table, order = id, "backfill ordered");
        placed.push(Placed {
            sink,
            table: table.clone(),
            id: id.to_owned(),
            revision,
            witness: None,
        });
    }
    if placed.is_empty() || config.stream.kept_until_synced().is_none() {
        return Ok(());
    }
    let witness = unsynced::witness(&stream.copies).await?;
    for placed in &mut placed {
        placed.witness = Some(witness);
    }
    // Before the caller remembers that it has ordered.
    stream.unsynced.keep(&stream.state, placed).await
}

/// The sinks that are configured, and those that ever reported.
async fn sinks(config: &Config, reports: &kv::Store) -> Result<BTreeSet<String>, Error> {
    let configured = config.sinks.iter().map(|sink| sink.name.clone());
    Ok(configured.chain(reporting(reports).await?).collect())
}

/// The sinks that ever reported.
///
/// # Errors
/// The broker is away.
pub(crate) async fn reporting(reports: &kv::Store) -> Result<Vec<String>, Error> {
    let failed = |error| Error::retry("sink reports cannot be read", error);
    let reported = reports.keys().await.map_err(failed)?;
    reported
        .try_collect()
        .await
        .map_err(|error| Error::retry("sink reports cannot be read", error))
}

/// Puts an order on a sink's list, if it is not there. Returns the list's revision.
async fn order(copies: &kv::Store, sink: &str, table: &TableName, id: &str) -> Result<u64, Error> {
    let key = orders_key(sink);
    for _ in 0..ATTEMPTS {
        let entry = crate::stream::entry(copies, &key)
            .await
            .map_err(|error| Error::retry("backfill orders cannot be read", error))?;
        let (orders, revision) = match entry {
            Some(entry) if entry.operation == Operation::Put => {
                let orders = understood(&copies.name, &key, &entry.value)?;
                (orders, entry.revision)
            }
            entry => (Vec::new(), entry.map_or(0, |entry| entry.revision)),
        };
        let Some(orders) = added(orders, table, id) else {
            return Ok(revision);
        };
        let value = serde_json::to_vec(&orders).expect("plain JSON");
        if let Ok(revision) = copies.update(&key, value.into(), revision).await {
            return Ok(revision);
        }
        // Somebody else changed the list, or the broker is away: the next look tells.
        tokio::time::sleep(PAUSE).await;
    }
    Err(Error::retry_because("backfill orders cannot be stored"))
}

/// A sink's list with an order more; `None` where it has it.
fn added(
    mut orders: Vec<BackfillOrder>,
    table: &TableName,
    id: &str,
) -> Option<Vec<BackfillOrder>> {
    let is_it = |order: &BackfillOrder| order.id == id && order.table == *table;
    if orders.iter().any(is_it) {
        return None;
    }
    // The oldest may be under way, which its sink remembers by itself. What an operator paces or pauses stays.
    let ours = |order: &BackfillOrder| {
        OURS.iter().any(|begin| order.id.starts_with(begin)) && *order == owed(&order.id, table)
    };
    let count = orders.iter().filter(|order| ours(order)).count();
    let mut surplus = (count + 1).saturating_sub(ORDERS_OF_TABLE_MAX);
    orders.retain(|order| {
        let goes = surplus > 0 && ours(order);
        surplus -= usize::from(goes);
        !goes
    });
    orders.push(owed(id, table));
    Some(orders)
}

/// An order that nobody but the table's end ends.
fn owed(id: &str, table: &TableName) -> BackfillOrder {
    BackfillOrder {
        owed: true,
        ..BackfillOrder::new(id.to_owned(), table.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(name: &str) -> TableName {
        TableName::new("public", name)
    }

    fn ids(orders: &[BackfillOrder]) -> Vec<&str> {
        orders.iter().map(|order| order.id.as_str()).collect()
    }

    #[test]
    fn ids_differ_by_cause_table_and_time() {
        let id = |cause: Cause, name, revision| cause.order_id(&table(name), revision);
        let causes = [Cause::Published, Cause::Selection, Cause::Removed];
        let mut all = BTreeSet::new();
        for cause in causes {
            for name in ["a", "b", "b-1", "b.c"] {
                for revision in [1, 2, 11] {
                    let id = id(cause, name, revision);
                    assert!(OURS.iter().any(|begin| id.starts_with(begin)), "{id}");
                    assert!(all.insert(id.clone()), "{id} twice");
                }
            }
        }
        assert_eq!(id(Cause::Removed, "a", 7), "removed-public.a-7");
        assert_eq!(id(Cause::Removed, "a", 7), id(Cause::Removed, "a", 7));
    }

    #[test]
    fn an_order_is_known_by_its_id_and_its_table() {
        let (a, b) = (table("a"), table("b"));
        let orders = added(Vec::new(), &a, "published-1").expect("new");
        assert_eq!(added(orders.clone(), &a, "published-1"), None);
        let orders = added(orders, &b, "published-1").expect("of another table");
        assert_eq!(orders.len(), 2);
    }

    #[test]
    fn a_sink_that_never_returns_has_a_list_that_ends() {
        let (a, b) = (table("a"), table("b"));
        let mut paused = owed("selection-public.a-0", &a);
        paused.paused = true;
        let own = BackfillOrder::new("19ab-0".to_owned(), a.clone());
        let mut orders = vec![paused, own];
        for revision in 1..=6 {
            for table in [&a, &b] {
                let id = Cause::Removed.order_id(table, revision);
                orders = added(orders, table, &id).expect("new");
            }
        }
        let of = |table: &TableName| {
            let of = orders.iter().filter(|order| order.table == *table);
            of.cloned().collect::<Vec<_>>()
        };
        assert_eq!(
            ids(&of(&a)),
            [
                "selection-public.a-0",
                "19ab-0",
                "removed-public.a-3",
                "removed-public.a-4",
                "removed-public.a-5",
                "removed-public.a-6"
            ]
        );
        assert_eq!(of(&b).len(), ORDERS_OF_TABLE_MAX);
    }
}
