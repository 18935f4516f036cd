//! Backfills that capture orders by itself: rows of a table have changed, and no change of them was captured.

use std::time::Duration;

use async_nats::jetstream::kv::{self, Operation};
use millrace_config::Config;
use millrace_event::TableName;
use millrace_event::work::{BackfillOrder, orders_key};

use crate::Error;

/// A list that others change at the same moment is tried so often, with a pause between.
const ATTEMPTS: u32 = 8;
const PAUSE: Duration = Duration::from_millis(50);

/// Has every sink of a table read all its rows again. The same `id` orders it once, however often it is said, until
/// it was carried out: name what has happened, not when it was noticed.
///
/// # Errors
/// The broker is away.
pub(crate) async fn order_backfill(
    config: &Config,
    copies: &kv::Store,
    table: &TableName,
    id: &str,
) -> Result<(), Error> {
    for sink in &config.sinks {
        if config.tables_of(&sink.name).any(|own| own.name == *table) {
            order(copies, &sink.name, table, id).await?;
            tracing::info!(sink = %sink.name, %table, order = id, "backfill ordered");
        }
    }
    Ok(())
}

/// Has every sink that still has a table read all its rows again, configured or not: one that does not have it
/// strikes the order off its list.
///
/// # Errors
/// The broker is away.
pub(crate) async fn order_for_every_sink(
    config: &Config,
    copies: &kv::Store,
    table: &TableName,
    id: &str,
) -> Result<(), Error> {
    for sink in &config.sinks {
        order(copies, &sink.name, table, id).await?;
    }
    Ok(())
}

async fn order(copies: &kv::Store, sink: &str, table: &TableName, id: &str) -> Result<(), Error> {
    let key = orders_key(sink);
    for _ in 0..ATTEMPTS {
        let entry = copies
            .entry(&key)
            .await
            .map_err(|error| Error::retry("backfill orders cannot be read", error))?;
        let (mut orders, revision) = match entry {
            Some(entry) if entry.operation == Operation::Put => {
                let orders: Vec<BackfillOrder> =
                    serde_json::from_slice(&entry.value).unwrap_or_default();
                (orders, entry.revision)
            }
            entry => (Vec::new(), entry.map_or(0, |entry| entry.revision)),
        };
        if orders.iter().any(|order| order.id == id) {
            return Ok(());
        }
        orders.push(BackfillOrder::new(id.to_owned(), table.clone()));
        let value = serde_json::to_vec(&orders).expect("plain JSON");
        if copies.update(&key, value.into(), revision).await.is_ok() {
            return Ok(());
        }
        // Somebody else changed the list, or the broker is away: the next look tells.
        tokio::time::sleep(PAUSE).await;
    }
    Err(Error::retry_because("backfill orders cannot be stored"))
}
