//! Every value of every type arrives exactly, whether it is copied or streamed.

mod arrays;
mod built_in;
mod labels;
mod matrix;
mod other_types;
mod own;

use crate::stage::{Setting, Stage};
use matrix::{Majors, Table, matrix};
use own::OWN_TYPES;

/// A column's type and the values that it is tried with, as expressions of SQL.
type Tried = (&'static str, &'static [&'static str]);

#[tokio::test]
async fn every_value_of_every_type_arrives_exactly_on_15() {
    let stage = matrix(Majors::both(15)).await;
    enums_and_domains_are_like_the_sources(&stage).await;
}

#[tokio::test]
async fn every_value_of_every_type_arrives_exactly_on_18() {
    let stage = matrix(Majors::both(18)).await;
    enums_and_domains_are_like_the_sources(&stage).await;
}

#[tokio::test]
async fn every_value_of_every_type_arrives_exactly_from_15_to_18() {
    let majors = Majors {
        source: 15,
        target: 18,
    };
    matrix(majors).await;
}

/// The target lacked them all: the labels' order, the constraints, what lies below.
async fn enums_and_domains_are_like_the_sources(stage: &Stage) {
    let types = "SELECT string_agg(concat_ws(' ', typnamespace::regnamespace, typname, format_type(typbasetype, typtypmod),
            (SELECT string_agg(enumlabel, ' < ' ORDER BY enumsortorder) FROM pg_enum WHERE enumtypid = t.oid),
            (SELECT string_agg(pg_get_constraintdef(oid), ' and ' ORDER BY pg_get_constraintdef(oid))
             FROM pg_constraint WHERE contypid = t.oid)), E'\\n' ORDER BY typname)
        FROM pg_type t WHERE typtype IN ('d', 'e') AND t.oid >= 16384 AND typname NOT IN ('short', 'far_pair', 'even')
        AND typnamespace::regnamespace::text <> 'known'";
    for client in [&stage.source, &stage.target] {
        // Constraints are printed with the session's own dates.
        client
            .batch_execute(matrix::PINNED)
            .await
            .expect("session is pinned");
    }
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
    for majors in [Majors::both(15), Majors::both(18)] {
        let stage = Stage::set(majors.setting(&schema)).await;
        stage.sql("INSERT INTO t VALUES (1, 'abc', '{a,b}')").await;
        stage.once().await;
        stage
            .sql("INSERT INTO t VALUES (2, 'ab   ', NULL); UPDATE t SET s = 'z' WHERE id = 1")
            .await;
        stage.once().await;
        let table = Table::of("public.t", &[]);
        assert_eq!(
            stage.source_text(&table.shape()).await,
            stage.target_text(&table.shape()).await
        );
    }
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

/// Such a change of the key is logged as one, and the index takes it for none.
#[tokio::test]
async fn a_key_that_is_equal_to_the_old_one_and_prints_differently_arrives() {
    let keys = [
        ("numeric", "1.0", "1.00"),
        ("double precision", "'0'", "'-0'"),
        ("interval", "'1 day'", "'24:00'"),
        ("jsonb", "'[1.0]'", "'[1.00]'"),
        ("text COLLATE \"nocase\"", "'a'", "'A'"),
    ];
    let mut schema = String::from(
        "CREATE COLLATION nocase (provider = icu, locale = 'und-u-ks-level2', deterministic = false);",
    );
    let names = [
        "public.k0",
        "public.k1",
        "public.k2",
        "public.k3",
        "public.k4",
    ];
    for (name, (key, ..)) in names.iter().zip(keys) {
        schema.push_str(&format!(
            "CREATE TABLE {name} (k {key} PRIMARY KEY, v int);"
        ));
    }
    let stage = Stage::set(Setting {
        schema: &schema,
        tables: &names.map(|name| (name, "")),
        ..Setting::default()
    })
    .await;
    for (name, (_, old, _)) in names.iter().zip(keys) {
        stage
            .sql(&format!("INSERT INTO {name} VALUES ({old}, 1)"))
            .await;
    }
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    for (name, (_, old, new)) in names.iter().zip(keys) {
        stage
            .sql(&format!("UPDATE {name} SET k = {new}, v = v + 1"))
            .await;
        stage.equal(&pipeline).await;
        stage
            .sql(&format!(
                "UPDATE {name} SET k = {old}; UPDATE {name} SET k = {new}, v = v + 1"
            ))
            .await;
        stage.equal(&pipeline).await;
        stage
            .sql(&format!(
                "DELETE FROM {name}; INSERT INTO {name} VALUES ({old}, 7)"
            ))
            .await;
        stage.equal(&pipeline).await;
    }
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
