//! What a sink reads and writes in the bucket of copies: its request, and the orders that it has carried out.

use millrace_event::work::{BackfillOrder, orders_key};

use crate::error::Error;
use crate::life::Life;

/// The key of a sink's request.
pub(super) fn request_key(life: &Life<'_>) -> String {
    format!("request.{}", life.settings.name)
}

/// Withdraws the request that is being answered, if there is one: capture then clears the copy stream away.
pub(crate) async fn withdraw(life: &Life<'_>) -> Result<(), Error> {
    let key = request_key(life);
    let failed = |error| Error::retry("copy requests cannot be read", error);
    if life.copies.get(&key).await.map_err(failed)?.is_none() {
        return Ok(());
    }
    life.copies
        .delete(&key)
        .await
        .map_err(|error| Error::retry("a copy request cannot be withdrawn", error))
}

/// Takes orders that were carried out off the list, unless somebody changed it meanwhile: then next time.
pub(super) async fn strike(life: &Life<'_>, orders: &[BackfillOrder]) -> Result<(), Error> {
    let finished = &life.progress.finished;
    if finished.is_empty() {
        return Ok(());
    }
    let key = orders_key(&life.settings.name);
    let failed = |error| Error::retry("orders cannot be read", error);
    let Some(entry) = life.copies.entry(&key).await.map_err(failed)? else {
        return Ok(());
    };
    let stored: Vec<BackfillOrder> = serde_json::from_slice(&entry.value).unwrap_or_default();
    if stored != orders {
        return Ok(());
    }
    let left: Vec<_> = orders
        .iter()
        .filter(|order| !finished.contains(&order.id))
        .collect();
    let value = serde_json::to_vec(&left).expect("plain JSON");
    let updated = life.copies.update(&key, value.into(), entry.revision).await;
    if let Err(error) = updated {
        tracing::debug!(%error, "the list of orders has changed");
    }
    Ok(())
}

pub(super) async fn read<T: serde::de::DeserializeOwned>(
    life: &Life<'_>,
    key: &str,
) -> Result<Option<T>, Error> {
    let entry = life
        .copies
        .get(key)
        .await
        .map_err(|error| Error::retry("copy requests cannot be read", error))?;
    Ok(entry.and_then(|entry| serde_json::from_slice(&entry).ok()))
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
