//! The shop: the schema of the demo, the tests and the benchmark.

use std::time::Duration;

use tokio::time::MissedTickBehavior;
use tokio_postgres::Client;

use crate::error::LabError;
use crate::postgres::connect;

/// So many connections share the work of [`pace_orders`].
const PACED_WRITERS: u32 = 4;

/// The columns of the order `i`.
const ORDER: &str =
    "i, i % 10007, (ARRAY['new','paid','packed','shipped'])[1 + i % 4], (i % 100000)::numeric / 100,
     repeat('note ', 12) || i, now(),
     jsonb_build_object('channel', 'web', 'weight', i % 50, 'gift', i % 7 = 0)";

/// Every table of the shop, `schema.table`.
pub const TABLES: [&str; 5] = [
    "public.customers",
    "public.documents",
    "public.order_lines",
    "public.orders",
    "public.seats",
];

/// The shop's types and tables. `documents.body` is stored out of line and uncompressed, so that an
/// update which leaves it alone travels without it; the keys of `seats` change.
pub const SCHEMA: &str = "
CREATE TYPE public.customer_tier AS ENUM ('bronze', 'silver', 'gold');
CREATE TABLE public.customers (
    id bigint PRIMARY KEY,
    name text NOT NULL,
    tier public.customer_tier NOT NULL DEFAULT 'bronze',
    balance numeric(12,2) NOT NULL DEFAULT 0,
    tags text[] NOT NULL DEFAULT '{}',
    score double precision,
    active boolean NOT NULL DEFAULT true,
    seen_at timestamptz
);
CREATE TABLE public.orders (
    id bigint PRIMARY KEY,
    customer_id bigint NOT NULL,
    status text NOT NULL,
    amount numeric(12,2) NOT NULL,
    note text,
    created_at timestamptz NOT NULL DEFAULT now(),
    attributes jsonb
);
CREATE TABLE public.order_lines (
    order_id bigint,
    line_no integer,
    product text NOT NULL,
    quantity integer NOT NULL,
    price numeric(10,2) NOT NULL,
    PRIMARY KEY (order_id, line_no)
);
CREATE TABLE public.documents (
    id bigint PRIMARY KEY,
    title text NOT NULL,
    body text,
    revision integer NOT NULL DEFAULT 1
);
ALTER TABLE public.documents ALTER COLUMN body SET STORAGE EXTERNAL;
CREATE TABLE public.seats (
    code text PRIMARY KEY,
    holder bigint,
    note text
);
";

/// Creates the shop's types and tables.
///
/// # Errors
///
/// Fails when they exist or the connection is lost.
pub async fn create(client: &Client) -> Result<(), LabError> {
    client
        .batch_execute(SCHEMA)
        .await
        .map_err(LabError::postgres("create the shop"))
}

/// Inserts `total` orders with ids from `first_id` in transactions of `per_transaction` rows each,
/// as fast as the server can: one statement, committed inside.
///
/// # Errors
///
/// Fails when an id exists or the connection is lost.
pub async fn fill_orders(
    client: &Client,
    first_id: u64,
    total: u64,
    per_transaction: u64,
) -> Result<(), LabError> {
    let end = first_id + total;
    let statement = format!(
        "DO $fill$
        DECLARE lower bigint := {first_id};
        BEGIN
            WHILE lower < {end} LOOP
                INSERT INTO public.orders
                SELECT {ORDER}
                FROM generate_series(lower, least(lower + {per_transaction}, {end}) - 1) AS i;
                lower := lower + {per_transaction};
                COMMIT;
            END LOOP;
        END $fill$"
    );
    client
        .batch_execute(&statement)
        .await
        .map_err(LabError::postgres("fill the orders"))
}

/// Inserts `total` orders with ids from `first_id` in transactions of one row each, `rate` of them a
/// second whatever the server does: one that was late is made up for.
///
/// # Errors
///
/// Fails when an id exists or a connection is lost.
pub async fn pace_orders(url: &str, first_id: u64, total: u64, rate: u32) -> Result<(), LabError> {
    let writers = (0..PACED_WRITERS).map(|number| pace(url, first_id, total, rate, number));
    futures_util::future::try_join_all(writers).await.map(drop)
}

async fn pace(
    url: &str,
    first_id: u64,
    total: u64,
    rate: u32,
    number: u32,
) -> Result<(), LabError> {
    let client = connect(url).await?;
    let statement = client
        .prepare(&format!(
            "INSERT INTO public.orders SELECT {ORDER} FROM (SELECT $1::bigint) AS o (i)"
        ))
        .await
        .map_err(LabError::postgres("prepare an order"))?;
    let mut ticks = tokio::time::interval(Duration::from_secs(1) * PACED_WRITERS / rate.max(1));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mine = (first_id..first_id + total).skip(number as usize);
    for id in mine.step_by(PACED_WRITERS as usize) {
        ticks.tick().await;
        let id = i64::try_from(id).expect("ids stay below 2^63");
        client
            .execute(&statement, &[&id])
            .await
            .map_err(LabError::postgres("insert an order"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::postgres::{Postgres, PostgresOptions};

    #[tokio::test]
    async fn paced_orders_are_all_there_and_took_their_time() {
        let cluster = Postgres::start(PostgresOptions::default()).await.unwrap();
        let client = cluster.connect("postgres").await.unwrap();
        create(&client).await.unwrap();
        fill_orders(&client, 1, 10, 3).await.unwrap();
        let began = Instant::now();
        let url = cluster.url("postgres");
        pace_orders(&url, 11, 102, 200).await.unwrap();
        assert!(began.elapsed() >= Duration::from_millis(450));
        let row = client
            .query_one("SELECT count(*), min(id), max(id) FROM public.orders", &[])
            .await
            .unwrap();
        assert_eq!(
            (row.get(0), row.get(1), row.get(2)),
            (112_i64, 1_i64, 112_i64)
        );
    }
}
