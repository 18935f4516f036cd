//! Brings a target table to the shape that the source's has now.

use millrace_config::{Code, OnSchemaChange};
use millrace_event::{ColumnSchema, quote_identifier, quote_literal};
use tokio_postgres::Error;

use super::checks::takes;
use super::{Ensuring, Found, Origin, Wanted};
use crate::evolution::{self, Answer, Difference, Has, Target};
use crate::postgres::fault::{self, Cause};
use crate::sink::SinkError;
use crate::sql::{self, VERSION_COLUMN};

/// What was made of a table's differences.
pub(super) struct Evolved {
    /// The columns that rows are laid out for.
    pub(super) wanted: Vec<Wanted>,
    /// Whether the target was altered.
    pub(super) altered: bool,
}

impl Ensuring<'_> {
    /// Alters the target as the table's policy has it, or says with which statements an operator does so.
    pub(super) async fn evolve(
        &self,
        mut wanted: Vec<Wanted>,
        found: &[Found],
        warnings: &mut Vec<String>,
    ) -> Result<Evolved, SinkError> {
        let policy = self.settings.on_schema_change;
        let mut differences = self.differences(&wanted, found);
        let renames: Vec<(String, String)> = differences.iter().filter_map(renaming).collect();
        for column in &wanted {
            let before = renames.iter().find(|(_, to)| *to == column.target);
            let name = before.map_or(&column.target, |(from, _)| from);
            let has = found.iter().find(|found| found.name == *name);
            if has.is_some_and(|has| !takes(has, &column.type_name, &column.base))
                && self.is_retyped(&column.source)
            {
                differences.push(Difference::Retyped {
                    column: column.target.clone(),
                });
            }
        }
        let (mut parks, mut alters) = (Vec::new(), Vec::new());
        for difference in &differences {
            match evolution::answer(policy, self.create, difference) {
                Answer::Alter => alters.push(difference),
                Answer::Park => parks.push(difference),
                Answer::Leave => self.leave(difference, &mut wanted, warnings),
            }
        }
        if let Some(first) = parks.first() {
            return Err(self.parked(first, &parks, &wanted));
        }
        // Whoever reads the table waits behind a statement that waits for its lock.
        if !alters.is_empty() {
            let bounded = self.client.batch_execute(sql::LOCK_BOUNDED).await;
            bounded.map_err(|error| self.failed(error))?;
        }
        for difference in &alters {
            self.alter(difference, &wanted).await?;
            let statement = self.statement(difference, &wanted);
            warnings.push(format!("changed as the source's table was: {statement}"));
            if matches!(difference, Difference::Dropped { .. }) {
                self.leave(difference, &mut wanted, warnings);
            }
        }
        if !alters.is_empty() {
            let unbounded = self.client.batch_execute(sql::LOCK_AS_BEFORE).await;
            unbounded.map_err(|error| self.failed(error))?;
        }
        Ok(Evolved {
            wanted,
            altered: !alters.is_empty(),
        })
    }

    fn differences(&self, wanted: &[Wanted], found: &[Found]) -> Vec<Difference> {
        let targets: Vec<_> = wanted
            .iter()
            .map(|column| Target {
                name: column.target.clone(),
                former: column
                    .former
                    .iter()
                    .map(|name| evolution::renamed(self.settings, name, &[]))
                    .collect(),
                fresh: self.is_fresh(&column.source),
            })
            .collect();
        let has: Vec<_> = found
            .iter()
            .filter(|found| found.name != VERSION_COLUMN)
            .map(|found| Has {
                name: found.name.clone(),
                required: found.not_null && found.origin == Origin::Nothing,
            })
            .collect();
        let gone = self.schema.dropped.iter();
        let gone = gone.filter(|name| !self.settings.columns.exclude.contains(name));
        let gone: Vec<_> = gone
            .map(|name| evolution::renamed(self.settings, name, &[]))
            .collect();
        evolution::differences(&targets, &has, &gone)
    }

    /// A column and what it was when the table was laid out before.
    fn column(&self, name: &str) -> Option<(&ColumnSchema, Option<&ColumnSchema>)> {
        let before = self.before?;
        let column = self
            .schema
            .columns
            .iter()
            .find(|column| column.name == name)?;
        let by_number = before.column_of(self.schema.oid, column.number);
        let by_name = || before.columns.iter().find(|before| before.name == name);
        Some((column, by_number.or_else(by_name)))
    }

    fn is_fresh(&self, name: &str) -> bool {
        // Where all rows come again, nothing is lost.
        !self.holds || matches!(self.column(name), Some((_, None)))
    }

    fn is_retyped(&self, name: &str) -> bool {
        let Some((column, Some(before))) = self.column(name) else {
            return false;
        };
        (column.type_oid, column.typmod) != (before.type_oid, before.typmod)
    }

    /// Lays rows out for a target that stays as it is.
    fn leave(&self, difference: &Difference, wanted: &mut Vec<Wanted>, warnings: &mut Vec<String>) {
        match difference {
            Difference::Renamed { from, to } => {
                for column in wanted.iter_mut().filter(|column| column.target == *to) {
                    column.target.clone_from(from);
                }
            }
            Difference::Missing { column, .. } => {
                wanted.retain(|wanted| wanted.target != *column);
            }
            Difference::Retyped { .. } => {}
            Difference::Dropped { column, .. } => {
                let before = self.before.into_iter().flat_map(|before| &before.columns);
                let news = before
                    .map(|before| evolution::renamed(self.settings, &before.name, &before.former))
                    .any(|name| name == *column);
                if news {
                    warnings.push(format!(
                        "column {column:?} is gone at the source; the target keeps it with its old values, until: \
                         ALTER TABLE {} DROP COLUMN {};",
                        self.settings.target.quoted(),
                        quote_identifier(column)
                    ));
                }
            }
        }
    }

    fn statement(&self, difference: &Difference, wanted: &[Wanted]) -> String {
        let table = self.settings.target.quoted();
        match difference {
            Difference::Renamed { from, to } => format!(
                "ALTER TABLE {table} RENAME COLUMN {} TO {};",
                quote_identifier(from),
                quote_identifier(to)
            ),
            Difference::Missing { column, .. } => {
                let wanted = wanted.iter().find(|wanted| wanted.target == *column);
                let wanted = wanted.expect("a difference is about a wanted column");
                let add = sql::add_column(&self.settings.target, column, &wanted.type_name);
                let default = wanted.missing.as_ref().map(|value| default(value));
                format!("{add}{};", default.unwrap_or_default())
            }
            Difference::Retyped { column } => {
                let wanted = wanted.iter().find(|wanted| wanted.target == *column);
                let type_name = wanted.map_or("text", |wanted| &wanted.type_name);
                let column = quote_identifier(column);
                format!(
                    "ALTER TABLE {table} ALTER COLUMN {column} TYPE {type_name} USING {column}::{type_name};"
                )
            }
            Difference::Dropped {
                column,
                required: true,
            } if self.settings.on_schema_change != OnSchemaChange::Park => format!(
                "ALTER TABLE {table} ALTER COLUMN {} DROP NOT NULL;",
                quote_identifier(column)
            ),
            Difference::Dropped { column, .. } => format!(
                "ALTER TABLE {table} DROP COLUMN {};",
                quote_identifier(column)
            ),
        }
    }

    async fn alter(&self, difference: &Difference, wanted: &[Wanted]) -> Result<(), SinkError> {
        let statement = match difference {
            // Without USING only a cast is taken that any assignment would take.
            Difference::Retyped { column } => {
                let unbounded = self.client.execute(sql::UNBOUNDED, &[]).await;
                unbounded.map_err(|error| self.failed(error))?;
                let type_name = wanted.iter().find(|wanted| wanted.target == *column);
                format!(
                    "ALTER TABLE {} ALTER COLUMN {} TYPE {}",
                    self.settings.target.quoted(),
                    quote_identifier(column),
                    type_name.map_or("text", |wanted| &wanted.type_name)
                )
            }
            // The default stays: changes from before the column was added are rows that have it at the source.
            other => self.statement(other, wanted),
        };
        let altered = self.client.batch_execute(&statement).await;
        altered.map_err(|error| self.not_altered(difference, wanted, error))
    }

    fn not_altered(&self, difference: &Difference, wanted: &[Wanted], error: Error) -> SinkError {
        if matches!(fault::cause(&error), Cause::World | Cause::Aborted) {
            return self.failed(error);
        }
        let what = format!("{} ({})", self.what(difference), fault::message(&error));
        self.refuse(
            self.code(difference),
            what,
            self.statement(difference, wanted),
        )
    }

    fn parked(&self, first: &Difference, all: &[&Difference], wanted: &[Wanted]) -> SinkError {
        let what: Vec<_> = all.iter().map(|difference| self.what(difference)).collect();
        let statements = all
            .iter()
            .map(|difference| self.statement(difference, wanted));
        let statements: Vec<_> = statements.collect();
        self.refuse(self.code(first), what.join("; "), statements.join(" "))
    }

    fn code(&self, difference: &Difference) -> Code {
        if matches!(difference, Difference::Missing { fresh: false, .. }) {
            return Code::TargetLost;
        }
        if self.settings.on_schema_change == OnSchemaChange::Park {
            return Code::SchemaChanged;
        }
        match difference {
            Difference::Renamed { .. } | Difference::Missing { .. } => Code::TargetColumnMissing,
            Difference::Retyped { .. } | Difference::Dropped { .. } => Code::TargetType,
        }
    }

    fn what(&self, difference: &Difference) -> String {
        let target = &self.settings.target;
        match difference {
            Difference::Renamed { from, to } => format!(
                "column {from:?} of target table {target} was renamed to {to:?} at the source"
            ),
            Difference::Missing { column, .. } => {
                format!("target table {target} has no column {column:?}")
            }
            Difference::Retyped { column } => format!(
                "column {column:?} of target table {target} has another type at the source now"
            ),
            Difference::Dropped { column, .. } => {
                format!("column {column:?} of target table {target} is gone at the source")
            }
        }
    }

    /// Gives columns of a table that was made just now the values of rows that are older than the columns.
    pub(super) async fn set_defaults(&self, wanted: &[Wanted]) -> Result<(), SinkError> {
        for column in wanted {
            let Some(value) = &column.missing else {
                continue;
            };
            let sql = format!(
                "ALTER TABLE {} ALTER COLUMN {} SET{}",
                self.settings.target.quoted(),
                quote_identifier(&column.target),
                default(value)
            );
            let set = self.client.batch_execute(&sql).await;
            set.map_err(|error| self.failed(error))?;
        }
        Ok(())
    }
}

fn default(value: &str) -> String {
    format!(" DEFAULT {}", quote_literal(value).trim_start())
}

fn renaming(difference: &Difference) -> Option<(String, String)> {
    match difference {
        Difference::Renamed { from, to } => Some((from.clone(), to.clone())),
        _ => None,
    }
}
