//! What `on_schema_change = "park"` and `"ignore"` do about each kind of change: only tables that a change concerns
//! are parked, each with the statement that helps, and every replica ends exact.

use std::collections::BTreeMap;
use std::time::Instant;

use millrace_lab::{Compared, Pipeline};
use serde_json::Value;

use crate::stage::{PATIENCE, Setting, Stage};

const SCHEMA: &str = "CREATE TABLE retyped (id int PRIMARY KEY, a int);
    INSERT INTO retyped SELECT i, i FROM generate_series(1, 50) i;
    CREATE TABLE narrowed (id int PRIMARY KEY, a bigint);
    INSERT INTO narrowed SELECT i, i FROM generate_series(1, 50) i;
    CREATE TABLE dice (id int PRIMARY KEY, v text);
    INSERT INTO dice SELECT i, 'v' || i FROM generate_series(1, 50) i;
    CREATE TABLE keyed (id int PRIMARY KEY, region text NOT NULL DEFAULT 'eu', v text);
    INSERT INTO keyed SELECT i, 'eu', 'v' || i FROM generate_series(1, 50) i;
    CREATE TABLE identified (id int PRIMARY KEY, v text);
    INSERT INTO identified SELECT i, 'v' || i FROM generate_series(1, 50) i;
    CREATE TABLE anew (id int PRIMARY KEY, v text);
    INSERT INTO anew SELECT i, 'v' || i FROM generate_series(1, 50) i;
    CREATE TABLE other (id int PRIMARY KEY, v text);
    INSERT INTO other SELECT i, 'v' || i FROM generate_series(1, 50) i;
    CREATE TABLE parts (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
    CREATE TABLE parts_0 PARTITION OF parts FOR VALUES FROM (0) TO (500);
    CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (1000) TO (2000);
    CREATE TABLE parts_2 (id int PRIMARY KEY, v text);
    INSERT INTO parts SELECT i, 'v' || i FROM generate_series(1, 50) i;
    INSERT INTO parts SELECT i, 'v' || i FROM generate_series(1001, 1050) i;
    INSERT INTO parts_2 SELECT i, 'v' || i FROM generate_series(501, 550) i";

const CHANGES: [&str; 9] = [
    "ALTER TABLE retyped ALTER COLUMN a TYPE bigint USING a * 3000000000; INSERT INTO retyped VALUES (60, 1)",
    "ALTER TABLE narrowed ALTER COLUMN a TYPE int USING a * 2; INSERT INTO narrowed VALUES (60, 1)",
    "ALTER TABLE dice ADD COLUMN r float8 DEFAULT random(); INSERT INTO dice (id, v) VALUES (60, 'new')",
    "ALTER TABLE keyed DROP CONSTRAINT keyed_pkey, ADD PRIMARY KEY (region, id);
     INSERT INTO keyed (region, id) VALUES ('us', 1); DELETE FROM keyed WHERE id = 3",
    "ALTER TABLE identified REPLICA IDENTITY FULL; UPDATE identified SET v = 'full' WHERE id < 10;
     DELETE FROM identified WHERE id > 40",
    "DROP TABLE anew; CREATE TABLE anew (v text, id int PRIMARY KEY);
     INSERT INTO anew SELECT 'anew', i FROM generate_series(30, 70) i",
    "DROP TABLE other; CREATE TABLE other (id int PRIMARY KEY, v text, more int);
     INSERT INTO other SELECT i, 'other', i FROM generate_series(30, 70) i",
    "ALTER TABLE parts ATTACH PARTITION parts_2 FOR VALUES FROM (500) TO (1000)",
    "ALTER TABLE parts DETACH PARTITION parts_0",
];

const RETYPE: &str =
    r#"ALTER TABLE "public"."retyped" ALTER COLUMN "a" TYPE bigint USING "a"::bigint;"#;
const ROLL: &str = r#"ALTER TABLE "public"."dice" ADD COLUMN "r" double precision"#;
const KEY: &str = r#"ALTER TABLE "public"."keyed" DROP CONSTRAINT "keyed_pkey", ADD PRIMARY KEY ("region", "id")"#;
const MORE: &str = r#"ALTER TABLE "public"."other" ADD COLUMN "more" integer"#;

/// Every table under this policy with its replica, a process that runs, and all of [`CHANGES`].
async fn changed(policy: &str) -> (Stage, Pipeline) {
    let names = [
        "public.retyped",
        "public.narrowed",
        "public.dice",
        "public.keyed",
        "public.identified",
        "public.anew",
        "public.other",
        "public.parts",
    ];
    let tables = names.map(|name| (name, policy));
    let stage = Stage::set(Setting {
        schema: SCHEMA,
        tables: &tables,
        ..Setting::default()
    })
    .await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    for change in CHANGES {
        stage.sql(change).await;
    }
    (stage, pipeline)
}

/// Waits until exactly these tables are parked, each with its code and a remedy that has the statement.
async fn parked(pipeline: &mut Pipeline, expected: &[(&str, &str, &str)]) {
    let expected: BTreeMap<_, _> = expected
        .iter()
        .map(|(name, code, statement)| (format!("public.{name}"), (*code, *statement)))
        .collect();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let (_, status) = pipeline.get("/status").await.expect("answers");
        let status: Value = serde_json::from_str(&status).expect("json");
        let tables = status["tables"].as_array().expect("tables").iter();
        let found: Vec<_> = tables.filter(|table| table["state"] == "parked").collect();
        let is_expected = |table: &&Value| {
            let name = table["name"].as_str().unwrap_or_default();
            expected.get(name).is_some_and(|(code, statement)| {
                let remedy = table["remedy"].as_str().unwrap_or_default();
                table["code"] == *code && remedy.contains(statement)
            })
        };
        if found.len() == expected.len() && found.iter().all(is_expected) {
            return;
        }
        assert!(Instant::now() < deadline, "{found:#?}\n{}", pipeline.logs());
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
}

async fn equal(stage: &Stage, pipeline: &Pipeline, tables: &[&str]) {
    let tables: Vec<_> = tables
        .iter()
        .map(|name| Compared::same(&format!("public.{name}")))
        .collect();
    stage.equal_as(pipeline, &tables).await;
}

#[tokio::test]
async fn a_policy_that_parks_waits_for_the_operator_whatever_changed() {
    let (stage, mut pipeline) = changed("on_schema_change = \"park\"").await;
    let statements = [
        ("retyped", "E1315", RETYPE),
        ("dice", "E1315", ROLL),
        ("keyed", "E1316", KEY),
        ("other", "E1315", MORE),
    ];
    parked(&mut pipeline, &statements).await;
    // The others are read again, without the rows that are gone, or had nothing to do: a type whose values the
    // target's takes is no reason to wait.
    let others = ["narrowed", "identified", "anew", "parts"];
    equal(&stage, &pipeline, &others).await;
    for (_, _, statement) in statements {
        stage.target_sql(statement).await;
    }
    stage.equal(&pipeline).await;
    parked(&mut pipeline, &[]).await;
}

#[tokio::test]
async fn a_policy_that_ignores_parks_only_what_the_target_cannot_take() {
    let (stage, mut pipeline) = changed("on_schema_change = \"ignore\"").await;
    let statements = [("retyped", "E1305", RETYPE), ("keyed", "E1316", KEY)];
    parked(&mut pipeline, &statements).await;
    let others = ["narrowed", "identified", "anew", "parts"];
    equal(&stage, &pipeline, &others).await;
    // What is new stays out; the rows of the other table of that name come.
    let rows = "SELECT count(*) || ' ' || max(id) || ' ' || max(v) FROM dice WHERE v = 'new'";
    stage.target_shows(&pipeline, rows, "1 60 new").await;
    let rows = "SELECT count(*) || ' ' || min(id) || ' ' || min(v) FROM other";
    stage.target_shows(&pipeline, rows, "41 30 other").await;
    let columns = "SELECT string_agg(attname, ' ' ORDER BY attrelid::regclass::text, attnum) FROM pg_attribute \
        WHERE attrelid IN ('dice'::regclass, 'other'::regclass) AND attnum > 0 AND attname <> '_millrace_version'";
    assert_eq!(stage.target_text(columns).await, "id v id v");
    let kept = "SELECT format_type(atttypid, NULL) FROM pg_attribute WHERE attrelid = 'narrowed'::regclass \
        AND attname = 'a'";
    assert_eq!(stage.target_text(kept).await, "bigint");
    for (_, _, statement) in statements {
        stage.target_sql(statement).await;
    }
    equal(&stage, &pipeline, &["retyped", "keyed"]).await;
    stage
        .sql(
            "UPDATE dice SET v = 'later' WHERE id = 60; UPDATE other SET v = 'later' WHERE id = 30",
        )
        .await;
    let later = "SELECT d.v || o.v FROM dice d, other o WHERE d.id = 60 AND o.id = 30";
    stage.target_shows(&pipeline, later, "laterlater").await;
    parked(&mut pipeline, &[]).await;
}
