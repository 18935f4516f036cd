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
    let slot = source::slot_name(&config.source.name);
    let slot_lag = metrics::gauge!("millrace_slot_lag_bytes");
    let slot_retained = metrics::gauge!("millrace_slot_retained_bytes");
    let mut watch = Watch {
        config,
        source,
        stream,
        left_out,
        status,
        publication: source::publication_name(&config.source.name),
        locked: without.locked,
        refused: Refusals::of(config, without.refused),
        children: Children::default(),
        earlier: Earlier::read(stream).await?,
    };
    let mut ticks = tokio::time::interval(WATCH_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        watch.order(&mut watched).await?;
        watch.again().await?;
        if let Some(slot) = source::find_slot(&source.client, &slot).await? {
            // Beyond 2^53 bytes precision does not matter.
            slot_lag.set(slot.lag_bytes as f64);
            slot_retained.set(slot.retained_bytes as f64);
        }
    }
}

/// What is known from one look to the next.
struct Watch<'w> {
    config: &'w Config,
    source: &'w Source,
    stream: &'w Stream,
    left_out: &'w LeftOut,
    status: &'w Status,
    publication: String,
    locked: Vec<(TableName, Condition)>,
    refused: Refusals,
    children: Children,
    earlier: Earlier,
}

impl Watch<'_> {
    /// Orders the backfills that are due.
    async fn order(&self, watched: &mut Watched) -> Result<(), Error> {
        let Self {
            config,
            source,
            stream,
            status,
            ..
        } = *self;
        // A table of another OID has left the publication, and is published anew by the next life.
        watched
            .again(
                config,
                &source.client,
                &stream.state,
                stream,
                status.covered(),
            )
            .await?;
        self.left_out
            .order(config, stream, &source.tables, status.covered())
            .await?;
        orders::renew(config, stream).await
    }

    /// Holds the tables against the publication, and the publication against what it was. Whatever the next life does
    /// better ends this one.
    async fn again(&mut self) -> Result<(), Error> {
        let (config, source) = (self.config, self.source);
        let members = self.members().await?;
        let create = config.source.create;
        let drift = self
            .earlier
            .check(&self.publication, &source.tables, &members, create)?;
        if let Some(table) = drift.back.first() {
            // The next life orders its backfill, which then begins behind its return.
            let reason = format!("table {table} is back in the publication");
            return Err(Error::retry_because(reason));
        }
        self.earlier.lose(self.stream, &drift, now_us()).await?;
        let published = source.tables.iter();
        let published: Vec<_> = published
            .filter(|table| !drift.has_lost(&table.name))
            .collect();
        if let Some((table, column)) = source::unlisted_column(&source.client, &published).await? {
            // The next life puts it into the publication.
            let reason = format!("table {table} has a new column {column:?}");
            return Err(Error::retry_because(reason));
        }
        self.children.again(config, &source.client).await?;
        let unfit = self.refused.again(config, source, &members).await?;
        self.status
            .set_parked([&*drift.lost, &*self.locked, &*unfit].concat());
        self.expect_locks().await?;
        self.withdraw(&members).await
    }

    /// What the publication publishes, if it still is the one that was captured.
    async fn members(&self) -> Result<HashMap<TableName, Member>, Error> {
        let (name, Source { client, facts, .. }) = (&self.publication, self.source);
        let found = source::find_publication(client, name).await?;
        let known = self.earlier.publication();
        if known.is_some_and(|known| found != Some(known)) {
            return Err(Error::halt(source::publication_gone(name)));
        }
        source::check_options(client, name, &self.source.tables).await?;
        let mut members = source::published_tables(client, facts.version, name).await?;
        self.earlier.recall(&mut members);
        Ok(members)
    }

    /// Checks that the tables which this life goes without because they were locked still are.
    async fn expect_locks(&self) -> Result<(), Error> {
        for (table, _) in &self.locked {
            if source::is_free(&self.source.client, table).await? {
                // The next life publishes it, and captures it from then on.
                let reason = format!("table {table} is not locked any more");
                return Err(Error::retry_because(reason));
            }
        }
        Ok(())
    }

    /// Takes tables out of the publication that are not configured any more. Each alone: the lock of one keeps no
    /// other.
    async fn withdraw(&mut self, members: &HashMap<TableName, Member>) -> Result<(), Error> {
        let (client, create) = (&self.source.client, self.config.source.create);
        for table in self.earlier.leaving() {
            let own = members.get(&table).is_some_and(|member| member.own);
            let alone = std::slice::from_ref(&table);
            if !own
                || source::withdraw(client, &self.publication, alone, create, NOT_CONFIGURED)
                    .await?
                    == Alteration::Settled
            {
                self.earlier.has_left(self.stream, &table).await?;
            }
        }
        Ok(())
    }
}
