//! What each table looked like when its events were written, kept beside the stream: each version for ever, because
//! the stream may hold events of it, and the table as it is now.

use async_nats::jetstream::kv;
use millrace_event::{TableName, TableSchema, work};
use tokio_postgres::Client;

use crate::Error;
use crate::source::{self, SourceTable};

/// Keeps every table's schema: as the latest, and under its version.
///
/// # Errors
/// The source or the broker is away.
pub(crate) async fn describe_tables(
    client: &Client,
    schemas: &kv::Store,
    tables: &[SourceTable],
) -> Result<(), Error> {
    for table in tables {
        let schema = source::describe_selected(client, table, &table.shapes(), &table.key).await?;
        keep(schemas, &schema, Some(&schema)).await?;
    }
    Ok(())
}

/// Keeps the schema that events are about to name, and the table as it is now: what the WAL tells may be long past.
///
/// # Errors
/// The broker is away.
pub(crate) async fn keep(
    schemas: &kv::Store,
    announced: &TableSchema,
    now: Option<&TableSchema>,
) -> Result<(), Error> {
    let name = &announced.name;
    let version_key = work::schema_version_key(name, &announced.version);
    let known = read(schemas, &version_key, name).await?;
    let announced = match &known {
        Some(known) => announced.clone().with_numbers_of(known),
        None => announced.clone(),
    };
    let latest_key = work::schema_key(name);
    let before = read(schemas, &latest_key, name).await?;
    let latest = match (now, &before) {
        (Some(now), Some(before)) => now.clone().following(before).following(&announced),
        (Some(now), None) => now.clone().following(&announced),
        // It was dropped since: what was known of it stays.
        (None, Some(before)) => before.clone().following(&announced),
        (None, None) => announced.clone(),
    };
    // The latest first: a sink that meets the version must not find a table that is older than it.
    if before.as_ref() != Some(&latest) {
        write(schemas, &latest_key, &latest).await?;
    }
    if known.as_ref() != Some(&announced) {
        write(schemas, &version_key, &announced).await?;
    }
    Ok(())
}

async fn read(
    schemas: &kv::Store,
    key: &str,
    table: &TableName,
) -> Result<Option<TableSchema>, Error> {
    let entry = schemas
        .get(key)
        .await
        .map_err(|error| Error::retry("a table's schema cannot be read", error))?;
    let schema = entry.and_then(|entry| serde_json::from_slice::<TableSchema>(&entry).ok());
    Ok(schema.filter(|schema| schema.name == *table))
}

async fn write(schemas: &kv::Store, key: &str, schema: &TableSchema) -> Result<(), Error> {
    let value = serde_json::to_vec(schema).expect("plain JSON");
    schemas
        .put(key, value.into())
        .await
        .map(|_| ())
        .map_err(|error| Error::retry("a table's schema cannot be stored", error))
}
