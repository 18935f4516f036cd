//! Every value of every type arrives exactly, whether it is copied or streamed.

mod values;

use std::fmt::Write as _;

use crate::stage::{Setting, Stage};
use values::{BUILT_IN, OWN, OWN_TYPES};

/// Rows from `first` on: in row n every column has the n-th of its values, or NULL.
fn insert(table: &str, columns: &[(&str, &[&str])], first: usize) -> String {
    let mut sql = String::new();
    let rows = columns.iter().map(|(_, values)| values.len()).max();
    for row in 0..=rows.unwrap_or(0) {
        let _ = write!(sql, "INSERT INTO {table} VALUES ({}", first + row);
        for (_, values) in columns {
            let _ = write!(sql, ", {}", values.get(row).unwrap_or(&"NULL"));
        }
        sql.push_str(");\n");
    }
    sql
}

fn create(table: &str, columns: &[(&str, &[&str])]) -> String {
    let mut sql = format!("CREATE TABLE {table} (id int PRIMARY KEY");
    for (number, (type_name, _)) in columns.iter().enumerate() {
        let _ = write!(sql, ", c{number} {type_name}");
    }
    sql + ");\n"
}

async fn every_value_arrives(schema: &str, columns: &[(&str, &[&str])]) -> Stage {
    let stage = Stage::set(Setting {
        schema: &format!("{schema}{}", create("t", columns)),
        ..Setting::default()
    })
    .await;
    // As somebody who is not us would have it: what we write must not depend on it.
    stage
        .sql(
            "ALTER DATABASE source SET datestyle = 'German'; ALTER DATABASE source SET timezone = 'Asia/Tokyo';
             ALTER DATABASE source SET intervalstyle = 'iso_8601'; ALTER DATABASE source SET bytea_output = 'escape';
             ALTER DATABASE source SET extra_float_digits = -5;
             ALTER DATABASE target SET datestyle = 'SQL, DMY'; ALTER DATABASE target SET timezone = 'America/New_York';
             ALTER DATABASE target SET intervalstyle = 'sql_standard'",
        )
        .await;
    stage.sql(&insert("t", columns, 1)).await;
    let copied = stage.once().await.rows;
    stage.sql(&insert("t", columns, 1000)).await;
    assert_eq!(stage.once().await.rows, 2 * copied);
    // Each row takes the values of the next, under the default identity and with whole old rows.
    let names: Vec<_> = (0..columns.len()).map(|n| format!("c{n}")).collect();
    let rotate = format!(
        "UPDATE t SET ({0}) = (SELECT {0} FROM t o WHERE o.id = t.id + 1) WHERE id < 1000",
        names.join(", ")
    );
    stage.sql(&rotate).await;
    stage.sql("ALTER TABLE t REPLICA IDENTITY FULL").await;
    stage.sql(&rotate).await;
    stage.sql("DELETE FROM t WHERE id % 5 = 0").await;
    stage.once().await;
    stage
}

/// The columns' names and types, one text.
const SHAPE: &str = "SELECT string_agg(attname || ' ' || format_type(atttypid, atttypmod), E'\\n' ORDER BY attnum)
    FROM pg_attribute WHERE attrelid = 'public.t'::regclass AND attnum > 0 AND attname <> '_millrace_version'";

#[tokio::test]
async fn every_value_of_every_built_in_type_arrives_exactly() {
    let stage = every_value_arrives("", BUILT_IN).await;
    assert_eq!(
        stage.source_text(SHAPE).await,
        stage.target_text(SHAPE).await
    );
    let nulls = "SELECT count(*) FILTER (WHERE c28 IS NULL) || ' ' || count(*) FILTER (WHERE c28::text = 'null') FROM t";
    assert_eq!(
        stage.source_text(nulls).await,
        stage.target_text(nulls).await
    );
}

#[tokio::test]
async fn enums_and_domains_are_created_and_composites_become_text() {
    let stage = every_value_arrives(OWN_TYPES, OWN).await;
    let expected = stage
        .source_text(SHAPE)
        .await
        .replace("far_pair", "text")
        .replace("pair[]", "text")
        .replace("pair", "text")
        .replace("even", "text");
    assert_eq!(stage.target_text(SHAPE).await, expected);
    // Made like the source's: the labels' order, the constraints, what lies below.
    let types = "SELECT string_agg(concat_ws(' ', typnamespace::regnamespace, typname, format_type(typbasetype, typtypmod),
            (SELECT string_agg(enumlabel, ' < ' ORDER BY enumsortorder) FROM pg_enum WHERE enumtypid = t.oid),
            (SELECT string_agg(pg_get_constraintdef(oid), ' and ' ORDER BY pg_get_constraintdef(oid))
             FROM pg_constraint WHERE contypid = t.oid)), E'\\n' ORDER BY typname)
        FROM pg_type t WHERE typtype IN ('d', 'e') AND t.oid >= 16384 AND typname NOT IN ('short', 'far_pair', 'even')";
    assert_eq!(
        stage.source_text(types).await,
        stage.target_text(types).await
    );
}

#[tokio::test]
async fn a_domain_that_is_never_null_is_created() {
    let schema = format!(
        "{OWN_TYPES}CREATE TABLE t (id int PRIMARY KEY, s \"My Types\".short, k \"My Types\".short[])"
    );
    let stage = Stage::set(Setting {
        schema: &schema,
        ..Setting::default()
    })
    .await;
    stage.sql("INSERT INTO t VALUES (1, 'abc', '{a,b}')").await;
    stage.once().await;
    stage
        .sql("INSERT INTO t VALUES (2, 'ab   ', NULL); UPDATE t SET s = 'z' WHERE id = 1")
        .await;
    stage.once().await;
    assert_eq!(
        stage.source_text(SHAPE).await,
        stage.target_text(SHAPE).await
    );
}

#[tokio::test]
async fn enums_and_domains_are_good_keys() {
    let schema = format!(
        "{OWN_TYPES}CREATE TABLE t (k public.mood, d public.tiny, b bytea, at timestamptz, v int,
             PRIMARY KEY (k, d, b, at))"
    );
    let stage = Stage::set(Setting {
        schema: &schema,
        ..Setting::default()
    })
    .await;
    stage
        .sql("INSERT INTO t VALUES ('sad', 1, '\\x00', 'infinity', 1), ('', 2, '', '2024-01-01 00:00+01', 2)")
        .await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    stage
        .sql(
            "UPDATE t SET v = v + 1; UPDATE t SET k = 'it''s ok', b = '\\xff' WHERE d = 1;
             UPDATE t SET at = at + '1 us' WHERE d = 2",
        )
        .await;
    stage.equal(&pipeline).await;
    stage.sql("DELETE FROM t WHERE d = 2").await;
    assert_eq!(stage.equal(&pipeline).await.rows, 1);
}

#[tokio::test]
async fn a_source_without_utf8_locale_settings_still_sends_utf8() {
    let stage = Stage::set(Setting::default()).await;
    stage
        .sql("ALTER DATABASE source SET client_encoding = 'LATIN1'")
        .await;
    stage.sql("INSERT INTO t VALUES (1, 'Grüße, 日本')").await;
    stage.once().await;
    stage.sql("UPDATE t SET v = v || '€'").await;
    stage.once().await;
}
