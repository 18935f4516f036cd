//! One writer: a connection, the keys it owns, and the transactions it chooses among.

use std::collections::HashMap;

use rand::Rng;
use rand::rngs::StdRng;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Error, Statement, Transaction};

use crate::error::LabError;

/// Ids of the traffic begin here, above those of [`crate::shop::fill_orders`].
const FIRST_ID: i64 = 1_000_000_000;
/// Past so many live keys of a kind a writer deletes rather than inserts.
const LIVE_MAX: usize = 500;
const BODY_BYTES: std::ops::Range<usize> = 4_000..8_000;
const TIERS: [&str; 3] = ["bronze", "silver", "gold"];

/// Owns the ids that leave `number` when divided by `count`: writers never meet on a row.
pub(super) struct Writer {
    client: Client,
    number: u32,
    count: u32,
    rng: StdRng,
    keys: Keys,
    statements: Statements,
}

/// By their text; they live as long as the connection.
type Statements = HashMap<&'static str, Statement>;

/// What is in the tables, as far as this writer owns it.
#[derive(Clone, Default)]
struct Keys {
    next: i64,
    customers: Vec<i64>,
    orders: Vec<i64>,
    documents: Vec<i64>,
    seats: Vec<String>,
}

impl Writer {
    pub(super) async fn open(
        client: Client,
        number: u32,
        count: u32,
        rng: StdRng,
    ) -> Result<Self, LabError> {
        let keys = Keys::read(&client, number, count)
            .await
            .map_err(LabError::postgres("read the shop's keys"))?;
        Ok(Self {
            client,
            number,
            count,
            rng,
            keys,
            statements: Statements::new(),
        })
    }

    pub(super) fn into_parts(self) -> (u32, u32, StdRng) {
        (self.number, self.count, self.rng)
    }

    /// One transaction of a random kind; the number of rows it changed.
    pub(super) async fn transact(&mut self) -> Result<u64, Error> {
        let step = self.count;
        let transaction = self.client.transaction().await?;
        let mut work = Work {
            transaction,
            rng: &mut self.rng,
            statements: &mut self.statements,
            keys: self.keys.clone(),
            step,
        };
        let changes = match work.rng.random_range(0..100) {
            0..20 => work.place_order().await?,
            20..45 => work.change_orders().await?,
            45..52 => work.delete_order().await?,
            52..62 => work.change_customer().await?,
            62..72 => work.write_document().await?,
            72..84 => work.touch_document().await?,
            84..93 => work.move_seat().await?,
            93..97 => work.roll_back_to_savepoint().await?,
            _ => work.change_nothing().await?,
        };
        let Work {
            transaction, keys, ..
        } = work;
        transaction.commit().await?;
        self.keys = keys;
        Ok(changes)
    }
}

impl Keys {
    async fn read(client: &Client, number: u32, count: u32) -> Result<Self, Error> {
        let (number, count) = (i64::from(number), i64::from(count));
        let ids = async |table: &str| -> Result<Vec<i64>, Error> {
            let query = format!(
                "SELECT id FROM public.{table} WHERE id >= {FIRST_ID} AND id % $2 = $1 ORDER BY id"
            );
            let rows = client.query(&query, &[&number, &count]).await?;
            Ok(rows.iter().map(|row| row.get(0)).collect())
        };
        let (customers, orders, documents) = (
            ids("customers").await?,
            ids("orders").await?,
            ids("documents").await?,
        );
        // A code is `<owner's id>-<random>`: the id says whose it is.
        let rows = client
            .query(
                "SELECT code FROM public.seats
                 WHERE code ~ '^[0-9]+-' AND split_part(code, '-', 1)::bigint % $2 = $1
                 ORDER BY code COLLATE \"C\"",
                &[&number, &count],
            )
            .await?;
        let seats: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
        let seat_ids = seats
            .iter()
            .filter_map(|code| code.split('-').next()?.parse().ok());
        let newest = [&customers, &orders, &documents]
            .into_iter()
            .flat_map(|ids| ids.last().copied())
            .chain(seat_ids)
            .max()
            .unwrap_or(FIRST_ID);
        let next = (newest / count + 1) * count + number;
        Ok(Self {
            next,
            customers,
            orders,
            documents,
            seats,
        })
    }
}

/// One open transaction. Its `keys` become the writer's when it has committed.
struct Work<'a> {
    transaction: Transaction<'a>,
    rng: &'a mut StdRng,
    statements: &'a mut Statements,
    keys: Keys,
    step: u32,
}

impl Work<'_> {
    /// A customer now and then, an order, its lines: several tables in one transaction.
    async fn place_order(&mut self) -> Result<u64, Error> {
        if self.keys.orders.len() >= LIVE_MAX {
            return self.delete_order().await;
        }
        let mut changes = 0;
        if self.keys.customers.is_empty() || self.rng.random_bool(0.3) {
            changes += self.add_customer().await?;
        }
        let customer = self.pick(|keys| &keys.customers).unwrap_or_default();
        let id = self.new_id();
        let amount = self.rng.random_range(100..100_000);
        changes += self
            .run(
                "INSERT INTO public.orders (id, customer_id, status, amount, note, attributes)
                 VALUES ($1, $2, 'new', $3::bigint::numeric / 100, $4,
                         jsonb_build_object('channel', 'web', 'amount', $3::bigint))",
                &[
                    &id,
                    &customer,
                    &i64::from(amount),
                    &format!("order {id}, with care"),
                ],
            )
            .await?;
        self.keys.orders.push(id);
        let lines: i32 = self.rng.random_range(1..5);
        changes += self
            .run(
                "INSERT INTO public.order_lines
                 SELECT $1, n, 'product ' || n, n, n * 1.25 FROM generate_series(1, $2::int) AS n",
                &[&id, &lines],
            )
            .await?;
        Ok(changes)
    }

    /// One to four orders move on, and the lines of the first.
    async fn change_orders(&mut self) -> Result<u64, Error> {
        let mut changes = 0;
        let count = self.rng.random_range(1..5);
        for _ in 0..count {
            let Some(id) = self.pick(|keys| &keys.orders) else {
                return self.place_order().await;
            };
            let status = ["paid", "packed", "shipped"][self.rng.random_range(0..3)];
            changes += self
                .run(
                    "UPDATE public.orders SET status = $2, amount = amount + 0.01 WHERE id = $1",
                    &[&id, &status],
                )
                .await?;
            changes += self
                .run(
                    "UPDATE public.order_lines SET quantity = quantity + 1
                     WHERE order_id = $1 AND line_no = 1",
                    &[&id],
                )
                .await?;
        }
        Ok(changes)
    }

    async fn delete_order(&mut self) -> Result<u64, Error> {
        let Some(id) = self.take(|keys| &mut keys.orders) else {
            return self.add_customer().await;
        };
        let lines = self
            .run("DELETE FROM public.order_lines WHERE order_id = $1", &[&id])
            .await?;
        Ok(lines
            + self
                .run("DELETE FROM public.orders WHERE id = $1", &[&id])
                .await?)
    }

    async fn add_customer(&mut self) -> Result<u64, Error> {
        let id = self.new_id();
        let tier = TIERS[self.rng.random_range(0..TIERS.len())];
        let score: f64 = self.rng.random();
        self.keys.customers.push(id);
        self.run(
            "INSERT INTO public.customers (id, name, tier, tags, score, seen_at)
             VALUES ($1, $2, $3::text::public.customer_tier, ARRAY['new', $3::text], $4, now())",
            &[&id, &format!("Zoë \"{id}\"\tO'Neil"), &tier, &score],
        )
        .await
    }

    /// Mostly an update; past the limit a deletion, and at times the same key comes back at once.
    async fn change_customer(&mut self) -> Result<u64, Error> {
        let Some(id) = self.pick(|keys| &keys.customers) else {
            return self.add_customer().await;
        };
        if self.rng.random_bool(0.1) {
            let deleted = self
                .run("DELETE FROM public.customers WHERE id = $1", &[&id])
                .await?;
            let again = "INSERT INTO public.customers (id, name) VALUES ($1, 'back again')";
            return Ok(deleted + self.run(again, &[&id]).await?);
        }
        if self.keys.customers.len() >= LIVE_MAX {
            self.keys.customers.retain(|own| *own != id);
            return self
                .run("DELETE FROM public.customers WHERE id = $1", &[&id])
                .await;
        }
        self.run(
            "UPDATE public.customers
             SET balance = balance + 1.5, active = NOT active, seen_at = now(),
                 score = CASE WHEN active THEN NULL ELSE random() END
             WHERE id = $1",
            &[&id],
        )
        .await
    }

    /// A new document, or a new body for one.
    async fn write_document(&mut self) -> Result<u64, Error> {
        let length = self.rng.random_range(BODY_BYTES);
        let body: String = (0..length)
            .map(|_| char::from(self.rng.random_range(b' '..=b'~')))
            .collect();
        if self.keys.documents.len() < LIVE_MAX && self.rng.random_bool(0.6) {
            let id = self.new_id();
            self.keys.documents.push(id);
            let insert = "INSERT INTO public.documents (id, title, body) VALUES ($1, 'draft', $2)";
            return self.run(insert, &[&id, &body]).await;
        }
        let Some(id) = self.pick(|keys| &keys.documents) else {
            return Ok(0);
        };
        let update = "UPDATE public.documents SET body = $2, revision = revision + 1 WHERE id = $1";
        self.run(update, &[&id, &body]).await
    }

    /// An update that leaves the big column alone: it travels without it.
    async fn touch_document(&mut self) -> Result<u64, Error> {
        let Some(id) = self.pick(|keys| &keys.documents) else {
            return self.write_document().await;
        };
        if self.rng.random_bool(0.05) {
            self.keys.documents.retain(|own| *own != id);
            return self
                .run("DELETE FROM public.documents WHERE id = $1", &[&id])
                .await;
        }
        let update = "UPDATE public.documents
                      SET revision = revision + 1, title = 'revision ' || revision WHERE id = $1";
        self.run(update, &[&id]).await
    }

    /// A new seat, or a seat's key changes.
    async fn move_seat(&mut self) -> Result<u64, Error> {
        let id = self.new_id();
        let code = format!("{id}-{:04x}", self.rng.random::<u16>());
        let old = self.take_seat();
        self.keys.seats.push(code.clone());
        match old {
            Some(old) => {
                let update = "UPDATE public.seats SET code = $2, note = 'moved' WHERE code = $1";
                self.run(update, &[&old, &code]).await
            }
            None => {
                let insert = "INSERT INTO public.seats (code, holder) VALUES ($1, $2)";
                self.run(insert, &[&code, &id]).await
            }
        }
    }

    /// What happens after the savepoint never happened; what came before stays.
    async fn roll_back_to_savepoint(&mut self) -> Result<u64, Error> {
        let kept = self.add_customer().await?;
        let keys = self.keys.clone();
        self.transaction.batch_execute("SAVEPOINT before").await?;
        self.place_order().await?;
        self.transaction
            .batch_execute("ROLLBACK TO SAVEPOINT before")
            .await?;
        self.keys = Keys {
            next: self.keys.next,
            ..keys
        };
        Ok(kept)
    }

    /// An update to the same values, which is still a change, and one of no row, which is none.
    async fn change_nothing(&mut self) -> Result<u64, Error> {
        let id = self.pick(|keys| &keys.orders).unwrap_or_default();
        let none = self
            .run("UPDATE public.orders SET note = 'x' WHERE id = -1", &[])
            .await?;
        Ok(none
            + self
                .run("UPDATE public.orders SET note = note WHERE id = $1", &[&id])
                .await?)
    }

    async fn run(
        &mut self,
        text: &'static str,
        values: &[&(dyn ToSql + Sync)],
    ) -> Result<u64, Error> {
        let prepared = match self.statements.get(text) {
            Some(prepared) => prepared.clone(),
            None => {
                let prepared = self.transaction.prepare(text).await?;
                self.statements.insert(text, prepared.clone());
                prepared
            }
        };
        self.transaction.execute(&prepared, values).await
    }

    fn new_id(&mut self) -> i64 {
        let id = self.keys.next;
        self.keys.next += i64::from(self.step);
        id
    }

    fn pick(&mut self, of: fn(&Keys) -> &Vec<i64>) -> Option<i64> {
        let ids = of(&self.keys);
        (!ids.is_empty()).then(|| ids[self.rng.random_range(0..ids.len())])
    }

    fn take(&mut self, of: fn(&mut Keys) -> &mut Vec<i64>) -> Option<i64> {
        let ids = of(&mut self.keys);
        (!ids.is_empty()).then(|| ids.swap_remove(self.rng.random_range(0..ids.len())))
    }

    /// Half of the time, and always at the limit.
    fn take_seat(&mut self) -> Option<String> {
        let seats = &mut self.keys.seats;
        let take = !seats.is_empty() && (seats.len() >= LIVE_MAX || self.rng.random_bool(0.5));
        take.then(|| seats.swap_remove(self.rng.random_range(0..seats.len())))
    }
}
