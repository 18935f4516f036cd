//! Orders that the broker may still lose. Their lists and what is remembered of their causes are synced each by itself: a
//! broker that loses power may keep that something was ordered, and lose the order. Until an order is older than what
//! a broker may lose, it is looked for on its sink's list, and given again where it has gone.
//!
//! A list that is as old as the order or older has lost it. Whoever takes an order off writes the list anew, so a newer
//! list without it says that it was carried out; unless the list was lost first, and somebody who did not know wrote it
//! again. So capture writes a witness behind the lists, into the same bucket: a broker loses what it wrote last, and never
//! the lists without their witness. An order's witness goes with its list: to one that is written again another one belongs.

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use async_nats::jetstream::kv::{self, Operation};
use millrace_config::Config;
use millrace_event::TableName;
use millrace_event::work::{BackfillOrder, orders_key};
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;

use super::{ATTEMPTS, PAUSE, order};
use crate::life::Stream;
use crate::{Error, identity, understood};

/// Where they are remembered.
const KEY: &str = "ordered";

/// Where the witnesses are, in the bucket of the lists.
const WITNESSES: &str = "witnesses";

/// So many are looked for; of more, the oldest are taken for synced.
const ORDERS_MAX: usize = 1_024;

/// An order as it was put on a sink's list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Placed {
    pub(super) sink: String,
    pub(super) table: TableName,
    pub(super) id: String,
    /// The list's revision that has it.
    pub(super) revision: u64,
    /// What was written behind the list; `None` of an order that is older than that.
    #[serde(default)]
    pub(super) witness: Option<u64>,
}

/// An order that was not on its list for long enough.
#[derive(Clone, Debug)]
struct Young {
    placed: Placed,
    /// When this life first saw the list's revision: what an earlier life has waited counts for nothing.
    since: Instant,
}

/// The orders that the broker may still lose; `None` before they were read.
#[derive(Default)]
pub(crate) struct Unsynced(Mutex<Option<Vec<Young>>>);

/// A sink's list.
struct List {
    /// Zero where there is none.
    revision: u64,
    /// `None` where it is not understood: nothing is known of its orders, and whoever gives one more says so.
    orders: Option<Vec<BackfillOrder>>,
}

/// What has become of an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// It is on the list, and may still be lost.
    Young,
    /// It is on the list for good, or was carried out.
    Settled,
    /// The broker lost it.
    Lost,
}

/// `witnesses` are those that the bucket has. `held` is how long the list has been as it is, and `age` how long the broker may take to sync it.
fn fate(placed: &Placed, list: &List, witnesses: &[u64], held: Duration, age: Duration) -> Fate {
    let Some(orders) = &list.orders else {
        return Fate::Young;
    };
    let is_it = |order: &BackfillOrder| order.id == placed.id && order.table == placed.table;
    if !orders.iter().any(is_it) {
        let witnessed = placed
            .witness
            .is_none_or(|witness| witnesses.contains(&witness));
        return match list.revision > placed.revision && witnessed {
            true => Fate::Settled,
            false => Fate::Lost,
        };
    }
    match held >= age && list.revision == placed.revision {
        true => Fate::Settled,
        false => Fate::Young,
    }
}

impl Young {
    /// Whether no witness stands behind the list that has the order: it was written again, or its witness was lost.
    fn is_unwitnessed(&self, list: &List, witnesses: &[u64]) -> bool {
        let lacks = |witness| !witnesses.contains(&witness);
        self.placed.revision != list.revision || self.placed.witness.is_some_and(lacks)
    }

    /// Goes with the list's `revision`, which `witness` was written behind.
    fn follow(&mut self, revision: u64, witness: u64, now: Instant) {
        if revision != self.placed.revision {
            (self.placed.revision, self.since) = (revision, now);
        }
        self.placed.witness = Some(witness);
    }
}

impl Unsynced {
    /// Remembers orders that were just given.
    pub(super) async fn keep(&self, state: &kv::Store, placed: Vec<Placed>) -> Result<(), Error> {
        let mut young = self.0.lock().await;
        let young = read(&mut young, state).await?;
        for placed in placed {
            let known = |young: &Young| {
                let known = &young.placed;
                (&known.sink, &known.table, &known.id) == (&placed.sink, &placed.table, &placed.id)
            };
            young.retain(|young| !known(young));
            young.push(Young {
                placed,
                since: Instant::now(),
            });
        }
        young.drain(..young.len().saturating_sub(ORDERS_MAX));
        store(state, young).await
    }
}

/// Gives orders again that the broker lost, as far as it may lose what it has acknowledged.
///
/// # Errors
/// The broker is away.
pub(crate) async fn renew(config: &Config, stream: &Stream) -> Result<(), Error> {
    let Some(age) = config.stream.kept_until_synced() else {
        return Ok(());
    };
    let mut young = stream.unsynced.0.lock().await;
    let young = read(&mut young, &stream.state).await?;
    let sinks: BTreeSet<_> = young
        .iter()
        .map(|young| young.placed.sink.clone())
        .collect();
    let mut lists = HashMap::with_capacity(sinks.len());
    for sink in sinks {
        let list = list(&stream.copies, &sink).await?;
        lists.insert(sink, list);
    }
    let witnesses = match young.is_empty() {
        true => Vec::new(),
        false => witnesses(&stream.copies).await?.0,
    };
    let mut left = Vec::with_capacity(young.len());
    // Those that a new witness is written for, and the revisions of their lists.
    let mut anew = Vec::new();
    for known in young.iter() {
        let placed = &known.placed;
        let Placed {
            sink, table, id, ..
        } = placed;
        let list = &lists[sink];
        let held = known.since.elapsed();
        match fate(placed, list, &witnesses, held, age) {
            Fate::Settled => continue,
            Fate::Young if known.is_unwitnessed(list, &witnesses) => {
                anew.push((left.len(), list.revision));
            }
            Fate::Young => {}
            Fate::Lost => {
                tracing::warn!(%sink, %table, order = id, "the broker lost a backfill order: it is given again");
                let revision = order(&stream.copies, sink, table, id).await?;
                anew.push((left.len(), revision));
            }
        }
        left.push(known.clone());
    }
    if anew.is_empty() && left.len() == young.len() {
        return Ok(());
    }
    if !anew.is_empty() {
        let witness = witness(&stream.copies).await?;
        for (index, revision) in anew {
            left[index].follow(revision, witness, Instant::now());
        }
    }
    *young = left;
    store(&stream.state, young).await
}

/// Bears witness to the lists that were written before. Whoever writes it again takes over what is there, so what the
/// broker lost never comes back.
///
/// # Errors
/// The broker is away.
pub(super) async fn witness(copies: &kv::Store) -> Result<u64, Error> {
    let witness = rand::random();
    for _ in 0..ATTEMPTS {
        let (mut all, revision) = witnesses(copies).await?;
        all.push(witness);
        all.drain(..all.len().saturating_sub(ORDERS_MAX));
        let value = serde_json::to_vec(&all).expect("plain JSON");
        if copies
            .update(WITNESSES, value.into(), revision)
            .await
            .is_ok()
        {
            return Ok(witness);
        }
        // Another capture wrote, or the broker is away: the next look tells.
        tokio::time::sleep(PAUSE).await;
    }
    Err(Error::retry_because("backfill orders cannot be stored"))
}

/// The newest witnesses, and their revision.
async fn witnesses(copies: &kv::Store) -> Result<(Vec<u64>, u64), Error> {
    let entry = crate::stream::entry(copies, WITNESSES)
        .await
        .map_err(|error| Error::retry("backfill orders cannot be read", error))?;
    let revision = entry.as_ref().map_or(0, |entry| entry.revision);
    let all = match entry.filter(|entry| entry.operation == Operation::Put) {
        Some(entry) => understood(&copies.name, WITNESSES, &entry.value)?,
        None => Vec::new(),
    };
    Ok((all, revision))
}

/// A sink's list as it is now.
async fn list(copies: &kv::Store, sink: &str) -> Result<List, Error> {
    let key = orders_key(sink);
    let entry = crate::stream::entry(copies, &key)
        .await
        .map_err(|error| Error::retry("backfill orders cannot be read", error))?;
    let revision = entry.as_ref().map_or(0, |entry| entry.revision);
    let orders = match entry.filter(|entry| entry.operation == Operation::Put) {
        Some(entry) => understood(&copies.name, &key, &entry.value).ok(),
        None => Some(Vec::new()),
    };
    Ok(List { revision, orders })
}

/// The orders, which are read when they are first asked for.
async fn read<'y>(
    young: &'y mut Option<Vec<Young>>,
    state: &kv::Store,
) -> Result<&'y mut Vec<Young>, Error> {
    if young.is_none() {
        let stored: Option<Vec<Placed>> = identity::read(state, KEY).await?;
        let since = Instant::now();
        let stored = stored.unwrap_or_default().into_iter();
        let stored = stored.map(|placed| Young { placed, since });
        *young = Some(stored.collect());
    }
    Ok(young.get_or_insert_default())
}

async fn store(state: &kv::Store, young: &[Young]) -> Result<(), Error> {
    let placed: Vec<_> = young.iter().map(|young| &young.placed).collect();
    let value = serde_json::to_vec(&placed).expect("plain JSON");
    identity::store(state, KEY, value).await
}

#[cfg(test)]
mod tests {
    use super::*;

    const AGE: Duration = Duration::from_secs(150);

    fn placed() -> Placed {
        Placed {
            sink: "replica".to_owned(),
            table: TableName::new("public", "t"),
            id: "schema-7".to_owned(),
            revision: 10,
            witness: Some(7),
        }
    }

    fn at(held_secs: u64, revision: u64, orders: &[(&str, &str)]) -> Fate {
        let order = |(id, table): &(&str, &str)| {
            BackfillOrder::new((*id).to_owned(), TableName::new("public", *table))
        };
        let list = List {
            revision,
            orders: Some(orders.iter().map(order).collect()),
        };
        fate(
            &placed(),
            &list,
            &[6, 7],
            Duration::from_secs(held_secs),
            AGE,
        )
    }

    #[test]
    fn an_order_is_looked_for_until_its_list_is_synced() {
        let has = [("named-1", "u"), ("schema-7", "t")];
        assert_eq!(at(149, 10, &has), Fate::Young);
        assert_eq!(at(150, 10, &has), Fate::Settled);
        // It was written again since, and is as young as that.
        assert_eq!(at(150, 12, &has), Fate::Young);
        // Its sink has taken it off.
        assert_eq!(at(1, 12, &[("named-1", "u")]), Fate::Settled);
        assert_eq!(at(1, 12, &[]), Fate::Settled);
    }

    #[test]
    fn an_order_that_is_not_on_a_list_of_before_is_lost() {
        for held in [0, 149, 500] {
            assert_eq!(at(held, 0, &[]), Fate::Lost);
            assert_eq!(at(held, 9, &[("named-1", "u")]), Fate::Lost);
            assert_eq!(at(held, 10, &[("schema-7", "u")]), Fate::Lost);
        }
    }

    #[test]
    fn a_newer_list_says_nothing_where_the_broker_lost_the_older_one() {
        let fate = |placed: &Placed, witnesses: &[u64], orders| {
            let list = List {
                revision: 12,
                orders: Some(orders),
            };
            fate(placed, &list, witnesses, AGE, AGE)
        };
        for witnesses in [&[][..], &[6], &[6, 8]] {
            assert_eq!(fate(&placed(), witnesses, Vec::new()), Fate::Lost);
        }
        // The witness alone was lost.
        let listed = BackfillOrder::new(placed().id, placed().table);
        assert_eq!(fate(&placed(), &[6], vec![listed]), Fate::Young);
        // Of a capture that knew no witnesses.
        let older = Placed {
            witness: None,
            ..placed()
        };
        assert_eq!(fate(&older, &[], Vec::new()), Fate::Settled);
    }

    /// What is known of the order at a list's revision; `witness` is written where one is wanted.
    fn followed(revision: u64, witnesses: &[u64], witness: u64) -> Option<Placed> {
        let (placed, since) = (placed(), Instant::now());
        let orders = vec![BackfillOrder::new(placed.id.clone(), placed.table.clone())];
        let list = List {
            revision,
            orders: Some(orders),
        };
        let fate = fate(&placed, &list, witnesses, Duration::ZERO, AGE);
        assert_eq!(fate, Fate::Young);
        let mut young = Young { placed, since };
        young.is_unwitnessed(&list, witnesses).then(|| {
            young.follow(list.revision, witness, since + AGE);
            assert_eq!(young.since > since, revision != 10);
            young.placed
        })
    }

    /// What a list without the order says.
    fn struck_off(placed: &Placed, revision: u64, witnesses: &[u64]) -> Fate {
        let list = List {
            revision,
            orders: Some(Vec::new()),
        };
        fate(placed, &list, witnesses, Duration::ZERO, AGE)
    }

    #[test]
    fn a_list_that_is_written_again_has_another_witness() {
        assert_eq!(followed(10, &[7], 8), None);
        let placed = followed(12, &[7], 8).expect("a witness is wanted");
        assert_eq!(struck_off(&placed, 14, &[7, 8]), Fate::Settled);
        // The broker lost the list of 12 and what was written behind it, not the witness of the one before, and somebody
        // who did not know wrote 14.
        assert_eq!(struck_off(&placed, 14, &[7]), Fate::Lost);
        assert_eq!(struck_off(&placed, 14, &[7, 9]), Fate::Lost);
    }

    #[test]
    fn a_witness_that_was_lost_alone_is_written_again() {
        let placed = followed(10, &[6], 8).expect("a witness is wanted");
        // Else what was carried out is ordered twice.
        assert_eq!(struck_off(&placed, 14, &[6, 8]), Fate::Settled);
        assert_eq!(struck_off(&placed, 14, &[6]), Fate::Lost);
    }

    #[test]
    fn a_list_that_nobody_understands_says_nothing() {
        let (revision, orders) = (12, None);
        let list = List { revision, orders };
        assert_eq!(fate(&placed(), &list, &[], AGE, AGE), Fate::Young);
    }
}
