//! The suite of `trait Sink` on every target.

#[path = "conformance/keys.rs"]
mod keys;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use millrace_config::{Code, Create};
use millrace_event::{ColumnSchema, Lsn, Position, TableName, TableSchema, TypeSchema, Version};
use millrace_lab::{Postgres, PostgresOptions};
use millrace_sink::batch::{Batch, Checkpoint};
use millrace_sink::conformance::{self, Rows, Target};
use millrace_sink::fold::{Fold, RowChange};
use millrace_sink::memory::MemoryTarget;
use millrace_sink::postgres::{Connect, PostgresSink, connector};
use millrace_sink::progress::{CopyProgress, CopyState};
use millrace_sink::row::{Cell, TableLayout};
use millrace_sink::sink::{CopyTooOld, Elected, Sink, SinkError};
use millrace_sink::sql;
use tokio_postgres::Client;

#[tokio::test]
async fn memory_passes_the_suite() {
    conformance::check(&MemoryTarget::new(), 300).await;
}

struct PostgresTarget {
    connect: Connect,
    client: Client,
    /// `None` for the default.
    plain_insert_rows: Option<usize>,
}

impl Target for PostgresTarget {
    type Sink = PostgresSink;

    fn sink(&self, name: &str) -> PostgresSink {
        let sink = PostgresSink::new(name, Arc::clone(&self.connect), Create::Auto);
        match self.plain_insert_rows {
            Some(rows) => sink.with_plain_inserts_of(rows),
            None => sink,
        }
    }

    async fn rows(&self, layout: &TableLayout) -> Rows {
        let sql = format!(
            "SELECT id::text, replace(_millrace_version::text, '-', ''), ARRAY[id::text, n::text, big] \
             FROM {}",
            layout.target.quoted()
        );
        let rows = self.client.query(&sql, &[]).await.expect("reads");
        let rows = rows.iter().map(|row| {
            let version: Version = row.get::<_, &str>(1).parse().expect("a version");
            (row.get(0), (version, row.get(2)))
        });
        rows.collect()
    }

    async fn open_letters(&self, layout: &TableLayout) -> usize {
        let sql = "SELECT count(*) FROM millrace.dead_letter \
                   WHERE relation = $1 AND resolved_at IS NULL";
        let row = self
            .client
            .query_one(sql, &[&layout.relation()])
            .await
            .expect("counts");
        row.get::<_, i64>(0) as usize
    }
}

async fn database(postgres: &Postgres, name: &str) -> PostgresTarget {
    postgres
        .create_database(name)
        .await
        .expect("creates a database");
    let url = postgres.url(name);
    let dsn = move || Ok(millrace_connect::postgres::Dsn::parse(&url)?);
    let client = postgres.connect(name).await.expect("connects");
    PostgresTarget {
        connect: connector(name, dsn),
        client,
        plain_insert_rows: None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_passes_the_suite() {
    let postgres = Postgres::start(PostgresOptions::default())
        .await
        .expect("starts");
    conformance::check(&database(&postgres, "suite").await, 25).await;
}

/// The suite's batches are small, and so would never be worth a plain insert.
#[tokio::test(flavor = "multi_thread")]
async fn postgres_passes_the_suite_with_plain_inserts() {
    let postgres = Postgres::start(PostgresOptions::default())
        .await
        .expect("starts");
    let plainly = PostgresTarget {
        plain_insert_rows: Some(1),
        ..database(&postgres, "plainly").await
    };
    conformance::check(&plainly, 25).await;
}

fn cell(text: &str) -> Cell {
    Cell::Text(Bytes::copy_from_slice(text.as_bytes()))
}

fn change(layout: &Arc<TableLayout>, lsn: u64, change: RowChange, from: Checkpoint) -> Batch {
    let mut fold = Fold::new();
    fold.change(layout, Version::new(1, Lsn(lsn), 1), change)
        .expect("has its key");
    let to = Checkpoint {
        stream_seq: from.stream_seq + 1,
        position: Position::new(1, Lsn(lsn), 1),
        source_ts_us: 0,
    };
    Batch {
        from,
        to,
        copy: None,
        steps: fold.finish(),
        commit: true,
    }
}

/// While a delete is not committed, an older row that comes meanwhile does not see its tombstone, waits for it
/// and then inserts: the row is back. One writer at a time is what prevents it, and the compare-and-set of the
/// position is what makes the writer one.
#[tokio::test(flavor = "multi_thread")]
async fn a_deposed_worker_cannot_bring_a_deleted_row_back() {
    let postgres = Postgres::start(PostgresOptions::default())
        .await
        .expect("starts");
    let target = database(&postgres, "race").await;
    let mut sink = target.sink("race");
    let Ok(Elected::Yes(position)) = sink.open().await else {
        panic!("is elected")
    };
    let schema = conformance::schema("race");
    let ensured = sink
        .ensure_table(&schema, None, &conformance::settings(&schema.name))
        .await;
    let layout = ensured.expect("ensures").layout;
    let put = |n: &str| RowChange::Put {
        created: false,
        row: [cell("1"), cell(n), cell("x")].into(),
        old: None,
    };
    let batch = change(&layout, 1, put("1"), position.checkpoint);
    sink.apply(&batch).await.expect("applies");

    let successor = postgres.connect("race").await.expect("connects");
    let delete = "BEGIN; UPDATE millrace.position SET fence = fence + 1; \
        DELETE FROM millrace_suite.race; \
        INSERT INTO millrace.tombstone (relation, key, version) \
        VALUES ('millrace_suite.race', '1', '00000001000000000000000900000001')";
    successor.batch_execute(delete).await.expect("deletes");
    let late = change(&layout, 5, put("5"), batch.to);
    let deposed = tokio::spawn(async move { sink.apply(&late).await });
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    assert!(!deposed.is_finished(), "it waits for the successor");
    successor.batch_execute("COMMIT").await.expect("commits");
    let refused = deposed.await.expect("does not panic");
    assert!(matches!(refused, Err(SinkError::Fenced)), "{refused:?}");
    assert!(target.rows(&layout).await.is_empty());
    // The guard alone, with a snapshot that sees the tombstone, refuses the row too.
    let sql = sql::upsert(&layout, &[sql::Form::Text; 3])
        .replace("$1", "'{1}'")
        .replace("$2", "'{5}'")
        .replace("$3", "'{x}'")
        .replace("$4", "'{00000001000000000000000500000001}'")
        .replace("$5", "'{1}'");
    successor.batch_execute(&sql).await.expect("runs");
    assert!(target.rows(&layout).await.is_empty());
}

/// Rows that the source made are written by a plain insert where there are many. One that the target has all the
/// same, newer or older, meets the guard.
#[tokio::test(flavor = "multi_thread")]
async fn new_rows_that_the_target_has_already_meet_the_guard() {
    let postgres = Postgres::start(PostgresOptions::default())
        .await
        .expect("starts");
    let target = database(&postgres, "new_rows").await;
    let mut sink = target.sink("new_rows");
    let Ok(Elected::Yes(position)) = sink.open().await else {
        panic!("is elected")
    };
    let schema = conformance::schema("new_rows");
    let ensured = sink
        .ensure_table(&schema, None, &conformance::settings(&schema.name))
        .await;
    let layout = ensured.expect("ensures").layout;
    let created = |lsn: u64, ids: std::ops::Range<u64>, from: Checkpoint| {
        let mut fold = Fold::new();
        for id in ids {
            let put = RowChange::Put {
                created: true,
                row: [cell(&id.to_string()), cell(&lsn.to_string()), cell("x")].into(),
                old: None,
            };
            fold.change(&layout, Version::new(1, Lsn(lsn), 1), put)
                .expect("has its key");
        }
        let to = Checkpoint {
            stream_seq: from.stream_seq + 1,
            position: Position::new(1, Lsn(lsn), 1),
            source_ts_us: 0,
        };
        let (steps, commit) = (fold.finish(), true);
        Batch {
            from,
            to,
            copy: None,
            steps,
            commit,
        }
    };
    let sums = "SELECT count(*), coalesce(sum(n), 0)::bigint, count(DISTINCT xmin::text) \
        FROM millrace_suite.new_rows";
    let sums = async || {
        let row = target.client.query_one(sums, &[]).await.expect("reads");
        (row.get::<_, i64>(0), row.get::<_, i64>(1), row.get(2))
    };
    let first = created(1, 0..300, position.checkpoint);
    assert_eq!(sink.apply(&first).await.expect("applies").written, 300);
    assert_eq!(sums().await, (300, 300, 1_i64));
    // Row 299 is older here, row 300 newer.
    let newer = "INSERT INTO millrace_suite.new_rows \
        VALUES (300, 1000, 'y', 'ffffffff-ffff-ffff-ffff-ffffffffffff')";
    target.client.batch_execute(newer).await.expect("inserts");
    let second = created(2, 299..600, first.to);
    let applied = sink.apply(&second).await.expect("applies");
    assert_eq!((applied.written, applied.stale), (300, 1));
    assert_eq!(applied.dead(), 0);
    assert_eq!(sums().await.0, 600);
    assert_eq!(sums().await.1, 299 + 300 * 2 + 1000);
    let newer = "UPDATE millrace_suite.new_rows SET _millrace_version = DEFAULT WHERE id = 300";
    target.client.batch_execute(newer).await.expect("updates");
    // What could not tell that a key is there is not written to. A new session makes the guess again.
    drop(sink);
    let mut sink = target.sink("new_rows");
    conformance::elected(&mut sink).await;
    let mut adopt = conformance::settings(&schema.name);
    adopt.adopt = true;
    let ensured = sink.ensure_table(&schema, None, &adopt).await;
    ensured.unwrap_or_else(|error| panic!("ensures: {error:?}"));
    let third = created(3, 600..900, second.to);
    sink.apply(&third).await.expect("applies");
    let drop_key = "ALTER TABLE millrace_suite.new_rows DROP CONSTRAINT new_rows_pkey";
    target.client.batch_execute(drop_key).await.expect("drops");
    let refused = sink.apply(&created(4, 600..900, third.to)).await;
    assert!(
        matches!(&refused, Err(SinkError::Table { condition, .. }) if condition.code == Code::TargetKey),
        "{refused:?}"
    );
    assert_eq!(sums().await.0, 900);
}

/// A copy from before deletes that are forgotten would bring deleted rows back, or be rejected without a word.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_from_before_forgotten_deletes_is_refused_aloud() {
    let postgres = Postgres::start(PostgresOptions::default())
        .await
        .expect("starts");
    let target = database(&postgres, "old_copy").await;
    let mut sink = target.sink("old_copy");
    let Ok(Elected::Yes(position)) = sink.open().await else {
        panic!("is elected")
    };
    let schema = conformance::schema("old_copy");
    let settings = conformance::settings(&schema.name);
    let ensured = sink.ensure_table(&schema, None, &settings).await;
    let layout = ensured.expect("ensures").layout;
    let put = || RowChange::Put {
        created: true,
        row: [cell("1"), cell("1"), cell("x")].into(),
        old: None,
    };
    let key = [cell("1"), Cell::Missing, Cell::Missing].into();
    let first = change(&layout, 5, put(), position.checkpoint);
    sink.apply(&first).await.expect("applies");
    let delete = change(&layout, 6, RowChange::Delete(key), first.to);
    sink.apply(&delete).await.expect("applies");
    let version = |lsn| Version::new(1, Lsn(lsn), 1);
    let up_to = std::collections::BTreeMap::from([(layout.target.clone(), version(6))]);
    let hour = Duration::from_secs(3600);
    assert_eq!(sink.clean_up(&up_to, hour, 10).await.expect("cleans up"), 0);
    let none = sink.clean_up(&up_to, Duration::ZERO, 0).await;
    assert_eq!(none.expect("cleans up"), 0);
    let dropped = sink.clean_up(&up_to, Duration::ZERO, 10).await;
    assert_eq!(dropped.expect("cleans up"), 1);

    let copied = |lsn| {
        let state = CopyState::Loading {
            lsn: Lsn(lsn),
            rows: 1,
            claim: delete.to.into(),
            began_us: 1,
        };
        let tables = std::collections::BTreeMap::from([(schema.name.clone(), state)]);
        Batch {
            to: delete.to,
            copy: Some(CopyProgress {
                tables,
                ..CopyProgress::default()
            }),
            ..change(&layout, lsn, put(), delete.to)
        }
    };
    for restarted in [false, true] {
        if restarted {
            conformance::elected(&mut sink).await;
        }
        for lsn in [5, 6] {
            let refused = sink.apply(&copied(lsn)).await;
            let Err(SinkError::Transient { source, .. }) = refused else {
                panic!("is not refused: {refused:?}")
            };
            let too_old = source.downcast_ref::<CopyTooOld>().expect("says why");
            assert_eq!(
                (too_old.version, too_old.forgotten),
                (version(lsn), version(6))
            );
            assert!(target.rows(&layout).await.is_empty());
        }
    }
    // A newer copy is taken, by the same session.
    let applied = sink.apply(&copied(7)).await.expect("applies");
    assert_eq!(applied.written, 1);
}

/// Every type's text, as a source prints it, is stored as the same value.
#[tokio::test(flavor = "multi_thread")]
async fn every_type_arrives_exactly() {
    let postgres = Postgres::start(PostgresOptions::default())
        .await
        .expect("starts");
    let target = database(&postgres, "types").await;
    let values = [
        ("bigint", "-9223372036854775808"),
        ("boolean", "t"),
        ("real", "1.1754944e-38"),
        ("double precision", "-0"),
        ("double precision", "NaN"),
        ("numeric", "1.500"),
        ("numeric(12,2)", "-0.10"),
        ("numeric", "-Infinity"),
        ("money", "-$1,234.56"),
        ("text", "a\\b\"'{},\n\u{e9}"),
        ("text", ""),
        ("text", "NULL"),
        ("character varying(3)", "ab "),
        ("character(5)", "ab   "),
        ("\"char\"", "x"),
        ("name", "n"),
        ("bytea", "\\x00ff5c"),
        ("bit(5)", "10101"),
        ("bit varying(7)", "101"),
        ("date", "0044-03-15 BC"),
        ("timestamp(3) without time zone", "2020-02-29 12:00:00.123"),
        ("timestamp with time zone", "infinity"),
        ("time(2) without time zone", "24:00:00"),
        ("time with time zone", "12:00:00.5+05:30"),
        ("interval", "-1 years -2 mons +3 days -04:05:06.7"),
        ("interval day to second(2)", "1 day 02:03:04.56"),
        ("uuid", "00000000-0000-0000-0000-00000000000f"),
        ("json", "{\"a\": 1,  \"a\": 2}"),
        ("jsonb", "{\"a\": [1, null]}"),
        ("xml", "<a>1</a>"),
        ("inet", "10.0.0.1/8"),
        ("cidr", "10.0.0.0/8"),
        ("macaddr", "08:00:2b:01:02:03"),
        ("point", "(1.5,-2)"),
        ("box", "(2,2),(1,1)"),
        ("int4range", "[1,5)"),
        ("int4multirange", "{[1,3),[5,7)}"),
        ("tsvector", "'a':1A 'b':2"),
        ("tsquery", "'a' & 'b'"),
        ("pg_lsn", "16/B374D848"),
        ("integer[]", "[0:1]={1,NULL}"),
        ("integer[]", "{{1,2},{3,4}}"),
        ("text[]", "{a,\"b,c\",NULL,\"NULL\",\"\"}"),
        ("character varying(2)[]", "{ab,c}"),
        ("character(3)[]", "{\"a  \"}"),
        ("bit(3)[]", "{101}"),
        ("shop.mood", "so so"),
        ("shop.mood[]", "{\"so so\",it's}"),
        ("shop.small", "7"),
        ("shop.small[]", "{7}"),
        ("shop.unknown", "anything"),
        ("bigint", "9223372036854775807"),
        ("smallint", "-32768"),
        ("integer", "2147483647"),
        ("boolean", "f"),
        ("uuid", "fedcba98-7654-3210-0123-456789abcdef"),
        ("date", "0001-01-01"),
        ("date", "9999-12-31"),
        ("date", "2024-02-29"),
        ("date", "10000-01-01"),
        ("timestamp without time zone", "1999-12-31 23:59:59.999999"),
        ("timestamp without time zone", "0001-01-01 00:00:00"),
        ("timestamp without time zone", "-infinity"),
        ("timestamp with time zone", "2026-11-21 08:40:51.00001+00"),
        ("timestamp with time zone", "9999-12-31 23:59:59+00"),
        ("timestamp(3) with time zone", "1970-01-01 00:00:00.5+00"),
        ("timestamp with time zone", "0044-03-15 00:00:00+00 BC"),
    ];
    let column = |(n, (type_name, _)): (usize, &(&str, &str))| ColumnSchema {
        name: format!("c{n}"),
        type_name: (*type_name).to_owned(),
        type_oid: 0,
        typmod: -1,
        not_null: n == 0,
        number: 0,
        missing: None,
        former: Vec::new(),
    };
    let schema = TableSchema {
        name: TableName::new("shop", "types"),
        version: "1".to_owned(),
        columns: values.iter().enumerate().map(column).collect(),
        key: vec!["c0".to_owned()],
        oid: 0,
        dropped: Vec::new(),
        types: vec![
            TypeSchema::Enum {
                name: TableName::new("shop", "mood"),
                labels: vec!["so so".to_owned(), "it's".to_owned()],
            },
            TypeSchema::Domain {
                name: TableName::new("shop", "small"),
                base: "integer".to_owned(),
                not_null: false,
                checks: vec!["CHECK ((VALUE < 10))".to_owned()],
            },
        ],
    };
    let mut sink = target.sink("types");
    let Ok(Elected::Yes(position)) = sink.open().await else {
        panic!("is elected")
    };
    let ensured = sink
        .ensure_table(&schema, None, &conformance::settings(&schema.name))
        .await;
    let ensured = ensured.unwrap_or_else(|error| panic!("ensures: {error:?}"));
    assert_eq!(ensured.warnings.len(), 1, "{:?}", ensured.warnings);
    let row = values.iter().map(|(_, text)| cell(text)).collect();
    let put = RowChange::Put {
        created: false,
        row,
        old: None,
    };
    let batch = change(&ensured.layout, 1, put, position.checkpoint);
    let applied = sink
        .apply(&batch)
        .await
        .unwrap_or_else(|error| panic!("applies: {error:?}"));
    assert_eq!(applied.dead(), 0);
    target
        .client
        .batch_execute("SET timezone = 'UTC'; SET extra_float_digits = 3; SET lc_monetary = 'C'")
        .await
        .expect("sets");
    for (n, (type_name, text)) in values.iter().enumerate() {
        // format() prints by the type's output function; a cast of char(n) to text would trim it.
        let sql = format!(
            "SELECT format('%s', c{n}), (SELECT format_type(atttypid, atttypmod) FROM pg_attribute \
             WHERE attrelid = 'shop.types'::regclass AND attname = 'c{n}') FROM shop.types"
        );
        let row = target.client.query_one(&sql, &[]).await.expect("reads");
        assert_eq!(row.get::<_, &str>(0), *text, "{type_name}");
        let wanted = if *type_name == "shop.unknown" {
            "text"
        } else {
            type_name
        };
        assert_eq!(row.get::<_, &str>(1), wanted);
    }
    // Too long is refused, never cut.
    let mut row: Box<[Cell]> = values.iter().map(|(_, text)| cell(text)).collect();
    row[12] = cell("abcd");
    let put = RowChange::Put {
        created: false,
        row,
        old: None,
    };
    let batch = change(&ensured.layout, 2, put, batch.to);
    assert_eq!(sink.apply(&batch).await.expect("applies").dead(), 1);
    // The same table again, as after a restart.
    let mut adopt = conformance::settings(&schema.name);
    adopt.adopt = true;
    sink.ensure_table(&schema, None, &adopt)
        .await
        .unwrap_or_else(|error| panic!("again: {error:?}"));
    for (sql, code) in [
        (
            "ALTER TABLE shop.types ALTER c6 TYPE numeric(12,1)",
            Code::TargetType,
        ),
        ("ALTER TABLE shop.types DROP c6", Code::TargetColumnMissing),
        (
            "ALTER TABLE shop.types DROP CONSTRAINT types_pkey",
            Code::TargetKey,
        ),
    ] {
        target
            .client
            .batch_execute(&format!("BEGIN; {sql}; COMMIT"))
            .await
            .expect("alters");
        let refused = sink
            .ensure_table(&schema, None, &adopt)
            .await
            .expect_err("refuses");
        let condition = refused.condition().expect("has a condition").clone();
        assert_eq!(condition.code, code, "{condition:?}");
        if code == Code::TargetColumnMissing {
            assert_eq!(
                condition.remedy,
                "ALTER TABLE \"shop\".\"types\" ADD COLUMN \"c6\" numeric(12,2);"
            );
            target
                .client
                .batch_execute(&condition.remedy)
                .await
                .expect("the remedy runs");
        }
    }
}

#[tokio::test]
async fn resolved_letters_are_dropped_after_a_while_and_open_ones_never() {
    let postgres = Postgres::start(PostgresOptions::default())
        .await
        .expect("starts");
    let target = database(&postgres, "letters").await;
    let mut sink = target.sink("letters");
    assert!(matches!(sink.open().await, Ok(Elected::Yes(_))));
    let letters = "INSERT INTO millrace.dead_letter (sink, relation, key, version, op, reason, event, created_at, resolved_at)
        SELECT sink, 'shop.t', i::text, gen_random_uuid(), 'u', 'refused', '{}', now() - interval '9 days', resolved_at
        FROM generate_series(1, 3) i, (VALUES ('letters', NULL), ('letters', now() - interval '8 days'),
        ('letters', now() - interval '6 days'), ('other', now() - interval '8 days')) AS l (sink, resolved_at)";
    target.client.batch_execute(letters).await.expect("letters");
    let week = std::time::Duration::from_secs(7 * 24 * 3600);
    for (max, dropped) in [(2, 2), (2, 1), (2, 0)] {
        let found = sink.drop_letters(week, max).await.expect("drops");
        assert_eq!(found, dropped);
    }
    let left = "SELECT string_agg(l, ' ' ORDER BY l) FROM (SELECT concat(sink, count(*), \
        coalesce(to_char(now() - resolved_at, '/DD'), '')) AS l FROM millrace.dead_letter \
        GROUP BY sink, resolved_at) AS letters";
    let left = target.client.query_one(left, &[]).await.expect("reads");
    assert_eq!(left.get::<_, String>(0), "letters3 letters3/06 other3/08");
}
