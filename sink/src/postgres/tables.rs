//! Makes sure that a target table can take the source's rows, and lays them out for it.

mod checks;
mod create;
mod evolve;

use std::sync::Arc;

use millrace_config::{Code, Condition, Create, OnSchemaChange, Table};
use millrace_event::TableSchema;
use tokio_postgres::{Client, Error};

use super::apply::broken;
use super::fault::{self, Cause};
use super::session::{Session, Transaction};
use crate::evolution;
use crate::progress::CopyState;
use crate::row::{LayoutColumn, TableLayout};
use crate::sink::{Ensured, SinkError};
use crate::sql::{self, VERSION_COLUMN};

/// A column that the target should have.
struct Wanted {
    source: String,
    target: String,
    /// With modifiers.
    type_name: String,
    /// Without.
    base: String,
    not_null: bool,
    /// What rows have in it that are older than the column.
    missing: Option<String>,
    /// Its former names at the source.
    former: Vec<String>,
}

/// A column that the target has.
struct Found {
    name: String,
    type_name: String,
    base: String,
    not_null: bool,
    origin: Origin,
}

/// Where a column's value comes from when a statement gives none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// It is NULL.
    Nothing,
    /// A default, or an identity that gives way to the statement's value.
    Default,
    /// `GENERATED ALWAYS AS IDENTITY`: an insert may set it, an update may not.
    Identity,
    /// `GENERATED ALWAYS AS (..) STORED`: never what a statement says.
    Stored,
    /// `GENERATED ALWAYS AS (..) VIRTUAL`: the same, and not to be turned into a plain column.
    Virtual,
}

/// Ensures one table; everything it creates, it creates in one transaction.
pub(super) async fn ensure(
    session: &mut Session,
    sink: &str,
    schema: &TableSchema,
    before: Option<&TableSchema>,
    settings: &Table,
    create: Create,
) -> Result<Ensured, SinkError> {
    session.forget(&schema.name);
    let evolves = create == Create::Auto && settings.on_schema_change == OnSchemaChange::Evolve;
    if evolves {
        session.evolving.insert(schema.name.clone());
    } else {
        session.evolving.remove(&schema.name);
    }
    let copied = session.copied.tables.get(&schema.name);
    let begun = copied.is_some_and(CopyState::is_begun);
    let relation = settings.target.to_string();
    let ensuring = Ensuring {
        client: &session.client,
        sink,
        schema,
        before,
        settings,
        create,
        begun,
        holds: copied.is_some_and(CopyState::holds_rows),
        is_keyless: session.keyless.has(&relation),
        keyed: Keyed::of(copied, may_wait(session, settings)),
        // A label that an open transaction adds could not be used before its end.
        labels: evolves && matches!(session.transaction, Transaction::Closed),
    };
    let keyed = ensuring.keyed;
    let failed = |error| ensuring.failed(error);
    // A large source transaction may first touch a table while the target's transaction is open: it must stay.
    let (begin, keep, undo) = match session.transaction {
        Transaction::Closed => ("BEGIN", "COMMIT", "ROLLBACK"),
        Transaction::Open(_) => (
            "SAVEPOINT millrace_ensure",
            "RELEASE SAVEPOINT millrace_ensure",
            "ROLLBACK TO SAVEPOINT millrace_ensure",
        ),
        Transaction::Broken => return Err(broken()),
    };
    let begin = async || session.client.batch_execute(begin).await.map_err(failed);
    let end = async |is_ok: bool| {
        let end = if is_ok { keep } else { undo };
        session.client.batch_execute(end).await.map_err(failed)
    };
    begin().await?;
    let shaped = ensuring.shape().await;
    let ended = end(shaped.is_ok()).await;
    let shaped = shaped?;
    ended?;
    if shaped.created && keyed == Keyed::Later {
        session.keyless.created(relation);
    }
    // What was altered stays, whatever else is refused: its remedy counts on it.
    begin().await?;
    let ensured = ensuring.fit(shaped).await;
    let ended = end(ensured.is_ok()).await;
    let ensured = ensured?;
    ended?;
    Ok(ensured)
}

/// Whether a table that is created for its load may get its key behind the rows: the source has no key twice, and
/// neither has the target, which has the same key, of the same values.
fn may_wait(session: &Session, settings: &Table) -> bool {
    matches!(session.transaction, Transaction::Closed) && settings.key.is_none()
}

/// When a table that lacks its key gets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Keyed {
    /// It has had one: whoever took it away is told.
    Already,
    /// At once: it may have been created for a load that was cut off.
    Now,
    /// Behind the rows of its load, if it is created now; else at once.
    Later,
}

impl Keyed {
    /// That of a table whose copy stands so; `may_wait`: whether its key may come behind its rows.
    fn of(copied: Option<&CopyState>, may_wait: bool) -> Self {
        match copied {
            Some(CopyState::Pending { .. }) if may_wait => Self::Later,
            Some(
                CopyState::Pending { .. }
                | CopyState::Loading { .. }
                | CopyState::Chunks(_)
                | CopyState::Refused { .. },
            ) => Self::Now,
            None
            | Some(
                CopyState::Loaded { .. }
                | CopyState::Copied { .. }
                | CopyState::Parked { .. }
                | CopyState::Lapsed { .. },
            ) => Self::Already,
        }
    }
}

/// A target table of the shape that is wanted, as far as it could be given it.
struct Shaped {
    wanted: Vec<Wanted>,
    key: Vec<String>,
    found: Vec<Found>,
    created: bool,
    warnings: Vec<String>,
}

struct Ensuring<'a> {
    client: &'a Client,
    sink: &'a str,
    schema: &'a TableSchema,
    /// What it was when it was last laid out, where that is known.
    before: Option<&'a TableSchema>,
    settings: &'a Table,
    create: Create,
    /// Whether this sink has written the table before.
    begun: bool,
    /// Whether it has rows that will not come again by themselves.
    holds: bool,
    /// Whether it was created without its key, which it gets behind the rows of its load.
    is_keyless: bool,
    /// When it gets its key otherwise, where it has none.
    keyed: Keyed,
    /// Whether enums that the target has are given the labels that they lack.
    labels: bool,
}

impl Ensuring<'_> {
    fn failed(&self, error: Error) -> SinkError {
        if fault::cause(&error) == Cause::World {
            return fault::general("preparing a target table", error);
        }
        fault::of_table("preparing a target table", &self.schema.name, error)
    }

    fn refuse(&self, code: Code, message: String, remedy: String) -> SinkError {
        SinkError::Table {
            table: self.schema.name.clone(),
            condition: Box::new(Condition::new(code, message, remedy)),
            source: None,
        }
    }

    /// Creates the table, or makes it follow the source's.
    async fn shape(&self) -> Result<Shaped, SinkError> {
        let mut warnings = Vec::new();
        if self.create == Create::Auto {
            self.create_types(&mut warnings).await?;
        }
        let mut wanted = self.wanted(&mut warnings).await?;
        let mut key = self.key(&wanted)?;
        let mut found = self.found().await?;
        let created = found.is_empty();
        if created {
            self.create_table(&wanted, &key).await?;
            self.set_defaults(&wanted).await?;
            found = self.found().await?;
        } else if self.begun || self.before.is_some() {
            let evolved = self.evolve(wanted, &found, &mut warnings).await?;
            wanted = evolved.wanted;
            key = self.key(&wanted)?;
            if evolved.altered {
                found = self.found().await?;
            }
        }
        Ok(Shaped {
            wanted,
            key,
            found,
            created,
            warnings,
        })
    }

    /// Checks that the table takes the source's rows, and lays them out for it.
    async fn fit(&self, shaped: Shaped) -> Result<Ensured, SinkError> {
        let Shaped {
            wanted,
            key,
            found,
            created,
            mut warnings,
        } = shaped;
        if !created {
            self.check(&wanted, &key, &found, &mut warnings).await?;
            self.ensure_version(&found).await?;
        }
        let columns: Vec<_> = wanted
            .into_iter()
            .filter_map(|wanted| {
                let found = found.iter().find(|found| found.name == wanted.target)?;
                Some(LayoutColumn {
                    source: wanted.source,
                    target: wanted.target,
                    cast: found.base.clone(),
                })
            })
            .collect();
        let others = found.iter().filter(|found| {
            let known = columns
                .iter()
                .any(|column: &LayoutColumn| column.target == found.name);
            let takes_values = matches!(found.origin, Origin::Nothing | Origin::Default);
            !known && takes_values && found.name != VERSION_COLUMN
        });
        let others = others.map(|found| LayoutColumn {
            source: String::new(),
            target: found.name.clone(),
            cast: found.base.clone(),
        });
        let others = others.collect();
        let index = |name: &String| columns.iter().position(|column| column.target == *name);
        let key = key.iter().filter_map(index).collect();
        let layout = Arc::new(TableLayout {
            source: self.schema.name.clone(),
            target: self.settings.target.clone(),
            columns,
            key,
            shape: self.schema.version.clone(),
        });
        Ok(Ensured {
            layout,
            warnings,
            created,
            others,
        })
    }

    async fn text(&self, sql: &str, parameter: &str) -> Result<Option<String>, SinkError> {
        let row = self.client.query_one(sql, &[&parameter]).await;
        row.and_then(|row| row.try_get(0))
            .map_err(|error| self.failed(error))
    }

    /// The columns that travel, with types that the target has.
    async fn wanted(&self, warnings: &mut Vec<String>) -> Result<Vec<Wanted>, SinkError> {
        let mut wanted = Vec::new();
        for column in &self.schema.columns {
            if self.settings.columns.exclude.contains(&column.name) {
                continue;
            }
            let target = evolution::renamed(self.settings, &column.name, &column.former);
            if let Some(other) = wanted.iter().find(|other: &&Wanted| other.target == target) {
                return Err(self.refuse(
                    Code::ColumnSelection,
                    format!(
                        "columns {:?} and {:?} of table {} have the same name {target:?} in the target",
                        other.source, column.name, self.schema.name
                    ),
                    format!("change columns.rename in tables/{}.toml", self.schema.name),
                ));
            }
            let base = self
                .text("SELECT format_type(to_regtype($1), -1)", &column.type_name)
                .await?
                // Without a type, format_type says so in words.
                .filter(|base| base != "???" && base != "-");
            let (type_name, base) = match base {
                Some(base) => (column.type_name.clone(), base),
                None => {
                    warnings.push(format!(
                        "column {:?} of table {} has type {}, which the target lacks: it becomes text",
                        column.name, self.schema.name, column.type_name
                    ));
                    ("text".to_owned(), "text".to_owned())
                }
            };
            let source = column.name.clone();
            wanted.push(Wanted {
                source,
                target,
                type_name,
                base,
                not_null: column.not_null,
                missing: column.missing.clone(),
                former: column.former.clone(),
            });
        }
        Ok(wanted)
    }

    /// The key's columns in the target.
    fn key(&self, wanted: &[Wanted]) -> Result<Vec<String>, SinkError> {
        let key = self.settings.key.as_ref().unwrap_or(&self.schema.key);
        let target = |name: &String| {
            let column = wanted.iter().find(|column| column.source == *name);
            column.map(|column| column.target.clone())
        };
        match key.iter().map(target).collect::<Option<Vec<_>>>() {
            Some(key) if !key.is_empty() => Ok(key),
            _ => Err(self.refuse(
                Code::TargetKey,
                format!(
                    "table {} has no key among the columns that travel",
                    self.schema.name
                ),
                "set `key` in the table's file, and do not exclude its columns".to_owned(),
            )),
        }
    }

    async fn found(&self) -> Result<Vec<Found>, SinkError> {
        let rows = self
            .client
            .query(
                "SELECT attname::text, format_type(atttypid, atttypmod), format_type(atttypid, -1), \
                 attnotnull, CASE WHEN attgenerated <> '' THEN attgenerated::text \
                 WHEN attidentity = 'a' THEN 'a' WHEN atthasdef OR attidentity <> '' THEN 'd' ELSE '' END \
                 FROM pg_catalog.pg_attribute WHERE attrelid = to_regclass($1) \
                 AND attnum > 0 AND NOT attisdropped ORDER BY attnum",
                &[&self.settings.target.quoted()],
            )
            .await
            .map_err(|error| self.failed(error))?;
        let found = rows.iter().map(|row| {
            Ok(Found {
                name: row.try_get(0)?,
                type_name: row.try_get(1)?,
                base: row.try_get(2)?,
                not_null: row.try_get(3)?,
                origin: match row.try_get(4)? {
                    "" => Origin::Nothing,
                    "d" => Origin::Default,
                    "a" => Origin::Identity,
                    "s" => Origin::Stored,
                    _ => Origin::Virtual,
                },
            })
        });
        found
            .collect::<Result<_, _>>()
            .map_err(|error| self.failed(error))
    }

    async fn ensure_version(&self, found: &[Found]) -> Result<(), SinkError> {
        let target = &self.settings.target;
        let sql = sql::add_version(target);
        match found.iter().find(|found| found.name == VERSION_COLUMN) {
            Some(found) if found.base == "uuid" && found.not_null => Ok(()),
            Some(_) => Err(self.refuse(
                Code::TargetType,
                format!("column {VERSION_COLUMN} of target table {target} is not uuid NOT NULL"),
                format!("drop the column, then: {sql};"),
            )),
            None if self.create == Create::Never => Err(self.refuse(
                Code::TargetColumnMissing,
                format!("target table {target} has no column {VERSION_COLUMN}"),
                format!("{sql};"),
            )),
            None => self
                .client
                .batch_execute(&sql)
                .await
                .map_err(|error| self.failed(error)),
        }
    }
}
