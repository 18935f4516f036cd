//! The shop: the schema of the demo, the tests and the benchmark.

use tokio_postgres::Client;

use crate::error::LabError;

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
                SELECT i, i % 10007, (ARRAY['new','paid','packed','shipped'])[1 + i % 4],
                       (i % 100000)::numeric / 100, repeat('note ', 12) || i, now(),
                       jsonb_build_object('channel', 'web', 'weight', i % 50, 'gift', i % 7 = 0)
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
