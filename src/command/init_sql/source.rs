//! The source's role.

use millrace_config::{Config, Create, Table};
use millrace_event::{quote_identifier, quote_literal};

/// The role of `source.url`.
const ROLE: &str = "millrace_capture";

/// What the source needs, as one script for psql.
pub(super) fn sql(config: &Config) -> String {
    let tables: Vec<_> = config
        .tables
        .iter()
        .map(|table| table.name.quoted())
        .collect();
    let tables = tables.join(", ");
    let schemas: Vec<_> = super::schemas(config.tables.iter().map(|table| &table.name))
        .into_iter()
        .map(quote_identifier)
        .collect();
    let slot = millrace_cdc::source::slot_name(&config.source.name);
    let publication = publication(config);
    let temporary = match config.tables.iter().any(|table| table.filter.is_some()) {
        true => format!(
            "-- Row filters (`where`) are read in a temporary table.\n\
             DO $$ BEGIN EXECUTE format('GRANT TEMPORARY ON DATABASE %I TO {ROLE}', current_database()); END $$;\n"
        ),
        false => String::new(),
    };
    let slot_sql = format!(
        "SELECT pg_create_logical_replication_slot({}, 'pgoutput');",
        quote_literal(&slot)
    );
    let slot_sql = match config.source.create {
        Create::Never => format!(
            "-- The slot, because source.create is \"never\". After the publication, and shortly before the first\n\
             -- `millrace run`: from here on the source keeps its WAL.\n{slot_sql}\n"
        ),
        Create::Auto => format!(
            "-- `millrace run` creates the slot itself, together with the stream: do not create it beforehand.\n\
             -- Only with source.create = \"never\":\n--   {slot_sql}\n"
        ),
    };
    format!(
        "-- Source {name}. Run this in the source database, as a superuser.\n\
         -- A role with REPLICATION can decode the changes of every table, whatever its other grants: treat it as\n\
         -- one that reads everything.\n{role}\
         GRANT USAGE ON SCHEMA {schemas} TO {ROLE};\n\
         GRANT SELECT ON TABLE {tables} TO {ROLE};\n{temporary}\n\
         -- The publication, as the owner of the tables with CREATE on the database (a superuser may, too).\n\
         -- {ROLE} need not own it: where it is complete, `millrace run` leaves it alone.\n\
         {publication}\n\n{slot_sql}",
        name = config.source.name,
        role = super::role(ROLE, "LOGIN REPLICATION"),
        schemas = schemas.join(", "),
    )
}

/// The statement that makes the publication, of the tables without their children by inheritance. Which columns a table has beside the excluded ones only the source
/// knows: there it is put together when it is run.
fn publication(config: &Config) -> String {
    let name = quote_identifier(&millrace_cdc::source::publication_name(&config.source.name));
    let begin = format!("CREATE PUBLICATION {name} FOR TABLE ");
    let end = "\n    WITH (publish_via_partition_root = true)";
    let lists = |table: &&Table| !table.columns.exclude.is_empty();
    if !config.tables.iter().any(|table| lists(&table)) {
        let tables: Vec<_> = config
            .tables
            .iter()
            .map(|table| format!("ONLY {}{}", table.name.quoted(), filter(table)))
            .collect();
        return format!("{begin}{}{end};", tables.join(", "));
    }
    let mut parts = vec![quote_literal(&begin)];
    for (index, table) in config.tables.iter().enumerate() {
        let separator = if index == 0 { "" } else { ", " };
        let quoted = table.name.quoted();
        parts.push(quote_literal(&format!("{separator}ONLY {quoted}")));
        if lists(&table) {
            let excluded: Vec<_> = table
                .columns
                .exclude
                .iter()
                .map(|name| quote_literal(name))
                .collect();
            parts.push(format!(
                "(SELECT ' (' || string_agg(quote_ident(attname), ', ' ORDER BY attnum) || ')' FROM pg_attribute\n        \
                 WHERE attrelid = {}::regclass AND attnum > 0 AND NOT attisdropped AND attgenerated = ''\n        \
                 AND attname <> ALL (ARRAY[{}]))",
                quote_literal(&quoted),
                excluded.join(", ")
            ));
        }
        let filter = filter(table);
        if !filter.is_empty() {
            parts.push(quote_literal(&filter));
        }
    }
    parts.push(quote_literal(end));
    format!(
        "DO $millrace$ BEGIN EXECUTE\n    {};\nEND $millrace$;",
        parts.join("\n    || ")
    )
}

/// ` WHERE ..` of a table in a publication.
fn filter(table: &Table) -> String {
    match &table.filter {
        // The newline ends a comment.
        Some(filter) => format!(" WHERE ({}\n)", filter.sql),
        None => String::new(),
    }
}
