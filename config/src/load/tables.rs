//! Reads `tables/<schema>.<table>.toml`.

use std::collections::BTreeMap;

use millrace_event::TableName;

use super::{TABLES, columns, read_document, read_file};
use crate::Place;
use crate::reader::Section;
use crate::report::Context;
use crate::settings::{Filter, OnDelete, OnRowError, OnSchemaChange, OnTruncate, Table};

/// The keys of a table file, or of `[defaults]`: what is not set there is none.
#[derive(Clone, Default)]
pub(super) struct Keys {
    sinks: Option<Vec<(String, Place)>>,
    target: Option<TableName>,
    columns: columns::Keys,
    filter: Option<Filter>,
    key: Option<Vec<String>>,
    adopt: Option<bool>,
    on_delete: Option<OnDelete>,
    on_truncate: Option<OnTruncate>,
    on_schema_change: Option<OnSchemaChange>,
    on_row_error: Option<OnRowError>,
}

/// Reads the keys that a table may have.
pub(super) fn keys(section: &Section<'_>) -> Keys {
    let truncate = [
        ("apply", OnTruncate::Apply),
        ("ignore", OnTruncate::Ignore),
        ("park", OnTruncate::Park),
    ];
    let change = [
        ("evolve", OnSchemaChange::Evolve),
        ("park", OnSchemaChange::Park),
        ("ignore", OnSchemaChange::Ignore),
    ];
    let row = [
        ("dead_letter", OnRowError::DeadLetter),
        ("halt", OnRowError::Halt),
    ];
    Keys {
        sinks: section.list("sinks"),
        target: section.parsed("target", |text| {
            table_name(text).ok_or_else(|| format!("is not like \"schema.table\": {text:?}"))
        }),
        columns: columns::keys(section.section("columns")),
        filter: filter(section),
        key: section
            .list("key")
            .map(|items| items.into_iter().map(|(name, _)| name).collect()),
        adopt: section.boolean("adopt"),
        on_delete: on_delete(section),
        on_truncate: section.choice("on_truncate", &truncate),
        on_schema_change: section.choice("on_schema_change", &change),
        on_row_error: section.choice("on_row_error", &row),
    }
}

fn on_delete(section: &Section<'_>) -> Option<OnDelete> {
    section.parsed("on_delete", |text| match text.strip_prefix("soft:") {
        Some(column) if !column.is_empty() => Ok(OnDelete::Soft(column.to_owned())),
        None if text == "delete" => Ok(OnDelete::Delete),
        None if text == "ignore" => Ok(OnDelete::Ignore),
        _ => Err(format!(
            "must be \"delete\", \"soft:<column>\" or \"ignore\": {text:?}"
        )),
    })
}

fn filter(section: &Section<'_>) -> Option<Filter> {
    let (sql, place) = section.string("where")?;
    if sql.trim().is_empty() {
        section.context.error(place, "\"where\" must not be empty");
        return None;
    }
    Some(Filter { sql, place })
}

/// `schema.table` with exactly one dot.
fn table_name(text: &str) -> Option<TableName> {
    let (schema, table) = text.split_once('.')?;
    let valid = !schema.is_empty() && !table.is_empty() && !table.contains('.');
    valid.then(|| TableName::new(schema, table))
}

/// Reads every table file. `sinks` are the known sinks; none if the main file could not be read.
pub(super) fn read(context: &Context<'_>, sinks: Option<&[String]>, defaults: &Keys) -> Vec<Table> {
    let Some(files) = files(context) else {
        return Vec::new();
    };
    let mut tables = Vec::new();
    for (name, file) in files {
        let Some(document) = read_file(context, &file) else {
            continue;
        };
        let path = format!("tables.{name}");
        let own = read_document(context, &document, &path, keys);
        tables.push(table(context, name, sinks, own, defaults));
    }
    check_targets(context, &tables);
    tables
}

/// The tables that have a file, and the files, by name of the table.
fn files(context: &Context<'_>) -> Option<BTreeMap<TableName, String>> {
    let folder = || Place::whole(TABLES);
    let entries = match std::fs::read_dir(context.dir.join(TABLES)) {
        Ok(entries) => entries,
        Err(error) => {
            context.error(
                folder(),
                format!("the folder of the table files cannot be read: {error}"),
            );
            return None;
        }
    };
    let mut files = BTreeMap::new();
    let mut found = false;
    for entry in entries {
        let Ok(entry) = entry.map_err(|error| context.error(folder(), error.to_string())) else {
            continue;
        };
        let file = entry.file_name().to_string_lossy().into_owned();
        // Hidden files and what is not TOML belong to editors and deployment tools.
        let Some(stem) = file
            .strip_suffix(".toml")
            .filter(|_| !file.starts_with('.'))
        else {
            continue;
        };
        found = true;
        let path = format!("{TABLES}/{file}");
        match table_name(stem) {
            Some(name) => drop(files.insert(name, path)),
            None => {
                let message = "a table file's name must be <schema>.<table>.toml";
                context.error(Place::whole(path), message);
            }
        }
    }
    if !found {
        context.error(
            folder(),
            "no table: add a file <schema>.<table>.toml, it may be empty",
        );
    }
    Some(files)
}

fn table(
    context: &Context<'_>,
    name: TableName,
    known: Option<&[String]>,
    own: Keys,
    defaults: &Keys,
) -> Table {
    let sinks = match (own.sinks.or_else(|| defaults.sinks.clone()), known) {
        (Some(chosen), Some(known)) => {
            for (sink, place) in &chosen {
                if !known.contains(sink) {
                    let message = format!("there is no sink {sink:?}");
                    context.unknown(
                        place.clone(),
                        message,
                        sink,
                        known.iter().map(String::as_str),
                    );
                }
            }
            let mut names: Vec<_> = chosen.into_iter().map(|(sink, _)| sink).collect();
            names.sort();
            names.dedup();
            names
        }
        (Some(_), None) => Vec::new(),
        (None, known) => known.unwrap_or_default().to_vec(),
    };
    let key = own.key.or_else(|| defaults.key.clone());
    // Without the main file nobody knows.
    let salted = known.is_none()
        || context
            .report
            .borrow()
            .places
            .contains_key("source.mask_salt");
    Table {
        sinks,
        target: own
            .target
            .or_else(|| defaults.target.clone())
            .unwrap_or_else(|| name.clone()),
        columns: columns::resolve(
            context,
            own.columns,
            &defaults.columns,
            key.as_deref(),
            salted,
        ),
        filter: own.filter.or_else(|| defaults.filter.clone()),
        key,
        adopt: own.adopt.or(defaults.adopt).unwrap_or(false),
        on_delete: own
            .on_delete
            .or_else(|| defaults.on_delete.clone())
            .unwrap_or(OnDelete::Delete),
        on_truncate: own
            .on_truncate
            .or(defaults.on_truncate)
            .unwrap_or(OnTruncate::Apply),
        on_schema_change: own
            .on_schema_change
            .or(defaults.on_schema_change)
            .unwrap_or(OnSchemaChange::Evolve),
        on_row_error: own
            .on_row_error
            .or(defaults.on_row_error)
            .unwrap_or(OnRowError::DeadLetter),
        name,
    }
}

/// Two tables must not be written into one target table of a sink; a target in the schema `millrace` is ours.
fn check_targets(context: &Context<'_>, tables: &[Table]) {
    let mut taken = BTreeMap::new();
    for table in tables {
        let path = format!("{TABLES}.{}.target", table.name);
        let place = context.report.borrow().places.get(&path).cloned();
        let place = place.unwrap_or_else(|| Place::whole(file(&table.name)));
        if table.target.schema == "millrace" {
            let message = "the target schema \"millrace\" holds the sink's own tables";
            context.error(place.clone(), message);
        }
        for sink in &table.sinks {
            if let Some(other) = taken.insert((sink, &table.target), &table.name) {
                let target = &table.target;
                let message =
                    format!("table {other} is already written to {target} of sink {sink:?}");
                context.error(place.clone(), message);
            }
        }
    }
}

fn file(name: &TableName) -> String {
    format!("{TABLES}/{name}.toml")
}
