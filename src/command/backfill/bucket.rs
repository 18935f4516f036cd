//! The bucket of copies: what operators order, and what a sink and capture say about it.

use std::time::Duration;

use async_nats::jetstream::Context;
use async_nats::jetstream::kv::{self, Operation, UpdateErrorKind};
use millrace_cdc::{stream, understood};
use millrace_config::{Code, Condition, Config};
use millrace_event::subject;
use millrace_event::work::{self, BackfillOrder, CopyRequest, CopyStatus, orders_key};

use super::super::status::{in_time, stream_condition};
use super::NAME;
use super::orders::Decided;
use crate::connection::{self, chain};

/// A list that others change at the same moment is tried so often, with a growing pause between.
const ATTEMPTS: u32 = 8;
const PAUSE: Duration = Duration::from_millis(20);

/// The bucket of a source.
pub(super) struct Bucket {
    store: kv::Store,
    jetstream: Context,
    /// The name of the source's stream.
    stream: String,
}

/// A sink's orders as they are stored.
#[derive(Debug, Default)]
pub(super) struct Listed {
    /// The orders.
    pub(super) orders: Vec<BackfillOrder>,
    /// The bucket's sequence of this list; 0 where there is none.
    pub(super) revision: u64,
}

/// Everything that is told about a sink's copies.
#[derive(Debug, Default)]
pub(super) struct Told {
    /// What was ordered.
    pub(super) orders: Vec<BackfillOrder>,
    /// What capture says about the request that the sink makes now.
    pub(super) status: Option<CopyStatus>,
}

impl Bucket {
    /// Opens the source's bucket.
    ///
    /// # Errors
    /// NATS cannot be reached, or capture has never run.
    pub(super) async fn open(config: &Config) -> Result<Self, Condition> {
        let name = subject::bucket_name(&config.source.name, work::COPIES);
        in_time(Code::StreamUnreachable, async {
            let jetstream = connection::nats(&config.stream, NAME).await?;
            let found = stream::find_stream(&jetstream, &format!("KV_{name}")).await;
            if found.map_err(|error| stream_condition(&error))?.is_none() {
                return Err(Condition::new(
                    Code::BackfillNotReady,
                    format!("bucket {name} does not exist: capture has never run on this stream"),
                    "start `millrace run`: it makes every replica whole by itself",
                ));
            }
            let store = jetstream.get_key_value(&name).await;
            let store = store.map_err(|error| unreachable(&error))?;
            Ok(Self {
                store,
                jetstream,
                stream: subject::stream_name(&config.source.name),
            })
        })
        .await
    }

    /// The stream sequence of the newest message of the source's stream; `None`: there is no stream.
    ///
    /// # Errors
    /// It cannot be looked at.
    pub(super) async fn last_seq(&self) -> Result<Option<u64>, Condition> {
        in_time(Code::StreamUnreachable, async {
            let found = stream::find_stream(&self.jetstream, &self.stream).await;
            let found = found.map_err(|error| stream_condition(&error))?;
            Ok(found.map(|found| found.last_seq))
        })
        .await
    }

    /// A sink's orders.
    ///
    /// # Errors
    /// They cannot be read, or are not understood.
    pub(super) async fn orders(&self, sink: &str) -> Result<Listed, Condition> {
        let entry = self.entry(&orders_key(sink)).await?;
        let Some(entry) = entry else {
            return Ok(Listed::default());
        };
        let orders = match entry.operation {
            Operation::Put => understood(&self.store.name, &entry.key, &entry.value)?,
            Operation::Delete | Operation::Purge => Vec::new(),
        };
        Ok(Listed {
            orders,
            revision: entry.revision,
        })
    }

    /// Everything that is told about a sink's copies.
    ///
    /// # Errors
    /// It cannot be read, or is not understood.
    pub(super) async fn told(&self, sink: &str) -> Result<Told, Condition> {
        let request: Option<CopyRequest> = self.read(&format!("request.{sink}")).await?;
        let status: Option<CopyStatus> = self.read(&format!("status.{sink}")).await?;
        let current = |status: &CopyStatus| {
            let request = request.as_ref();
            request.is_some_and(|request| request.id == status.request)
        };
        Ok(Told {
            orders: self.orders(sink).await?.orders,
            status: status.filter(current),
        })
    }

    /// Changes a sink's orders as is decided by what they are. The decision is made anew when somebody else has
    /// changed them; one that changes nothing writes nothing. Returns it, and the list's revision.
    ///
    /// # Errors
    /// The list cannot be read or written, or others keep changing it.
    pub(super) async fn change(
        &self,
        sink: &str,
        decide: impl Fn(&[BackfillOrder]) -> Decided,
    ) -> Result<(Decided, u64), Condition> {
        let key = orders_key(sink);
        for attempt in 0..ATTEMPTS {
            tokio::time::sleep(PAUSE * attempt).await;
            let listed = self.orders(sink).await?;
            let decided = decide(&listed.orders);
            if decided.orders == listed.orders {
                return Ok((decided, listed.revision));
            }
            let value = serde_json::to_vec(&decided.orders).expect("plain JSON");
            let update = self.store.update(&key, value.into(), listed.revision);
            match in_time(Code::StreamUnreachable, async { Ok(update.await) }).await? {
                Ok(revision) => return Ok((decided, revision)),
                Err(error) if error.kind() == UpdateErrorKind::WrongLastRevision => {}
                Err(error) => return Err(unreachable(&error)),
            }
        }
        Err(Condition::new(
            Code::BackfillContended,
            format!(
                "the backfills of sink {sink} were changed by others {ATTEMPTS} times meanwhile"
            ),
            "run the command again",
        ))
    }

    async fn read<T: serde::de::DeserializeOwned>(
        &self,
        key: &str,
    ) -> Result<Option<T>, Condition> {
        let entry = self.entry(key).await?;
        let entry = entry.filter(|entry| entry.operation == Operation::Put);
        let value = entry.map(|entry| understood(&self.store.name, key, &entry.value));
        value.transpose()
    }

    async fn entry(&self, key: &str) -> Result<Option<kv::Entry>, Condition> {
        in_time(Code::StreamUnreachable, async {
            self.store
                .entry(key)
                .await
                .map_err(|error| unreachable(&error))
        })
        .await
    }
}

fn unreachable(error: &(dyn std::error::Error + 'static)) -> Condition {
    Condition::new(
        Code::StreamUnreachable,
        chain(error),
        "check that JetStream is on, and that this user may read and write the bucket \
         (see `millrace init-sql nats`)",
    )
}

#[cfg(test)]
mod tests {
    use futures_util::future::join_all;
    use millrace_event::TableName;
    use millrace_lab::{Nats, NatsOptions};

    use super::*;

    #[tokio::test]
    async fn operators_who_change_the_list_at_once_lose_nothing() {
        let nats = Nats::start(NatsOptions::default()).await.expect("nats");
        let jetstream = async_nats::jetstream::new(nats.client().await.expect("client"));
        let store = stream::bucket(&jetstream, "shop", work::COPIES, 1).await;
        let bucket = Bucket {
            store: store.expect("bucket"),
            jetstream,
            stream: subject::stream_name("shop"),
        };
        assert_eq!(bucket.last_seq().await, Ok(None));
        let operators = ["a", "b", "c", "d"];
        let change = |name: &'static str| {
            bucket.change("wh", move |listed| {
                let mut decided = Decided::from(listed);
                let table = TableName::new("public", name);
                decided
                    .orders
                    .push(BackfillOrder::new(name.to_owned(), table));
                decided
            })
        };
        for changed in join_all(operators.map(change)).await {
            let (decided, revision) = changed.expect("changed");
            assert!(revision > 0 && !decided.orders.is_empty());
        }
        let orders = bucket.orders("wh").await.expect("orders").orders;
        let mut ids: Vec<&str> = orders.iter().map(|order| order.id.as_str()).collect();
        ids.sort_unstable();
        assert_eq!(ids, operators);

        // What a deleted list held is no order any more, and the next list follows it.
        let deleted = bucket.store.delete(orders_key("wh")).await;
        deleted.expect("deleted");
        assert_eq!(bucket.orders("wh").await.expect("orders").orders, []);
        change("e").await.expect("changed");
        assert_eq!(bucket.orders("wh").await.expect("orders").orders.len(), 1);
    }
}
