//! What a target table lacks of the table at the source, what each policy does about it, and how changes of older
//! versions of the table fit the target as it is. Pure.

use millrace_config::{Create, OnSchemaChange, Table};
use millrace_event::{ColumnSchema, TableSchema};

use crate::row::{LayoutColumn, TableLayout};

/// A column that the target should have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    /// Its name in the target.
    pub(crate) name: String,
    /// Names in the target that it had before, the newest first.
    pub(crate) former: Vec<String>,
    /// Whether the table did not have it when this sink last laid it out. False where that is not known.
    pub(crate) fresh: bool,
}

/// A column that the target has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Has {
    pub(crate) name: String,
    /// Whether a row needs a value of it and nothing gives one.
    pub(crate) required: bool,
}

/// One way in which the target's table is not the source's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Difference {
    /// The column has its former name.
    Renamed { from: String, to: String },
    /// The column is missing: because it is new, or it was there and is lost.
    Missing { column: String, fresh: bool },
    /// The column's type does not take every value.
    Retyped { column: String },
    /// The source does not have the column any more.
    Dropped { column: String, required: bool },
}

/// What is done about a difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// The target is altered.
    Alter,
    /// The table is parked, with the statement that an operator may run.
    Park,
    /// The target stays as it is, and rows are laid out for that.
    Leave,
}

/// Finds how the names of the target's columns differ. `gone` are names of columns that the source had.
pub(crate) fn differences(wanted: &[Target], has: &[Has], gone: &[String]) -> Vec<Difference> {
    let is_wanted = |name: &str| wanted.iter().any(|wanted| wanted.name == name);
    let mut found = Vec::new();
    let mut taken: Vec<&str> = Vec::new();
    for column in wanted {
        if has.iter().any(|has| has.name == column.name) {
            continue;
        }
        let free = |name: &&String| {
            has.iter().any(|has| has.name == **name)
                && !is_wanted(name)
                && !taken.contains(&name.as_str())
        };
        match column.former.iter().find(free) {
            Some(from) => {
                taken.push(from);
                found.push(Difference::Renamed {
                    from: from.clone(),
                    to: column.name.clone(),
                });
            }
            None => found.push(Difference::Missing {
                column: column.name.clone(),
                fresh: column.fresh,
            }),
        }
    }
    let dropped = has.iter().filter(|has| {
        gone.contains(&has.name) && !is_wanted(&has.name) && !taken.contains(&has.name.as_str())
    });
    found.extend(dropped.map(|has| Difference::Dropped {
        column: has.name.clone(),
        required: has.required,
    }));
    found
}

/// What a policy does about a difference.
pub(crate) fn answer(policy: OnSchemaChange, create: Create, difference: &Difference) -> Answer {
    let alter = match create {
        Create::Auto => Answer::Alter,
        Create::Never => Answer::Park,
    };
    match (policy, difference) {
        // What was lost in the target has values that no statement brings back.
        (
            OnSchemaChange::Evolve | OnSchemaChange::Park,
            Difference::Missing { fresh: false, .. },
        )
        | (OnSchemaChange::Park, _)
        | (OnSchemaChange::Ignore, Difference::Retyped { .. }) => Answer::Park,
        (OnSchemaChange::Ignore, Difference::Missing { .. } | Difference::Renamed { .. })
        | (
            _,
            Difference::Dropped {
                required: false, ..
            },
        ) => Answer::Leave,
        (OnSchemaChange::Evolve, _)
        | (OnSchemaChange::Ignore, Difference::Dropped { required: true, .. }) => alter,
    }
}

/// Why changes of a version of a table cannot be laid out for the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unfit {
    /// The version is newer than what is known as the latest.
    TooNew,
    /// Its rows have another key.
    OtherKey,
}

/// Lays changes of a version of a table out for a target that fits the latest one. `others` are columns that the
/// target has beside those of `layout`.
pub(crate) fn lay_out(
    version: &TableSchema,
    latest: &TableSchema,
    layout: &TableLayout,
    others: &[LayoutColumn],
    settings: &Table,
) -> Result<TableLayout, Unfit> {
    let mut columns: Vec<LayoutColumn> = Vec::with_capacity(version.columns.len());
    for column in &version.columns {
        if settings.columns.exclude.contains(&column.name) {
            continue;
        }
        let column_now = now(version, column, latest);
        let known = match column_now {
            Some(now) => layout.columns.iter().find(|known| known.source == now.name),
            // An older release did not keep the names of what is gone.
            None if version.oid != 0 && !latest.had(&column.name) => return Err(Unfit::TooNew),
            // It is gone at the source, and its last values are still of use in a target that kept it.
            None => {
                let name = renamed(settings, &column.name, &[]);
                others.iter().find(|other| other.target == name)
            }
        };
        if let Some(known) = known
            && !columns.iter().any(|column| column.target == known.target)
        {
            columns.push(LayoutColumn {
                source: column.name.clone(),
                ..known.clone()
            });
        }
    }
    let name_now = |name: &String| {
        let column = version.columns.iter().find(|column| column.name == *name)?;
        now(version, column, latest).map(|now| &now.name)
    };
    let keys: Option<Vec<_>> = version.key.iter().map(name_now).collect();
    let same_key = settings.key.is_some()
        || keys.is_some_and(|keys| {
            keys.len() == latest.key.len() && latest.key.iter().all(|name| keys.contains(&name))
        });
    let place = |index: &usize| {
        let target = &layout.columns[*index].target;
        columns.iter().position(|column| column.target == *target)
    };
    match layout.key.iter().map(place).collect::<Option<Vec<_>>>() {
        Some(key) if same_key => Ok(TableLayout {
            source: layout.source.clone(),
            target: layout.target.clone(),
            columns,
            key,
            shape: version.version.clone(),
        }),
        _ => Err(Unfit::OtherKey),
    }
}

/// What a column of a version is now.
fn now<'l>(
    version: &TableSchema,
    column: &ColumnSchema,
    latest: &'l TableSchema,
) -> Option<&'l ColumnSchema> {
    if version.oid != 0 && version.oid == latest.oid && column.number != 0 {
        return latest.column_of(version.oid, column.number);
    }
    let by_name = latest.columns.iter().find(|now| now.name == column.name);
    by_name.or_else(|| {
        let mut columns = latest.columns.iter();
        columns.find(|now| now.former.contains(&column.name))
    })
}

/// A column's name in the target. A name that the settings give to a former name stays.
pub(crate) fn renamed(settings: &Table, name: &str, former: &[String]) -> String {
    let given = |name: &str| {
        let mut renames = settings.columns.rename.iter();
        renames.find(|(from, _)| from == name).map(|(_, to)| to)
    };
    given(name)
        .or_else(|| former.iter().find_map(|former| given(former)))
        .map_or_else(|| name.to_owned(), Clone::clone)
}

#[cfg(test)]
mod tests;
