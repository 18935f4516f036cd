//! A load into target columns that are of other types than the source's: the binary form of the one is not that of the
//! other.

use super::matrix::{Majors, PINNED, Table, plain};
use crate::stage::{Setting, Stage};

#[tokio::test]
async fn every_value_becomes_the_text_that_postgres_prints() {
    for majors in [Majors::both(15), Majors::both(18)] {
        let types = plain();
        let table = Table::of("public.plain", &types);
        let stage = Stage::set(Setting {
            tables: &[("public.plain", "")],
            ..majors.setting(&(table.create() + &table.insert(1)))
        })
        .await;
        let columns = (0..types.len()).map(|n| format!(", c{n} text"));
        let columns: String = columns.collect();
        stage
            .target_sql(&format!("CREATE TABLE plain (id int PRIMARY KEY{columns})"))
            .await;
        stage.run_once().await;
        for client in [&stage.source, &stage.target] {
            client
                .batch_execute(PINNED)
                .await
                .expect("session is pinned");
        }
        let (expected, found) = (
            table.rows(&stage.source).await,
            table.rows(&stage.target).await,
        );
        assert_eq!(expected.len(), found.len());
        for (expected, found) in expected.iter().zip(&found) {
            assert_eq!(expected, found);
        }
    }
}

#[tokio::test]
async fn wider_types_take_the_values_and_columns_stand_in_any_order() {
    let stage = Stage::set(Setting {
        schema: "CREATE TABLE t (id int PRIMARY KEY, a smallint, b int, c bigint, d numeric(12,4), e date, f timestamp,
                 g varchar(6), h json, i text, j boolean);
             INSERT INTO t VALUES
             (1, -32768, 2147483647, 9223372036854775807, 'NaN', 'infinity', '0044-03-15 01:02:03.5 BC', 'a', '{\"a\": 1}', '7', true),
             (2, 7, -1, -9223372036854775808, -0.5, '2024-02-29', '2024-02-29 23:59:59.999999', '', '[]', '-8', false),
             (3, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL)",
        ..Setting::default()
    })
    .await;
    // In another order, and with a column of its own.
    stage
        .target_sql(
            "CREATE TABLE t (j text, i varchar, h text, g varchar(9), own int DEFAULT 5, f timestamp, e text, d numeric,
             c text, b bigint, a int, id bigint PRIMARY KEY)",
        )
        .await;
    stage.run_once().await;
    let values = |casts: &str| {
        format!("SELECT string_agg(concat_ws('|', {casts}), E'\\n' ORDER BY id) FROM public.t")
    };
    let casts =
        values("id, a, b, c, d, e, f, g, h, i, CASE WHEN j THEN 't' WHEN NOT j THEN 'f' END");
    let columns = values("id, a, b, c, d, e, f, g, h, i, j");
    for client in [&stage.source, &stage.target] {
        client
            .batch_execute(PINNED)
            .await
            .expect("session is pinned");
    }
    let found = stage.target_text(&columns).await;
    assert_eq!(stage.source_text(&casts).await, found);
    assert_eq!(
        stage
            .target_text("SELECT sum(own)::text FROM public.t")
            .await,
        "15"
    );
}
