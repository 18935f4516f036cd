//! In which format the rows of a load come.

use std::collections::BTreeSet;

use async_nats::jetstream::message::StreamMessage;
use millrace_event::work::Wanted;
use millrace_event::{
    BinaryType, LoadFormat, LoadHead, TableName, binary_field, header, load_fields, load_rows,
    load_value, subject,
};

use super::stand::Line;
use crate::stage::{Setting, Stage};

/// One table of all types that have a binary form, one with a type that has none, one with a mask.
const TABLES: &str = "CREATE TABLE plain (id int PRIMARY KEY, n numeric, at timestamptz, b bytea, v text,
        c boolean, d smallint, e bigint, f varchar(9), g char(5), h date, i timestamp, j uuid, k json, l jsonb);
    CREATE TABLE odd (id int PRIMARY KEY, f float8);
    CREATE TABLE masked (id int PRIMARY KEY, v text);
    CREATE TABLE empty (LIKE plain INCLUDING ALL);
    INSERT INTO plain SELECT i, i * 1.250, timestamptz '2024-02-29 00:00+00' - i % 4000 * interval '1 year 1 us',
        nullif(decode(md5(i::text), 'hex'), decode(md5('7'), 'hex')), repeat(E'a\t\\\\', i % 5),
        i % 2 = 0, i - 5000, i * -1000000000000, left(md5(i::text), i % 9), left(md5(i::text), i % 5), date '2024-02-29' - i * 99,
        timestamp '2024-02-29 12:00' + i * interval '1 day 00:00:00.5', md5(i::text)::uuid,
        json_build_object('a', i), jsonb_build_object('b', repeat('\"', i % 3)) FROM generate_series(1, 9000) i;
    INSERT INTO odd VALUES (1, 0.1), (2, NULL);
    INSERT INTO masked VALUES (1, 'secret')";

async fn line() -> Line {
    let stage = Stage::set(Setting {
        schema: TABLES,
        tables: &[
            ("public.plain", ""),
            ("public.odd", ""),
            ("public.masked", "[columns]\nmask = { v = \"redact\" }\n"),
            ("public.empty", ""),
        ],
        ..Setting::default()
    })
    .await;
    Line::on(stage).await
}

/// The heads of a table's load for a request, and its rows as texts.
async fn loaded(
    line: &Line,
    request: &str,
    table: &str,
) -> (Vec<LoadHead>, Vec<Vec<Option<String>>>) {
    let of_table = subject::copy("shop", "replica", &TableName::new("public", table));
    let messages = line.raw(subject::copy_stream_name("shop", "replica")).await;
    let is_of = |message: &StreamMessage| {
        let mark = message.headers.get(header::COPY).expect("a mark");
        mark.as_str().starts_with(request)
    };
    let (mut heads, mut rows) = (Vec::new(), Vec::new());
    for message in messages
        .iter()
        .filter(|message| *message.subject == *of_table && is_of(message))
    {
        let Some((head, at)) = LoadHead::of(&message.payload).expect("a head") else {
            continue;
        };
        let mut count = 0;
        for row in load_rows(head.format, head.columns.len(), &message.payload[at..]) {
            rows.push(texts(&head, row.expect("a row")));
            count += 1;
        }
        assert_eq!(head.count(&message.payload[at..]).expect("rows"), count);
        heads.push(head);
    }
    rows.sort();
    (heads, rows)
}

fn texts(head: &LoadHead, row: &[u8]) -> Vec<Option<String>> {
    let mut buffer = Vec::new();
    let text = |text: &[u8]| String::from_utf8(text.to_vec()).expect("UTF-8");
    if head.format == LoadFormat::Text {
        let fields = load_fields(row);
        let values = fields.map(|field| load_value(field, &mut buffer).expect("a value").map(text));
        return values.collect();
    }
    let mut rest = &row[2..];
    let columns = head.columns.iter().map(|column| {
        let value;
        (value, rest) = binary_field(rest).expect("a field");
        let of = BinaryType::of(column.type_oid).expect("a type with a binary form");
        value.map(|value| text(of.text(value, &mut buffer).expect("a value")))
    });
    columns.collect()
}

#[tokio::test]
async fn a_load_is_in_binary_format_where_the_sink_takes_it_and_every_column_has_one() {
    let line = line().await;
    let tables = ["plain", "odd", "masked", "empty"];
    let wanted = tables.map(|table| (table, Wanted::Load));
    line.ask("r1", &wanted).await;
    line.copied("r1", tables.len()).await;
    let mut as_text = Vec::new();
    for table in tables {
        let (heads, rows) = loaded(&line, "r1", table).await;
        assert!(
            heads.iter().all(|head| head.format == LoadFormat::Text),
            "{table}"
        );
        as_text.push(rows);
    }
    line.ask_for_binary("r2", &wanted).await;
    line.copied("r2", tables.len()).await;
    for (table, as_text) in tables.iter().zip(as_text) {
        let (heads, rows) = loaded(&line, "r2", table).await;
        let expected = match *table {
            "plain" => LoadFormat::Binary,
            _ => LoadFormat::Text,
        };
        let heads: Vec<_> = heads
            .iter()
            .filter(|head| head.format == expected)
            .collect();
        assert_eq!(heads.is_empty(), *table == "empty", "{table}");
        assert_eq!(rows.is_empty(), *table == "empty", "{table}");
        if *table == "plain" {
            let types = heads[0].columns.iter().map(|column| column.type_oid);
            assert!(
                types
                    .collect::<BTreeSet<_>>()
                    .into_iter()
                    .eq(BinaryType::TYPE_OIDS)
            );
        }
        assert_eq!(rows, as_text, "{table}");
    }
}
