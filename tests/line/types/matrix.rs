//! All types at once: their tables, their rows on every path, and the comparison.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use millrace_lab::PostgresOptions;
use tokio_postgres::{Client, SimpleQueryMessage};

use super::Tried;
use super::arrays::ARRAYS;
use super::built_in::{BUILT_IN, NO_INPUT, SINCE_17};
use super::own::{EXTENSIONS, KNOWN, KNOWN_TYPES, OWN, OWN_TYPES};
use crate::stage::{Setting, Stage};

/// The Postgres versions of both sides.
#[derive(Clone, Copy)]
pub(super) struct Majors {
    pub(super) source: u32,
    pub(super) target: u32,
}

impl Majors {
    pub(super) fn both(major: u32) -> Self {
        Self {
            source: major,
            target: major,
        }
    }

    /// A stage of these versions; of one where they are the same.
    pub(super) fn setting(self, schema: &str) -> Setting<'_> {
        let of = |major| PostgresOptions {
            major: Some(major),
            ..PostgresOptions::default()
        };
        Setting {
            schema,
            postgres: of(self.source),
            target_postgres: (self.source != self.target).then(|| of(self.target)),
            ..Setting::default()
        }
    }
}

/// A table with one column for each type, `c0` and so on.
pub(super) struct Table {
    name: &'static str,
    columns: Vec<(String, Vec<String>)>,
}

impl Table {
    pub(super) fn of(name: &'static str, tried: &[Tried]) -> Self {
        let columns = tried.iter().map(|(type_name, values)| {
            let values = values.iter().map(|value| (*value).to_owned());
            ((*type_name).to_owned(), values.collect())
        });
        Self {
            name,
            columns: columns.collect(),
        }
    }

    /// The arrays of all these types, made of their values: all in a row, none, two dimensions, another bound.
    fn of_arrays(name: &'static str, tried: &[Tried]) -> Self {
        let columns = tried
            .iter()
            .filter(|(element, _)| !element.ends_with("vector") || *element == "tsvector");
        let columns = columns.map(|(element, values)| {
            let one = |value: &str| format!("({value})::{element}");
            let all: Vec<_> = values.iter().map(|value| one(value)).collect();
            let (first, last) = (&all[0], &all[all.len() - 1]);
            let values = vec![
                format!("ARRAY[{}, NULL]::{element}[]", all.join(", ")),
                format!("'{{}}'::{element}[]"),
                format!("ARRAY[[{last}, NULL], [{first}, {last}]]::{element}[]"),
                format!("('[-5:-4]=' || ARRAY[{first}, {last}]::{element}[]::text)::{element}[]"),
            ];
            (format!("{element}[]"), values)
        });
        Self {
            name,
            columns: columns.collect(),
        }
    }

    pub(super) fn create(&self) -> String {
        let mut sql = format!("CREATE TABLE {} (id int PRIMARY KEY", self.name);
        for (number, (type_name, _)) in self.columns.iter().enumerate() {
            let _ = write!(sql, ", c{number} {type_name}");
        }
        sql + ");\n"
    }

    /// Rows from `first` on: in row n every column has the n-th of its values, or NULL.
    pub(super) fn insert(&self, first: usize) -> String {
        let mut sql = String::new();
        let rows = self.columns.iter().map(|(_, values)| values.len()).max();
        for row in 0..=rows.unwrap_or(0) {
            let _ = write!(sql, "INSERT INTO {} VALUES ({}", self.name, first + row);
            for (_, values) in &self.columns {
                let _ = write!(sql, ", {}", values.get(row).map_or("NULL", String::as_str));
            }
            sql.push_str(");\n");
        }
        sql
    }

    /// Each of the first rows takes the values of the next.
    fn rotate(&self) -> String {
        let names: Vec<_> = (0..self.columns.len()).map(|n| format!("c{n}")).collect();
        format!(
            "UPDATE {1} t SET ({0}) = (SELECT {0} FROM {1} o WHERE o.id = t.id + 1) WHERE id < 1000;\n",
            names.join(", "),
            self.name
        )
    }

    /// The columns' names and types, one text.
    pub(super) fn shape(&self) -> String {
        format!(
            "SELECT string_agg(attname || ' ' || format_type(atttypid, atttypmod), E'\\n' ORDER BY attnum)
             FROM pg_attribute WHERE attrelid = '{}'::regclass AND attnum > 0
             AND attname NOT LIKE '\\_millrace\\_%' AND NOT attisdropped",
            self.name
        )
    }

    /// Every row, with each value as its own type prints it, and NULL apart from every text.
    pub(super) async fn rows(&self, client: &Client) -> Vec<Vec<String>> {
        let names: String = (0..self.columns.len())
            .map(|n| format!(", format('%L', c{n})"))
            .collect();
        let sql = format!("SELECT id::text{names} FROM {} ORDER BY id", self.name);
        let rows = client.simple_query(&sql).await.expect("rows are read");
        let rows = rows.iter().filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(row),
            _ => None,
        });
        rows.map(|row| {
            let cells = (0..row.len()).map(|at| row.get(at).expect("no cell is NULL").to_owned());
            cells.collect()
        })
        .collect()
    }

    /// Checks that the target has the source's rows, and gives their number.
    async fn assert_same(&self, when: &str, source: &Client, target: &Client) -> usize {
        let (ours, theirs) = (self.rows(source).await, self.rows(target).await);
        let keys = |rows: &[Vec<String>]| rows.iter().map(|row| row[0].clone()).collect::<Vec<_>>();
        assert_eq!(keys(&ours), keys(&theirs), "{when}: rows of {}", self.name);
        for (ours, theirs) in ours.iter().zip(&theirs) {
            for ((type_name, _), (ours_cell, theirs_cell)) in
                self.columns.iter().zip(ours[1..].iter().zip(&theirs[1..]))
            {
                let start = |text: &String| text.chars().take(300).collect::<String>();
                assert!(
                    ours_cell == theirs_cell,
                    "{when}: {type_name} in row {} of {}: the source has {}, the target {}",
                    ours[0],
                    self.name,
                    start(ours_cell),
                    start(theirs_cell)
                );
            }
        }
        ours.len()
    }
}

/// Both sides print values alike, whatever their databases' defaults.
pub(super) const PINNED: &str = "SET datestyle = 'ISO'; SET intervalstyle = 'postgres'; SET timezone = 'UTC';
    SET extra_float_digits = 3; SET bytea_output = 'hex'; SET lc_monetary = 'C'; SET search_path = ''";

/// As somebody who is not us would have it: what we write must not depend on it.
const SOURCE_DEFAULTS: &str = "ALTER DATABASE source SET datestyle = 'German';
    ALTER DATABASE source SET timezone = 'Asia/Tokyo'; ALTER DATABASE source SET intervalstyle = 'iso_8601';
    ALTER DATABASE source SET bytea_output = 'escape'; ALTER DATABASE source SET extra_float_digits = -5;
    ALTER DATABASE source SET xmloption = 'document'; ALTER DATABASE source SET xmlbinary = 'hex'";
const TARGET_DEFAULTS: &str = "ALTER DATABASE target SET datestyle = 'SQL, DMY';
    ALTER DATABASE target SET timezone = 'America/New_York'; ALTER DATABASE target SET xmloption = 'document';
    ALTER DATABASE target SET intervalstyle = 'sql_standard'; ALTER DATABASE target SET array_nulls = off;
    ALTER DATABASE target SET standard_conforming_strings = off";

/// The types whose values are loaded in binary format, and all their values.
pub(super) fn plain() -> Vec<Tried> {
    let plain_name = |name: &str| {
        let (begin, end) = name.split_once('(').unwrap_or((name, ""));
        let end = end.split_once(')').map_or("", |(_, end)| end);
        let mut plain = PLAIN.iter();
        plain.position(|plain| *plain == format!("{begin}{end}"))
    };
    let tried = BUILT_IN.iter();
    let tried = tried.filter_map(|tried| Some((plain_name(tried.0)?, *tried)));
    let (found, tried): (BTreeSet<_>, Vec<_>) = tried.unzip();
    assert_eq!(found.len(), PLAIN.len(), "{found:?}");
    tried
}

const PLAIN: [&str; 15] = [
    "boolean",
    "smallint",
    "integer",
    "bigint",
    "numeric",
    "character",
    "character varying",
    "text",
    "bytea",
    "date",
    "timestamp without time zone",
    "timestamp with time zone",
    "uuid",
    "json",
    "jsonb",
];

/// The extensions among these that a server can create.
async fn available(client: &Client) -> Vec<String> {
    let rows = client
        .query("SELECT name::text FROM pg_available_extensions", &[])
        .await
        .expect("extensions are listed");
    let names = rows.iter().map(|row| row.get::<_, String>(0));
    names
        .filter(|name| EXTENSIONS.iter().any(|(extension, _)| extension == name))
        .collect()
}

/// Sends every value of every type through all paths: loaded; inserted; updated, with and without whole old rows; read
/// again in chunks. After each the target must have what the source has.
pub(super) async fn matrix(majors: Majors) -> Stage {
    let stage = Stage::set(Setting {
        tables: &[
            ("public.t", ""),
            ("public.plain", ""),
            ("public.arrays", ""),
            ("public.own", ""),
            ("known.t", ""),
            ("public.extended", ""),
        ],
        ..majors.setting(&format!("{OWN_TYPES}{KNOWN_TYPES}"))
    })
    .await;
    stage.target_sql(KNOWN_TYPES).await;
    let mut extended = Vec::new();
    let here = available(&stage.source).await;
    let there = available(&stage.target).await;
    for extension in here.iter().filter(|name| there.contains(name)) {
        let create = format!("CREATE EXTENSION {extension} SCHEMA public");
        stage.sql(&create).await;
        // A target that lacks them is met once: there they are text.
        if majors.source == majors.target {
            stage.target_sql(&create).await;
        }
        let of_it = EXTENSIONS.iter().filter(|(name, _)| name == extension);
        extended.extend(of_it.map(|(_, tried)| *tried));
    }
    let mut built_in = BUILT_IN.to_vec();
    if majors.source >= 17 {
        built_in.extend(SINCE_17);
    }
    let mut arrays = Table::of_arrays("public.arrays", &built_in);
    arrays
        .columns
        .extend(Table::of("public.arrays", ARRAYS).columns);
    let tables = [
        Table::of("public.t", &built_in),
        Table::of("public.plain", &plain()),
        arrays,
        Table::of("public.own", OWN),
        Table::of("known.t", KNOWN),
        Table::of("public.extended", &extended),
    ];
    let each = |sql: fn(&Table) -> String| tables.iter().map(sql).collect::<String>();
    stage.sql(&each(Table::create)).await;
    nothing_is_forgotten(&stage).await;

    write(&stage, &each(|table| table.insert(1))).await;
    stage.sql(SOURCE_DEFAULTS).await;
    stage.target_sql(TARGET_DEFAULTS).await;
    stage.run_once().await;
    let copied = all_same(&stage, "copied", &tables).await;
    shapes_are_kept(&stage, majors, &tables).await;

    // Our own sessions write and read as they did before the defaults were changed.
    write(&stage, &each(|table| table.insert(1000))).await;
    stage.run_once().await;
    let inserted = all_same(&stage, "inserted", &tables).await;
    assert_eq!(inserted, 2 * copied);

    stage.sql(&each(Table::rotate)).await;
    stage.run_once().await;
    all_same(&stage, "updated", &tables).await;

    let whole = |table: &Table| format!("ALTER TABLE {} REPLICA IDENTITY FULL;\n", table.name);
    stage
        .sql(&tables.iter().map(whole).collect::<String>())
        .await;
    stage.sql(&each(Table::rotate)).await;
    stage
        .sql(&each(|table| {
            format!("DELETE FROM {} WHERE id % 5 = 0;\n", table.name)
        }))
        .await;
    stage.run_once().await;
    let left = all_same(&stage, "updated with whole old rows", &tables).await;

    stage
        .target_sql(&each(|table| format!("DELETE FROM {};\n", table.name)))
        .await;
    let pipeline = stage.start();
    let ordered = stage.start_with(&["backfill", "start", "--all", "--wait"]);
    stage.ends(ordered, 0, &["done"]).await;
    assert_eq!(all_same(&stage, "backfilled", &tables).await, left);
    Stage::stopped(pipeline).await;
    stage
}

/// Runs long SQL at the source; a failure shows where it failed and not all of it.
async fn write(stage: &Stage, sql: &str) {
    use tokio_postgres::error::ErrorPosition;

    if let Err(error) = stage.source.batch_execute(sql).await {
        let at = error
            .as_db_error()
            .and_then(|error| match error.position() {
                Some(ErrorPosition::Original(at)) => Some(*at as usize - 1),
                _ => None,
            });
        let near: String = sql.chars().skip(at.unwrap_or(0)).take(200).collect();
        panic!("{error:?} near {near}");
    }
}

async fn all_same(stage: &Stage, when: &str, tables: &[Table]) -> usize {
    for client in [&stage.source, &stage.target] {
        client
            .batch_execute(PINNED)
            .await
            .expect("session is pinned");
    }
    let mut rows = 0;
    for table in tables {
        rows += table.assert_same(when, &stage.source, &stage.target).await;
    }
    for client in [&stage.source, &stage.target] {
        client
            .batch_execute("RESET ALL")
            .await
            .expect("session is as it was");
    }
    rows
}

/// Every base, range and multirange type of this server, and every array of one, is some column's, or is named as
/// one that can have no values. A type that a later Postgres brings makes this fail.
async fn nothing_is_forgotten(stage: &Stage) {
    let excluded: Vec<_> = NO_INPUT
        .iter()
        .map(|(name, _)| format!("'{name}'"))
        .collect();
    let forgotten = stage
        .source_text(&format!(
            "SELECT string_agg(t.typname, ', ') FROM pg_type t LEFT JOIN pg_type e ON e.typarray = t.oid
             WHERE t.typtype IN ('b', 'r', 'm') AND t.typnamespace = 'pg_catalog'::regnamespace
             -- Arrays of the catalog's own rows, and of what no column can be.
             AND coalesce(e.typtype NOT IN ('c', 'p'), true)
             AND t.typname NOT IN ({0}) AND coalesce(e.typname NOT IN ({0}), true)
             AND NOT EXISTS (SELECT FROM pg_attribute WHERE atttypid = t.oid
                 AND attrelid IN ('public.t'::regclass, 'public.arrays'::regclass))",
            excluded.join(", ")
        ))
        .await;
    assert_eq!(forgotten, "", "types without values to try");
}

/// A type that the target has or can be given is kept; another becomes text.
async fn shapes_are_kept(stage: &Stage, majors: Majors, tables: &[Table]) {
    for table in tables {
        let mut expected = stage.source_text(&table.shape()).await;
        let lacking: &[&str] = match table.name {
            "public.own" => &["far_pair", "pair", "even", "nest", "spans", "span"],
            "public.extended" if majors.source != majors.target => &["citext", "hstore"],
            _ => &[],
        };
        for name in lacking {
            expected = expected
                .replace(&format!(" {name}[]"), " text")
                .replace(&format!(" {name}"), " text");
        }
        assert_eq!(stage.target_text(&table.shape()).await, expected);
    }
}
