//! What is looked at beside the stream while a life lasts: the tables, the publication and the slot.

use std::collections::HashMap;
use std::convert::Infallible;
use std::time::Duration;

use millrace_config::{Code, Condition, Config, Table};
use millrace_connect::clock::now_us;
use millrace_connect::postgres::{Session, connect};
use millrace_event::TableName;
use tokio::time::MissedTickBehavior;
use tokio_postgres::Client;

use crate::identity::published::Earlier;
use crate::left_out::LeftOut;
use crate::life::{self, NOT_CONFIGURED, Source, Stream, Without};
use crate::seen::Watched;
use crate::selection::Salt;
use crate::source::{Alteration, Member, Refused};
use crate::status::Status;
use crate::{Error, orders, source};

/// How often the publication and the slot are looked at.
const WATCH_INTERVAL: Duration = Duration::from_secs(5);

/// The tables that this life goes without because they cannot be captured as they are.
struct Refusals {
    refused: Vec<Refused>,
    /// Their settings.
    tables: Vec<Table>,
    /// Those that were taken out of the publication, or cannot be, and are still in it as far as was seen.
    settled: Vec<TableName>,
    /// A session of its own: reading a table's `where` takes a transaction, and others ask on the life's session at
    /// the same time.
    client: Option<Client>,
}

impl Refusals {
    fn of(config: &Config, refused: Vec<Refused>) -> Self {
        let is_refused = |table: &&Table| refused.iter().any(|found| found.name == table.name);
        let tables = config.tables.iter().filter(is_refused).cloned().collect();
        Self {
            refused,
            tables,
            settled: Vec::new(),
            client: None,
        }
    }

    /// Looks at them again, and takes those out of the publication that harm the application in it. Says why each
    /// is parked.
    async fn again(
        &mut self,
        config: &Config,
        source: &Source,
        members: &HashMap<TableName, Member>,
    ) -> Result<Vec<(TableName, Condition)>, Error> {
        if self.tables.is_empty() {
            return Ok(Vec::new());
        }
        // Nothing is hashed here: any salt will do.
        let salt = Salt::new(&[0; Salt::BYTES_MIN]);
        let client = match self.client.take().filter(|client| !client.is_closed()) {
            Some(client) => client,
            None => {
                let session = Session {
                    application_name: "millrace watch".to_owned(),
                    options: Vec::new(),
                };
                connect(&source.dsn, session).await?
            }
        };
        let client = self.client.insert(client);
        let found =
            source::inspect_tables(client, &source.facts, &self.tables, Some(&salt)).await?;
        if let Some(table) = found.tables.first() {
            // The next life publishes it, and orders its backfill.
            let reason = format!("table {} can be captured again", table.name);
            return Err(Error::retry_because(reason));
        }
        self.refused = found.refused;
        self.settled.retain(|table| members.contains_key(table));
        let settled = |table: &&Refused| self.settled.contains(&table.name);
        let left: Vec<_> = self
            .refused
            .iter()
            .filter(|table| !settled(table))
            .cloned()
            .collect();
        let done = life::relieve(client, config, &left, members).await?;
        self.settled.extend(done);
        let publication = source::publication_name(&config.source.name);
        Ok(source::parked_refused(&publication, &self.refused, members))
    }
}

/// Children by inheritance that an earlier release, or an operator, has put into the publication together with their
/// parents.
#[derive(Default)]
struct Children {
    told: Vec<TableName>,
    /// Those that were taken out, or cannot be.
    settled: Vec<TableName>,
}

impl Children {
    /// Takes those out of the publication whose rows the application can neither update nor delete. Nothing is lost by
    /// it: they are not captured.
    async fn again(&mut self, config: &Config, client: &Client) -> Result<(), Error> {
        let publication = source::publication_name(&config.source.name);
        let tables: Vec<_> = config
            .tables
            .iter()
            .map(|table| table.name.clone())
            .collect();
        for table in source::harmed_children(client, &publication, &tables).await? {
            if self.settled.contains(&table) {
                continue;
            }
            if !self.told.contains(&table) {
                tracing::warn!(
                    %table, publication, code = Code::NoReplicaIdentity.as_str(),
                    "a table that inherits from a captured one is published without a replica identity: Postgres \
                     refuses its updates and deletes"
                );
                self.told.push(table.clone());
            }
            let (alone, create) = (std::slice::from_ref(&table), config.source.create);
            let what = "tables that inherit from captured ones";
            if source::withdraw(client, &publication, alone, create, what).await?
                == Alteration::Settled
            {
                self.settled.push(table);
            }
        }
        Ok(())
    }
}

/// Looks at the tables, the publication and the slot every few seconds. Returns only with an error.
pub(crate) async fn watch(
    config: &Config,
    source: &Source,
    stream: &Stream,
    mut watched: Watched,
    left_out: &LeftOut,
    without: Without,
    status: &Status,
) -> Result<Infallible, Error> {
    let (locked, mut refused) = (without.locked, Refusals::of(config, without.refused));
    let (client, version) = (&source.client, source.facts.version);
    let publication = source::publication_name(&config.source.name);
    let slot = source::slot_name(&config.source.name);
    let slot_lag = metrics::gauge!("millrace_slot_lag_bytes");
    let slot_retained = metrics::gauge!("millrace_slot_retained_bytes");
    let mut earlier = Earlier::read(stream).await?;
    let mut children = Children::default();
    let mut ticks = tokio::time::interval(WATCH_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        // A table of another OID has left the publication, and is published anew by the next life.
        let state = &stream.state;
        watched
            .again(config, client, state, stream, status.covered())
            .await?;
        left_out
            .order(config, stream, &source.tables, status.covered())
            .await?;
        orders::renew(config, stream).await?;
        let found = source::find_publication(client, &publication).await?;
        if earlier
            .publication()
            .is_some_and(|known| found != Some(known))
        {
            return Err(Error::halt(source::publication_gone(&publication)));
        }
        source::check_options(client, &publication, &source.tables).await?;
        let mut now = source::published_tables(client, version, &publication).await?;
        earlier.recall(&mut now);
        let create = config.source.create;
        let drift = earlier.check(&publication, &source.tables, &now, create)?;
        if let Some(table) = drift.back.first() {
            // The next life orders its backfill, which then begins behind its return.
            let reason = format!("table {table} is back in the publication");
            return Err(Error::retry_because(reason));
        }
        earlier.lose(stream, &drift, now_us()).await?;
        let published = source.tables.iter();
        let published: Vec<_> = published
            .filter(|table| !drift.has_lost(&table.name))
            .collect();
        if let Some((table, column)) = source::unlisted_column(client, &published).await? {
            // The next life puts it into the publication.
            let reason = format!("table {table} has a new column {column:?}");
            return Err(Error::retry_because(reason));
        }
        children.again(config, client).await?;
        let unfit = refused.again(config, source, &now).await?;
        status.set_parked([&*drift.lost, &*locked, &*unfit].concat());
        for (table, _) in &locked {
            if source::is_free(client, table).await? {
                // The next life publishes it, and captures it from then on.
                let reason = format!("table {table} is not locked any more");
                return Err(Error::retry_because(reason));
            }
        }
        // Each alone: the lock of one keeps no other.
        for table in earlier.leaving() {
            let own = now.get(&table).is_some_and(|member| member.own);
            let tables = std::slice::from_ref(&table);
            if !own
                || source::withdraw(client, &publication, tables, create, NOT_CONFIGURED).await?
                    == Alteration::Settled
            {
                earlier.has_left(stream, &table).await?;
            }
        }
        if let Some(slot) = source::find_slot(client, &slot).await? {
            // Beyond 2^53 bytes precision does not matter.
            slot_lag.set(slot.lag_bytes as f64);
            slot_retained.set(slot.retained_bytes as f64);
        }
    }
}
