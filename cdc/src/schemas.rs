//! What each table looked like when its events were written, kept beside the stream: each version for ever, because
//! the stream may hold events of it, and the table as it is now.

use async_nats::jetstream::kv;
use futures_util::TryStreamExt;
use millrace_event::{ColumnSchema, TableName, TableSchema, work};
use tokio_postgres::Client;

use crate::Error;
use crate::source::{self, SourceTable};
use crate::understood;

/// Keeps every table's schema: as the latest, and under its version.
///
/// # Errors
/// A table was changed meanwhile; or the source or the broker is away.
pub(crate) async fn describe_tables(
    client: &Client,
    schemas: &kv::Store,
    tables: &[SourceTable],
) -> Result<(), Error> {
    for table in tables {
        if let Some(schema) = source::describe_now(client, table).await? {
            keep(schemas, table, &schema, Some(&schema)).await?;
        }
    }
    withhold(schemas, tables).await
}

/// Keeps the schema that events are about to name, and the table as it is now: what the WAL tells may be long past.
///
/// # Errors
/// The broker is away.
pub(crate) async fn keep(
    schemas: &kv::Store,
    table: &SourceTable,
    announced: &TableSchema,
    now: Option<&TableSchema>,
) -> Result<(), Error> {
    let name = &announced.name;
    let latest_key = work::schema_key(name);
    let announced_key = work::schema_version_key(name, &announced.version);
    let known = Known {
        announced: read(schemas, &announced_key, name).await?,
        now: match now.filter(|now| now.version != announced.version) {
            Some(now) => {
                let key = work::schema_version_key(name, &now.version);
                read(schemas, &key, name).await?
            }
            None => None,
        },
        latest: read(schemas, &latest_key, name).await?,
    };
    let kept = kept(&known, announced, now, |column| withheld(table, column));
    // A sink that has taken the latest for its own looks it up by its version later.
    if let Some(now) = kept.now.filter(|now| known.now.as_ref() != Some(now)) {
        let key = work::schema_version_key(name, &now.version);
        write(schemas, &key, &now).await?;
    }
    // The latest first: a sink that meets the version must not find a table that is older than it.
    if known.latest.as_ref() != Some(&kept.latest) {
        write(schemas, &latest_key, &kept.latest).await?;
    }
    if known.announced.as_ref() != Some(&kept.announced) {
        write(schemas, &announced_key, &kept.announced).await?;
    }
    Ok(())
}

/// Whether a version of a table's schema is kept.
///
/// # Errors
/// The broker is away.
pub(crate) async fn has(
    schemas: &kv::Store,
    table: &TableName,
    version: &str,
) -> Result<bool, Error> {
    let key = work::schema_version_key(table, version);
    Ok(read(schemas, &key, table).await?.is_some())
}

/// What is stored of a table.
#[derive(Debug, Default)]
struct Known {
    /// Under the version that events are about to name.
    announced: Option<TableSchema>,
    /// Under the version that the table has now, where that is another one.
    now: Option<TableSchema>,
    /// As the latest.
    latest: Option<TableSchema>,
}

/// What is to be stored of a table.
#[derive(Debug)]
struct Kept {
    announced: TableSchema,
    /// `None` where that is `announced`, or the table is gone.
    now: Option<TableSchema>,
    latest: TableSchema,
}

/// `now` must be as the catalog was when it had all that the WAL has told: a name that it lacks is gone.
fn kept(
    known: &Known,
    announced: &TableSchema,
    now: Option<&TableSchema>,
    withheld: impl Fn(&ColumnSchema) -> bool,
) -> Kept {
    let same = now.is_some_and(|now| now.version == announced.version);
    let announced = match &known.announced {
        // A name may have come back with another number. Such events must not wait for a column that is gone.
        Some(known) if same => announced.clone().with_missing_of(known),
        Some(known) => announced.clone().with_numbers_of(known),
        None => announced.clone(),
    };
    let latest = match (now, &known.latest) {
        (Some(now), Some(before)) => now.clone().following(before).following(&announced),
        (Some(now), None) => now.clone().following(&announced),
        // It was dropped since: what was known of it stays.
        (None, Some(before)) => before.clone().following(&announced),
        (None, None) => announced.clone(),
    };
    let now = now.filter(|_| !same).map(|now| match &known.now {
        Some(known) => now.clone().with_missing_of(known),
        None => now.clone(),
    });
    Kept {
        announced: announced.withholding(&withheld),
        now: now.map(|now| now.withholding(&withheld)),
        latest: latest.withholding(&withheld),
    }
}

/// Takes values that are withheld from now on out of what is stored of earlier versions.
async fn withhold(schemas: &kv::Store, tables: &[SourceTable]) -> Result<(), Error> {
    let withholds = |table: &&SourceTable| {
        let columns = &table.settings.columns;
        !columns.exclude.is_empty() || !columns.mask.is_empty()
    };
    let tables: Vec<_> = tables.iter().filter(withholds).collect();
    if tables.is_empty() {
        return Ok(());
    }
    let failed = |error| Error::retry("the tables' schemas cannot be listed", error);
    let keys = schemas.keys().await.map_err(failed)?;
    let failed = |error| Error::retry("the tables' schemas cannot be listed", error);
    let keys: Vec<String> = keys.try_collect().await.map_err(failed)?;
    for table in tables {
        let versions = work::schema_version_key(&table.name, "");
        for key in keys.iter().filter(|key| key.starts_with(&versions)) {
            let Some(known) = read(schemas, key, &table.name).await? else {
                continue;
            };
            let without = known.clone().withholding(|column| withheld(table, column));
            if without != known {
                write(schemas, key, &without).await?;
            }
        }
    }
    Ok(())
}

/// Whether a column's values must not be stored: it is masked or left out, under this name or the one it has now.
fn withheld(table: &SourceTable, column: &ColumnSchema) -> bool {
    let named_now = table.name_of(column.number);
    let leaves = |name: &str| table.selection.leaves(name);
    !leaves(&column.name) || named_now.is_some_and(|name| !leaves(name))
}

async fn read(
    schemas: &kv::Store,
    key: &str,
    table: &TableName,
) -> Result<Option<TableSchema>, Error> {
    let entry = crate::stream::value(schemas, key)
        .await
        .map_err(|error| Error::retry("a table's schema cannot be read", error))?;
    let Some(entry) = entry else { return Ok(None) };
    let schema: TableSchema = understood(&schemas.name, key, &entry)?;
    Ok(Some(schema).filter(|schema| schema.name == *table))
}

async fn write(schemas: &kv::Store, key: &str, schema: &TableSchema) -> Result<(), Error> {
    let value = serde_json::to_vec(schema).expect("plain JSON");
    schemas
        .put(key, value.into())
        .await
        .map(|_| ())
        .map_err(|error| Error::retry("a table's schema cannot be stored", error))
}

#[cfg(test)]
mod tests {
    use super::*;

    type Columns<'c> = &'c [(i16, &'c str, Option<&'c str>)];

    /// One version for the same names.
    fn described(columns: Columns<'_>) -> TableSchema {
        let names: Vec<_> = columns.iter().map(|(_, name, _)| *name).collect();
        let column = |(number, name, missing): &(i16, &str, Option<&str>)| ColumnSchema {
            name: (*name).to_owned(),
            type_name: "integer".to_owned(),
            type_oid: 23,
            typmod: -1,
            not_null: false,
            number: *number,
            missing: missing.map(str::to_owned),
            former: Vec::new(),
        };
        TableSchema {
            name: TableName::new("public", "t"),
            version: names.join(","),
            columns: columns.iter().map(column).collect(),
            key: vec!["id".to_owned()],
            types: Vec::new(),
            oid: 7,
            dropped: Vec::new(),
        }
    }

    fn nothing(_: &ColumnSchema) -> bool {
        false
    }

    #[test]
    fn a_version_that_the_table_has_again_has_the_numbers_of_now() {
        let first = described(&[(1, "id", None), (2, "v", Some("old"))]);
        let again = described(&[(1, "id", Some("1")), (3, "v", None)]);
        let known = Known {
            announced: Some(first.clone()),
            now: None,
            latest: Some(first.clone()),
        };
        let kept_now = kept(&known, &again, Some(&again), nothing);
        assert_eq!(kept_now.announced, again);
        // A rename has passed since: the catalog says nothing of the old name.
        let bare = described(&[(1, "id", None), (0, "v", None)]);
        let renamed = described(&[(1, "id", None), (2, "w", None)]);
        let kept_old = kept(&known, &bare, Some(&renamed), nothing);
        assert_eq!(kept_old.announced, first);
        // The catalog forgets the values of older rows at a compaction.
        let compacted = described(&[(1, "id", None), (2, "v", None)]);
        let kept_old = kept(&known, &compacted, Some(&compacted), nothing);
        assert_eq!(kept_old.announced, first);
    }

    #[test]
    fn the_table_as_it_is_now_is_found_under_its_version() {
        let announced = described(&[(1, "id", None), (0, "a", None)]);
        let now = described(&[(1, "id", None), (3, "b", None)]);
        let both = kept(&Known::default(), &announced, Some(&now), nothing);
        assert_eq!(both.now.as_ref(), Some(&now));
        assert_eq!(both.latest.version, now.version);
        assert_eq!(both.latest.dropped, ["a"]);
        let filled = described(&[(1, "id", None), (3, "b", Some("5"))]);
        let known = Known {
            now: Some(filled.clone()),
            ..Known::default()
        };
        let both = kept(&known, &announced, Some(&now), nothing);
        assert_eq!(both.now, Some(filled));
        let one = kept(&Known::default(), &now, Some(&now), nothing);
        assert_eq!((one.now, one.announced), (None, now));
    }

    #[test]
    fn what_is_withheld_is_never_kept() {
        let raw = described(&[(1, "id", None), (2, "v", Some("secret"))]);
        let other = described(&[(1, "id", None), (2, "v", Some("secret")), (3, "w", None)]);
        let known = Known {
            announced: Some(raw.clone()),
            now: Some(other.clone()),
            latest: Some(raw.clone()),
        };
        let masked = |column: &ColumnSchema| column.name == "v";
        let all = kept(&known, &raw, Some(&other), masked);
        let all = [Some(all.announced), all.now, Some(all.latest)];
        for schema in all.into_iter().flatten() {
            assert_eq!(schema.columns[1].missing, None, "{schema:?}");
        }
    }
}
