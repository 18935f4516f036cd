//! What a life finds before it decides how it begins: the source, the broker, and the tables that it may capture.

use std::time::{Duration, Instant};

use async_nats::jetstream;
use millrace_config::Config;
use millrace_connect::nats::{self, Reconnect};
use millrace_connect::postgres::{Dsn, Session, connect};
use tokio_postgres::Client;

use super::{Away, INBOX, Stream, captured_before, salt};
use crate::Error;
use crate::identity::published::Earlier;
use crate::replication::{NEAR_RECEIVE_BUFFER_BYTES, NEAR_ROUND_TRIP_MAX, ReplicationConnection};
use crate::seen::{FirstLook, Watched};
use crate::source::{self, Inspected, Refused, SourceFacts, SourceTable};
use crate::stream;

/// How often the way to the source is measured; the shortest counts, because the others had to wait for a processor.
const ROUND_TRIPS: usize = 5;

/// The source's server.
pub(super) struct Server {
    pub(super) dsn: Dsn,
    pub(super) client: Client,
    pub(super) facts: SourceFacts,
}

impl Server {
    /// Connects, and checks what every capture needs.
    pub(super) async fn connect(config: &Config) -> Result<Self, Error> {
        let dsn = source::dsn(&config.source)?;
        let session = Session {
            application_name: "millrace".to_owned(),
            // The catalog is asked about all tables at once: compiling that takes longer than answering.
            options: vec![("jit".to_owned(), "off".to_owned())],
        };
        let client = connect(&dsn, session).await?;
        let facts = source::inspect(&client).await?;
        Ok(Self { dsn, client, facts })
    }

    /// Looks at the configured tables.
    pub(super) async fn look(&self, config: &Config) -> Result<Looked, Error> {
        let (client, facts) = (&self.client, &self.facts);
        let salt = salt(config)?;
        let first = FirstLook::take(config, client).await?;
        let inspected =
            source::inspect_tables(client, facts, &config.tables, salt.as_ref()).await?;
        Ok(Looked { first, inspected })
    }

    /// Opens a replication connection.
    pub(super) async fn replicate(&self) -> Result<ReplicationConnection, Error> {
        Ok(ReplicationConnection::connect(&self.fitted().await?, "millrace").await?)
    }

    /// Gives the replication connection a small receive buffer where the source is near enough for it. Of several
    /// hosts it may reach another one than was measured.
    async fn fitted(&self) -> Result<Dsn, Error> {
        let dsn = self.dsn.clone();
        if dsn.hosts() > 1 {
            return Ok(dsn);
        }
        let mut shortest = Duration::MAX;
        for _ in 0..ROUND_TRIPS {
            let sent = Instant::now();
            self.client.batch_execute("").await?;
            shortest = shortest.min(sent.elapsed());
        }
        Ok(match shortest <= NEAR_ROUND_TRIP_MAX {
            true => dsn.with_receive_buffer(NEAR_RECEIVE_BUFFER_BYTES),
            false => dsn,
        })
    }
}

/// The configured tables, as the source has them.
pub(super) struct Looked {
    first: FirstLook,
    inspected: Inspected,
}

impl Looked {
    /// Checks that each of them can be captured.
    pub(super) fn all(self) -> Result<Self, Error> {
        Ok(Self {
            first: self.first,
            inspected: Inspected {
                tables: self.inspected.all()?,
                refused: Vec::new(),
            },
        })
    }
}

/// The broker, as far as it must be there before anything is decided.
pub(super) struct Reached {
    pub(super) jetstream: jetstream::Context,
    /// In bytes.
    pub(super) max_payload: usize,
    /// Whether anything was ever captured of this source.
    pub(super) captured_before: bool,
}

impl Reached {
    async fn now(config: &Config) -> Result<Self, Error> {
        let admin =
            nats::connect(&config.stream, "millrace capture", INBOX, Reconnect::Itself).await?;
        let max_payload = admin.server_info().max_payload;
        let jetstream = jetstream::new(admin);
        stream::require_level(&jetstream).await?;
        let captured_before = captured_before(config, &jetstream).await?;
        Ok(Self {
            jetstream,
            max_payload,
            captured_before,
        })
    }
}

/// Reaches the broker. Where that fails, it is done for the application what can be done without.
pub(super) async fn reach(
    config: &Config,
    server: &Server,
    looked: &Looked,
    away: &mut Away,
) -> Result<Reached, Error> {
    let error = match Reached::now(config).await {
        Ok(reached) => return Ok(reached),
        Err(error) => error,
    };
    let refused = match away.outlasts(&error) {
        true => looked.inspected.refused.as_slice(),
        false => &[],
    };
    let version = server.facts.version;
    let relieved = away.relieve(config, &server.client, version, refused).await;
    if let Err(error) = relieved {
        tracing::warn!(reason = %error.chain(), "tables stay published that their application cannot change");
    }
    Err(error)
}

/// The tables as this life takes them, after all that is known of them from earlier ones.
pub(super) struct Admitted {
    pub(super) tables: Vec<SourceTable>,
    /// Tables that were captured, and cannot be as they are now.
    pub(super) refused: Vec<Refused>,
    pub(super) watched: Watched,
    pub(super) earlier: Earlier,
}

/// Holds the tables against what earlier lives knew of them, and remembers what has changed.
pub(super) async fn admit(
    config: &Config,
    server: &Server,
    looked: Looked,
    stream: &Stream,
    away: &mut Away,
) -> Result<Admitted, Error> {
    let Server { client, facts, .. } = server;
    let publication = source::publication_name(&config.source.name);
    let mut members = source::published_tables(client, facts.version, &publication).await?;
    let mut known = Earlier::read(stream).await?;
    away.settle(&mut known, stream).await?;
    known.recall(&mut members);
    let (mut tables, refused) = known.admit(looked.inspected, &members, |_| true)?;
    let watched = Watched::begin(looked.first, client, &refused, &stream.state).await?;
    // Again: a table that is another one by now was forgotten.
    let earlier = Earlier::read(stream).await?;
    earlier.carry_over(&mut tables)?;
    if facts.in_recovery {
        source::adopt_filters(client, facts.version, &publication, &mut tables).await?;
    }
    Ok(Admitted {
        tables,
        refused,
        watched,
        earlier,
    })
}
