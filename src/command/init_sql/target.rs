//! The targets' roles.

use std::fmt::Write;

use millrace_config::{Config, Create, Sink, Table};
use millrace_event::quote_identifier;

/// What the targets need, as one psql script for each sink.
pub(super) fn sql(config: &Config) -> String {
    let mut text = String::new();
    for sink in &config.sinks {
        let tables: Vec<_> = config.tables_of(&sink.name).collect();
        if !text.is_empty() {
            text.push('\n');
        }
        text.push_str(&sink_sql(sink, &tables));
    }
    if config.sinks.is_empty() {
        text.push_str("-- There is no sink, so no target needs anything.\n");
    }
    text
}

fn sink_sql(sink: &Sink, tables: &[&Table]) -> String {
    let role = format!("millrace_sink_{}", sink.name);
    let schemas: Vec<_> = super::schemas(tables.iter().map(|table| &table.target))
        .into_iter()
        .map(quote_identifier)
        .collect();
    let mut text = format!(
        "-- Sink {}. Run this in its target database, as a superuser.\n{}",
        sink.name,
        super::role(&role, "LOGIN")
    );
    match sink.create {
        Create::Auto => auto(&mut text, &role, &schemas),
        Create::Never => never(&mut text, &role, &schemas, tables),
    }
    text
}

/// The role makes the schema `millrace` and the target tables, and so owns them.
fn auto(text: &mut String, role: &str, schemas: &[String]) {
    let _ = writeln!(
        text,
        "-- It creates the schema millrace, and with create = \"auto\" the target tables, which it then owns.\n\
         DO $$ BEGIN EXECUTE format('GRANT CREATE ON DATABASE %I TO {role}', current_database()); END $$;"
    );
    for schema in schemas {
        let _ = writeln!(text, "CREATE SCHEMA IF NOT EXISTS {schema};");
    }
    if !schemas.is_empty() {
        let schemas = schemas.join(", ");
        let _ = writeln!(text, "GRANT USAGE, CREATE ON SCHEMA {schemas} TO {role};");
    }
    let _ = writeln!(
        text,
        "-- A target table that exists already must belong to it, for the column _millrace_version:\n\
         --   ALTER TABLE .. OWNER TO {role};"
    );
}

/// Everything is made here, and the role may only write it.
fn never(text: &mut String, role: &str, schemas: &[String], tables: &[&Table]) {
    let _ = write!(
        text,
        "\n-- What the sink keeps beside the tables.\n{}\n\
         GRANT USAGE ON SCHEMA millrace TO {role};\n\
         GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA millrace TO {role};\n",
        millrace_sink::postgres::migration_sql().trim_end()
    );
    if tables.is_empty() {
        return;
    }
    let names: Vec<_> = tables.iter().map(|table| table.target.quoted()).collect();
    let _ = writeln!(
        text,
        "\n-- The target tables, which must exist with the source's columns and key."
    );
    for name in &names {
        let _ = writeln!(
            text,
            "ALTER TABLE {name} ADD COLUMN IF NOT EXISTS \"_millrace_version\" uuid NOT NULL\n    \
             DEFAULT '00000000-0000-0000-0000-000000000000';"
        );
    }
    let (schemas, names) = (schemas.join(", "), names.join(", "));
    let _ = writeln!(
        text,
        "GRANT USAGE ON SCHEMA {schemas} TO {role};\n\
         GRANT SELECT, INSERT, UPDATE, DELETE ON TABLE {names} TO {role};"
    );
}
