//! The source's role.

use millrace_config::{Config, Create};
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
    let publication =
        quote_identifier(&millrace_cdc::source::publication_name(&config.source.name));
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
         GRANT SELECT ON TABLE {tables} TO {ROLE};\n\n\
         -- The publication, as the owner of the tables with CREATE on the database (a superuser may, too).\n\
         -- {ROLE} need not own it: where it is complete, `millrace run` leaves it alone.\n\
         CREATE PUBLICATION {publication} FOR TABLE {tables}\n    \
         WITH (publish_via_partition_root = true);\n\n{slot_sql}",
        name = config.source.name,
        role = super::role(ROLE, "LOGIN REPLICATION"),
        schemas = schemas.join(", "),
    )
}
