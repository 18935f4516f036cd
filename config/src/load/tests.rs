use std::fs;
use std::path::Path;
use std::time::Duration;

use millrace_event::TableName;
use tempfile::TempDir;

use crate::{
    Auth, Config, Confirm, Create, LogLevel, OnDelete, OnRowError, OnTruncate, Secret, SyncInterval,
};

const GOOD: &str = r#"[source]
name = "shop"
url = "postgres://u:hunter2@h/db"
[stream]
servers = ["nats://u:hunter2@h:4222"]
[sinks.a]
type = "postgres"
url = "postgres://u:hunter2@h/db"
"#;

fn directory(main: &str, tables: &[(&str, &str)]) -> TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    fs::write(dir.path().join("millrace.toml"), main).expect("written");
    fs::create_dir(dir.path().join("tables")).expect("created");
    for (name, text) in tables {
        fs::write(dir.path().join("tables").join(name), text).expect("written");
    }
    dir
}

fn load(main: &str, tables: &[(&str, &str)]) -> Result<Config, String> {
    let dir = directory(main, tables);
    Config::load(dir.path(), &|_| None).map_err(|errors| errors.to_string())
}

/// The errors of a main file beside one empty table file.
fn errors(main: &str) -> String {
    load(main, &[("public.t.toml", "")]).expect_err("mistakes")
}

fn good() -> Config {
    load(GOOD, &[("public.t.toml", "")]).expect("valid")
}

#[test]
fn the_example_shows_the_defaults() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("example");
    let config = Config::load(&dir, &|_| None).expect("the example");
    let [orders] = config.tables.as_slice() else {
        panic!("one table")
    };
    assert_eq!(orders.name, TableName::new("public", "orders"));
    assert_eq!(orders.target, TableName::new("shop", "orders"));
    assert_eq!(orders.sinks, ["warehouse"]);
    assert_eq!(orders.key.as_deref(), Some(["id".to_owned()].as_slice()));
    assert_eq!(orders.on_delete, OnDelete::Ignore);
    assert_eq!(config.source.url, Secret::env("SOURCE_URL"));

    // Every other key of the example has the value that leaving it out gives.
    let plain = good();
    let [table] = plain.tables.as_slice() else {
        panic!("one table")
    };
    assert_eq!(
        (table.on_truncate, orders.on_truncate),
        (OnTruncate::Apply, OnTruncate::Apply)
    );
    assert_eq!(table.on_row_error, orders.on_row_error);
    assert_eq!(table.on_schema_change, orders.on_schema_change);
    assert_eq!((table.adopt, orders.adopt), (false, false));
    assert_eq!((plain.admin, plain.log), (config.admin, config.log));
    let (mut stream, servers) = (plain.stream, config.stream.servers.clone());
    stream.servers = servers;
    assert_eq!(stream, config.stream);
    let mut source = plain.source;
    source.url = config.source.url.clone();
    assert_eq!(source, config.source);
    let mut sink = plain.sinks[0].clone();
    sink.name = "warehouse".to_owned();
    sink.url = Secret::file("/run/secrets/warehouse_url");
    assert_eq!(sink, config.sinks[0]);
}

#[test]
fn a_table_file_may_be_empty_and_defaults_fill_it() {
    let main = format!("{GOOD}[defaults]\non_delete = \"ignore\"\nadopt = true\n");
    let tables = [
        ("public.a.toml", ""),
        ("public.b.toml", "on_delete = \"delete\"\n"),
        ("x", "?"),
    ];
    let config = load(&main, &tables).expect("valid");
    let [a, b] = config.tables.as_slice() else {
        panic!("two tables")
    };
    assert_eq!((&a.on_delete, a.adopt), (&OnDelete::Ignore, true));
    assert_eq!((&b.on_delete, b.adopt), (&OnDelete::Delete, true));
    assert_eq!(a.target, a.name);
    assert_eq!(config.tables_of("a").count(), 2);
    assert!(config.sink("a").is_some() && config.sink("b").is_none());
}

#[test]
fn every_mistake_is_reported_at_once_with_its_place() {
    let main = r#"[source]
nme = "shop"
name = "Shop"
url = { enw = "SOURCE_URL" }
heartbeat_interval = "5"
[stream]
servers = "nats://h"
replicas = 6
confirm = "sinced"
retention = { max_age = "1ms", max_bytes = 10 }
creds = { env = "A" }
nkey = { env = "B" }
[sink.a]
type = "postgres"
[sinks.a]
type = "postgre"
required = "yes"
batch = { max_rows = 0, max_bytes = "8" }
[admin]
listen = "localhost"
[log]
level = "trce"
"#;
    let table = "\ncolums = { exclude = [] }\nsinks = [\"b\", \"aa\", 1]\ntarget = \"orders\"\n";
    let text = load(main, &[("public.orders.toml", table), ("orders.toml", "")]);
    let expected = r#"millrace.toml:2:1: unknown key "nme"; did you mean "name"?
millrace.toml:3:8: "name" must be 1 to 31 characters a-z, 0-9 and _, a letter first: "Shop"
millrace.toml:4:9: unknown key "enw"; did you mean "env"?
millrace.toml:5:22: "heartbeat_interval" is not a duration with its unit, such as "5s": "5"
millrace.toml:6:1: set only one of "creds", "nkey" and "token"
millrace.toml:7:11: "servers" must be a list of strings, not a string
millrace.toml:8:12: "replicas" must be a whole number from 1 to 5
millrace.toml:9:11: unknown value "sinced" for "confirm": expected "acked", "synced" or "applied"; did you mean "synced"?
millrace.toml:10:25: "max_age" must be from 1m to 10years: "1ms"
millrace.toml:10:44: "max_bytes" must be a string, not an integer
millrace.toml:13:2: unknown key "sink"; did you mean "sinks"?
millrace.toml:15:1: missing key "url" in [sinks.a], for example url = { file = "warehouse_url" }
millrace.toml:16:8: unknown value "postgre" for "type": expected "postgres"; did you mean "postgres"?
millrace.toml:17:12: "required" must be true or false, not a string
millrace.toml:18:22: "max_rows" must be a whole number from 1 to 100000
millrace.toml:18:37: "max_bytes" is not a size with its unit, such as "8MiB": "8"
millrace.toml:20:10: "listen" is not an IP address and port, such as "127.0.0.1:9400": "localhost"
millrace.toml:22:9: unknown value "trce" for "level": expected "error", "warn", "info", "debug" or "trace"; did you mean "trace"?
tables/orders.toml: a table file's name must be <schema>.<table>.toml
tables/public.orders.toml:2:1: unknown key "colums"; did you mean "columns"?
tables/public.orders.toml:3:10: there is no sink "b"
tables/public.orders.toml:3:15: there is no sink "aa"; did you mean "a"?
tables/public.orders.toml:3:21: "sinks" must be a list of strings, not an integer
tables/public.orders.toml:4:10: "target" is not like "schema.table": "orders""#;
    assert_eq!(text.expect_err("mistakes"), expected);
}

#[test]
fn what_is_absent_is_an_error_of_the_same_kind() {
    let nowhere = Path::new("/nonexistent/millrace");
    let error = Config::load(nowhere, &|_| None).expect_err("no directory");
    assert_eq!(
        error.to_string(),
        "/nonexistent/millrace: there is no such directory"
    );

    let dir = tempfile::tempdir().expect("a directory");
    let text = Config::load(dir.path(), &|_| None)
        .expect_err("empty")
        .to_string();
    let lines: Vec<_> = text.lines().collect();
    assert!(
        lines[0].starts_with("millrace.toml: the file cannot be read: "),
        "{text}"
    );
    assert!(
        lines[1].starts_with("tables: the folder of the table files cannot be read"),
        "{text}"
    );

    let text = load("", &[]).expect_err("nothing set");
    assert!(
        text.contains("millrace.toml:1:1: missing key \"name\" in [source]"),
        "{text}"
    );
    assert!(text.contains("missing key \"url\" in [source]"), "{text}");
    assert!(
        text.contains("missing key \"servers\" in [stream]"),
        "{text}"
    );
    assert!(text.contains("tables: no table: add a file"), "{text}");
}

#[test]
fn syntax_errors_are_all_reported_and_hide_only_their_lines() {
    let main = "[source]\nname = shop\nurl = \nkolor = 1\n[stream]\nservers = [\"nats://h\"]\n";
    let text = errors(main);
    let places: Vec<_> = text
        .lines()
        .filter_map(|line| line.split(": ").next())
        .collect();
    assert_eq!(
        places,
        [
            "millrace.toml:2:8",
            "millrace.toml:3:7",
            "millrace.toml:4:1"
        ],
        "{text}"
    );
    let text = errors(&format!("{GOOD}[source]\nname = \"again\"\n"));
    assert!(
        text.starts_with("millrace.toml:9:") && text.contains("duplicate"),
        "{text}"
    );
}

#[test]
fn the_environment_overrides_keys_that_hold_one_value() {
    let env = |name: &str| {
        let value = match name {
            "MILLRACE_SOURCE__URL" => "postgres://from/env",
            "MILLRACE_SOURCE__CREATE" => "never",
            "MILLRACE_STREAM__SERVERS" => "nats://a:1, tls://b:2",
            "MILLRACE_STREAM__REPLICAS" => "3",
            "MILLRACE_STREAM__SYNC_INTERVAL" => "always",
            "MILLRACE_STREAM__RETENTION__MAX_AGE" => "1h",
            "MILLRACE_STREAM__TOKEN" => "hunter2",
            "MILLRACE_SINKS__A__URL" => "postgres://sink/env",
            "MILLRACE_SINKS__A__REQUIRED" => "false",
            "MILLRACE_DEFAULTS__ON_ROW_ERROR" => "halt",
            "MILLRACE_LOG__LEVEL" => "debug",
            _ => return None,
        };
        Some(value.to_owned())
    };
    let main = GOOD.replace(
        "url = \"postgres://u:hunter2@h/db\"\n[stream]",
        "url = {}\n[stream]",
    );
    let dir = directory(&main, &[("public.t.toml", "")]);
    let config = Config::load(dir.path(), &env).expect("valid");
    assert_eq!(config.source.url, Secret::inline("postgres://from/env"));
    assert_eq!(config.source.create, Create::Never);
    let servers: Vec<_> = config
        .stream
        .servers
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(servers, ["nats://a:1", "tls://b:2"]);
    assert_eq!(config.stream.replicas, 3);
    assert_eq!(config.stream.sync_interval, SyncInterval::Always);
    assert_eq!(config.stream.retention.max_age, Duration::from_secs(3600));
    assert_eq!(config.stream.auth, Auth::Token(Secret::inline("hunter2")));
    assert_eq!(config.sinks[0].url, Secret::inline("postgres://sink/env"));
    assert!(!config.sinks[0].required);
    assert_eq!(config.tables[0].on_row_error, OnRowError::Halt);
    assert_eq!(config.log.level, LogLevel::Debug);
    assert_eq!(config.stream.confirm, Confirm::Synced);

    let env = |name: &str| (name == "MILLRACE_STREAM__REPLICAS").then(|| "many".to_owned());
    let error = Config::load(dir.path(), &env)
        .expect_err("not a number")
        .to_string();
    let line = "MILLRACE_STREAM__REPLICAS: \"replicas\" must be a whole number from 1 to 5";
    assert!(error.lines().any(|found| found == line), "{error}");
}

#[test]
fn what_is_not_built_yet_is_refused_with_its_place() {
    let main = format!(
        "{}guard = \"sidecar\"\nmode = \"parallel\"\n[defaults]\non_delete = \"soft:gone\"\n",
        GOOD.replace(
            "4222\"]\n",
            "4222\"]\nconfirm = \"applied\"\npartitions = 2\n"
        )
    );
    let table = "\non_truncate = \"park\"\non_schema_change = \"park\"\n";
    let text = load(&main, &[("public.a.toml", table), ("public.b.toml", "")]);
    let expected = r#"millrace.toml:6:11: "confirm": "applied" is not supported in this release
millrace.toml:7:14: "partitions": more than 1 is not supported in this release
millrace.toml:11:9: "guard": "sidecar" is not supported in this release
millrace.toml:12:8: "mode": "parallel" is not supported in this release
millrace.toml:14:13: "on_delete": "soft:<column>" is not supported in this release
tables/public.a.toml:2:15: "on_truncate": "park" is not supported in this release"#;
    assert_eq!(text.expect_err("refused"), expected);
}

#[test]
fn two_tables_cannot_share_a_target() {
    let tables = [
        ("public.a.toml", "target = \"x.y\"\n"),
        ("public.b.toml", "\ntarget = \"x.y\"\n"),
    ];
    let text = load(GOOD, &tables).expect_err("shared");
    let expected =
        "tables/public.b.toml:2:10: table public.a is already written to x.y of sink \"a\"";
    assert_eq!(text, expected);
}

#[test]
fn no_secret_is_printed_in_settings_or_errors() {
    let config = good();
    let debug = format!("{config:?} {:?}", config.stream.servers);
    assert!(
        !debug.contains("hunter2") && debug.contains("nats://h:4222"),
        "{debug}"
    );
    let expose = config.stream.servers[0].expose();
    assert_eq!(expose, "nats://u:hunter2@h:4222");
    let broken = GOOD
        .replace("nats://u:", "amqp://u:")
        .replace("url = \"postgres", "url = 5 \"postgres")
        .replace("\"postgres\"", "[\"hunter2\"]");
    let text = errors(&broken);
    assert!(
        !text.contains("hunter2") && text.contains("servers"),
        "{text}"
    );
}

#[test]
fn a_server_url_prints_without_its_user() {
    for (url, shown) in [
        ("nats://h:4222", "nats://h:4222"),
        ("h", "nats://h"),
        ("u:p@h:1", "nats://h:1"),
        ("tls://u:p/q@r@h:1/x?y", "tls://h:1"),
    ] {
        assert_eq!(crate::ServerUrl(url.to_owned()).to_string(), shown);
    }
}
