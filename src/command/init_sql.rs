//! `millrace init-sql`: the least-privilege roles and grants, and the NATS permissions. Prints; never connects.

mod nats;
mod source;
mod target;

use std::collections::BTreeSet;

use millrace_config::{Config, Exit};
use millrace_event::TableName;

use crate::arguments::{InitPart, InitSqlArguments};

/// Prints what was asked for.
pub(crate) fn init_sql(config: &Config, arguments: InitSqlArguments) -> Exit {
    let parts = match arguments.part {
        Some(part) => vec![part],
        None => vec![InitPart::Source, InitPart::Target, InitPart::Nats],
    };
    let texts: Vec<String> = parts
        .into_iter()
        .map(|part| match part {
            InitPart::Source => source::sql(config),
            InitPart::Target => target::sql(config),
            InitPart::Nats => nats::permissions(config, arguments.part.is_none()),
        })
        .collect();
    super::answer(&texts.join("\n"));
    Exit::Ok
}

/// A role that cannot be created twice by mistake, and the right to connect to the database at hand.
fn role(role: &str, attributes: &str) -> String {
    format!(
        "CREATE ROLE {role} {attributes};\n\
         -- Set its password with: \\password {role}\n\
         DO $$ BEGIN EXECUTE format('GRANT CONNECT ON DATABASE %I TO {role}', current_database()); END $$;\n"
    )
}

/// The schemas of some tables, each once.
fn schemas<'a>(tables: impl Iterator<Item = &'a TableName>) -> BTreeSet<&'a str> {
    tables.map(|table| table.schema.as_str()).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// A configuration with a sink whose tables may be created and one whose may not.
    pub(super) fn config() -> Config {
        config_with("")
    }

    /// The same, with this text in one of the table files.
    fn config_with(order_items: &str) -> Config {
        let dir = tempfile::tempdir().expect("a directory");
        let main = "[source]\nname = \"shop\"\nurl = \"postgres://h/d\"\n[stream]\nservers = [\"nats://h\"]\n\
            [sinks.wh]\ntype = \"postgres\"\nurl = \"postgres://h/d\"\n\
            [sinks.bi]\ntype = \"postgres\"\nurl = \"postgres://h/d\"\ncreate = \"never\"\n";
        fs::write(dir.path().join("millrace.toml"), main).expect("written");
        fs::create_dir(dir.path().join("tables")).expect("created");
        for table in ["public.orders", "public.order items", "it's.t"] {
            let text = if table == "public.order items" {
                order_items
            } else {
                ""
            };
            fs::write(dir.path().join(format!("tables/{table}.toml")), text).expect("written");
        }
        Config::load(dir.path(), &|_| None).expect("valid")
    }

    #[test]
    fn every_table_is_granted_once_and_quoted() {
        let sql = source::sql(&config());
        assert!(
            sql.contains("GRANT USAGE ON SCHEMA \"it's\", \"public\" TO millrace_capture;"),
            "{sql}"
        );
        assert!(
            sql.contains("GRANT SELECT ON TABLE \"it's\".\"t\", \"public\".\"order items\""),
            "{sql}"
        );
        assert!(
            sql.contains("CREATE PUBLICATION \"millrace_shop\" FOR TABLE"),
            "{sql}"
        );
        assert!(sql.contains("publish_via_partition_root = true"), "{sql}");
    }

    #[test]
    fn the_publication_has_the_column_lists_and_row_filters() {
        let plain = source::sql(&config());
        assert!(
            !plain.contains("TEMPORARY") && !plain.contains("EXECUTE 'CREATE PUB"),
            "{plain}"
        );
        let sql = source::sql(&config_with("where = \"v <> 'x' -- not\""));
        let filtered = "ONLY \"public\".\"order items\" WHERE (v <> 'x' -- not\n), ONLY \"public\".\"orders\"\n";
        assert!(
            sql.contains(filtered) && sql.contains("GRANT TEMPORARY ON DATABASE"),
            "{sql}"
        );
        let sql = source::sql(&config_with(
            "where = \"v <> 'x'\"\ncolumns = { exclude = [\"it's\"] }",
        ));
        for part in [
            "'CREATE PUBLICATION \"millrace_shop\" FOR TABLE '",
            "|| ', ONLY \"public\".\"order items\"'",
            "attname <> ALL (ARRAY['it''s'])",
            "|| ' WHERE (v <> ''x''",
        ] {
            assert!(sql.contains(part), "{part:?} is not in\n{sql}");
        }
    }

    #[test]
    fn a_target_where_nothing_may_be_created_gets_everything_at_once() {
        let sql = target::sql(&config());
        let (never, auto) = sql.split_once("-- Sink wh").expect("both sinks");
        assert!(never.contains("CREATE TABLE millrace.position"), "{never}");
        assert!(
            never.contains("ADD COLUMN IF NOT EXISTS \"_millrace_version\""),
            "{never}"
        );
        assert!(!never.contains("GRANT CREATE"), "{never}");
        assert!(auto.contains("GRANT CREATE ON DATABASE"), "{auto}");
        assert!(!auto.contains("CREATE TABLE"), "{auto}");
    }

    #[test]
    fn permissions_name_each_part_once() {
        let text = nats::permissions(&config(), false);
        assert!(
            text.contains("\"cdc.shop.>\"") && text.contains("\"$KV.MILLRACE_shop_sinks.wh\""),
            "{text}"
        );
        let blocks = text.matches("permissions:").count();
        assert_eq!(blocks, 4, "{text}");
    }
}
