//! What a sink reads and writes in the bucket of copies: its request, and the orders that it has carried out.

use std::collections::BTreeSet;

use async_nats::jetstream::kv::Operation;
use millrace_config::understood;
use millrace_event::work::{BackfillOrder, CopyRequest, orders_key};

use crate::error::Error;
use crate::life::Life;

/// The key of a sink's request.
pub(super) fn request_key(life: &Life<'_>) -> String {
    format!("request.{}", life.settings.name)
}

/// What the bucket has as the sink's request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Stored {
    /// None.
    Nothing,
    /// This one.
    Request(CopyRequest),
    /// One that is not understood: capture does not answer it, and it is left as it is.
    Unread,
}

/// Reads the sink's request.
pub(super) async fn stored_request(life: &Life<'_>) -> Result<Stored, Error> {
    let key = request_key(life);
    let failed = |error| Error::retry("copy requests cannot be read", error);
    let entry = life.copies.entry(&key).await.map_err(failed)?;
    let Some(entry) = entry.filter(|entry| entry.operation == Operation::Put) else {
        return Ok(Stored::Nothing);
    };
    Ok(match understood(&life.copies.name, &key, &entry.value) {
        Ok(request) => Stored::Request(request),
        Err(condition) => {
            life.unread_request.warn(entry.revision, &condition);
            Stored::Unread
        }
    })
}

/// Withdraws the request that is being answered, if there is one: capture then clears the copy stream away. Returns
/// whether there is none now: one that is not understood stays.
pub(crate) async fn withdraw(life: &Life<'_>) -> Result<bool, Error> {
    match stored_request(life).await? {
        Stored::Nothing => return Ok(true),
        Stored::Unread => return Ok(false),
        Stored::Request(_) => {}
    }
    let deleted = life.copies.delete(&request_key(life)).await;
    deleted.map_err(|error| Error::retry("a copy request cannot be withdrawn", error))?;
    Ok(true)
}

/// Takes orders that were carried out off the list, unless somebody changed it meanwhile: then next time.
pub(super) async fn strike(
    life: &Life<'_>,
    orders: &[BackfillOrder],
    carried_out: &BTreeSet<String>,
) -> Result<(), Error> {
    if carried_out.is_empty() {
        return Ok(());
    }
    let key = orders_key(&life.settings.name);
    let failed = |error| Error::retry("orders cannot be read", error);
    let Some(entry) = life.copies.entry(&key).await.map_err(failed)? else {
        return Ok(());
    };
    // Of a list that is not understood nothing is known to be carried out.
    let stored: Option<Vec<BackfillOrder>> = serde_json::from_slice(&entry.value).ok();
    if stored.as_deref() != Some(orders) {
        return Ok(());
    }
    let left: Vec<_> = orders
        .iter()
        .filter(|order| !carried_out.contains(&order.id))
        .collect();
    let value = serde_json::to_vec(&left).expect("plain JSON");
    let updated = life.copies.update(&key, value.into(), entry.revision).await;
    if let Err(error) = updated {
        tracing::debug!(%error, "the list of orders has changed");
    }
    Ok(())
}

pub(super) async fn put<T: serde::Serialize>(
    life: &Life<'_>,
    key: &str,
    value: &T,
) -> Result<(), Error> {
    let value = serde_json::to_vec(value).expect("plain JSON");
    life.copies
        .put(key, value.into())
        .await
        .map(|_| ())
        .map_err(|error| Error::retry("a copy request cannot be stored", error))
}
