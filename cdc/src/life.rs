//! One life of a capture: from nothing to streaming. What it finds decides how it begins.

mod away;
mod begin;
mod ends;
mod found;
mod publishing;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::{self, kv};
use millrace_config::{Code, Condition, Config, Mask, Origin as OriginFilter, limits};
use millrace_connect::nats::{self, Reconnect};
use millrace_connect::postgres::Dsn;
use millrace_event::{Lsn, Position, subject, work};
use tokio_postgres::Client;

pub(crate) use self::away::Away;
pub(crate) use self::begin::slot_blocked;
use self::begin::{decide, prepare, publish_start};
use self::ends::{Ends, stream_tail};
use self::found::{Admitted, Server};
use self::publishing::Publishing;
pub(crate) use self::publishing::{NOT_CONFIGURED, Without, relieve};
use crate::Error;
use crate::assemble::MessageLimits;
use crate::birth::Plan;
use crate::capture::{Capture, Settings};
use crate::frontier::ConfirmPolicy;
use crate::identity;
use crate::left_out::LeftOut;
use crate::orders::{self, Unsynced};
use crate::publish::{self, Acks, Sender};
use crate::replication::{ReplicationConnection, StartOptions, WalReader};
use crate::schemas;
use crate::seen::Watched;
use crate::selection::Salt;
use crate::source::{self, SourceFacts, SourceTable};
use crate::stream;

/// Replies to capture arrive below this subject, so that permissions can name it.
pub(crate) const INBOX: &str = "_INBOX_millrace_capture";

/// What stays free of a message below the server's limit: subject, headers and protocol around the payload.
pub(crate) const MESSAGE_OVERHEAD_BYTES: usize = 16 * 1024;

/// The oldest server whose `origin` option can be set: 16.
const ORIGIN_VERSION_MIN: i32 = 160_000;

/// Everything that one life works with.
pub(crate) struct Life {
    pub(crate) capture: Capture,
    /// The highest whole message that the life goes on behind: it publishes everything above.
    pub(crate) after: Position,
    pub(crate) wal: WalReader,
    pub(crate) sender: Sender,
    pub(crate) acks: Acks,
    pub(crate) source: Source,
    pub(crate) stream: Stream,
    pub(crate) watched: Watched,
    pub(crate) left_out: LeftOut,
    /// Tables that it goes on without.
    pub(crate) without: Without,
}

/// The source as a life uses it.
pub(crate) struct Source {
    pub(crate) dsn: Dsn,
    pub(crate) client: Client,
    pub(crate) facts: SourceFacts,
    pub(crate) tables: Arc<Vec<SourceTable>>,
    pub(crate) epoch: u32,
    pub(crate) timeline: u32,
}

impl Source {
    fn new(server: Server, tables: Vec<SourceTable>, epoch: u32, timeline: u32) -> Self {
        let Server { dsn, client, facts } = server;
        Self {
            dsn,
            client,
            facts,
            tables: Arc::new(tables),
            epoch,
            timeline,
        }
    }
}

/// The stream as a life uses it.
pub(crate) struct Stream {
    pub(crate) jetstream: jetstream::Context,
    pub(crate) name: String,
    pub(crate) schemas: kv::Store,
    pub(crate) sinks: kv::Store,
    pub(crate) copies: kv::Store,
    pub(crate) state: kv::Store,
    pub(crate) unsynced: Unsynced,
}

/// Connects, checks, begins or resumes, and starts replication.
pub(crate) async fn open(config: &Config, now: Duration, away: &mut Away) -> Result<Life, Error> {
    let server = Server::connect(config).await?;
    let looked = server.look(config).await?;
    let reached = found::reach(config, &server, &looked, away).await?;
    // Nothing is made for a capture that cannot begin.
    let looked = match reached.captured_before {
        true => looked,
        false => looked.all()?,
    };
    let stream = open_buckets(config, reached.jetstream).await?;
    let Admitted {
        tables,
        refused,
        watched,
        mut earlier,
    } = found::admit(config, &server, looked, &stream, away).await?;

    let (client, facts) = (&server.client, &server.facts);
    let plan = match decide(config, client, facts, &tables, &stream).await {
        Ok(plan) => Ok(plan),
        // What the source is comes first: another server's lack of a slot is no gap of this stream.
        Err(Error::Halt(condition)) => Err(condition),
        Err(passing) => return Err(passing),
    };
    let mut replication = server.replicate().await?;
    let identity = replication.identify_system().await?;
    let left_out = LeftOut::read(&stream.state, client, identity.timeline).await?;
    let known = stream_tail(&stream, Lsn::ZERO).await?;
    let tail = known.as_ref().map(|(_, tail)| tail);
    let epoch = identity::check(&stream, &mut replication, &identity, tail).await?;
    let plan = plan.map_err(Error::Halt)?;
    // Before this life writes lists by itself.
    orders::renew(config, &stream).await?;
    let publishing = Publishing {
        config,
        client,
        version: facts.version,
        tables: &tables,
        refused: &refused,
        stream: &stream,
    };
    let without = prepare(&publishing, &mut earlier, &mut replication, plan).await?;
    let tables = without.captured(tables);
    schemas::describe_tables(client, &stream.schemas, &tables).await?;
    let wal = start(config, facts, replication).await?;

    // Only now nobody else can move the slot or the stream's tail.
    let slot = source::slot_name(&config.source.name);
    let confirmed = ends::confirmed(client, &slot).await?;
    if matches!(plan, Plan::Begin { .. }) && stream_tail(&stream, confirmed).await?.is_none() {
        publish_start(config, &stream, &identity, epoch, confirmed).await?;
    }
    let ends = Ends::find(&stream, &slot, confirmed).await?;
    identity::remember(&stream, &identity, epoch).await?;
    let after = ends.after(&stream).await?;

    let (sender, acks) = publisher(config, ends.last_seq()).await?;
    let settings = settings(config, facts, &tables, epoch, reached.max_payload);
    away.streams(&tables, &refused);
    Ok(Life {
        capture: Capture::new(settings, ends.resume(), now),
        after,
        wal,
        sender,
        acks,
        source: Source::new(server, tables, epoch, identity.timeline),
        stream,
        watched,
        left_out,
        without,
    })
}

/// Starts to read the WAL, from where the slot is.
async fn start(
    config: &Config,
    facts: &SourceFacts,
    replication: ReplicationConnection,
) -> Result<WalReader, Error> {
    let origin_none =
        config.source.origin == OriginFilter::None && facts.version >= ORIGIN_VERSION_MIN;
    let options = StartOptions {
        slot: &source::slot_name(&config.source.name),
        start: Lsn::ZERO,
        publications: &[&source::publication_name(&config.source.name)],
        messages: true,
        origin_none,
    };
    Ok(replication.start(&options).await?)
}

/// Opens a connection to publish on, behind this sequence of the stream.
async fn publisher(config: &Config, last_seq: u64) -> Result<(Sender, Acks), Error> {
    let publisher = nats::connect(
        &config.stream,
        "millrace publisher",
        INBOX,
        Reconnect::Never,
    )
    .await?;
    publish::open(publisher, last_seq)
        .await
        .map_err(|error| Error::retry(error.to_string(), error))
}

/// The key of `hash` masks, where there is one.
pub(crate) fn salt(config: &Config) -> Result<Option<Salt>, Error> {
    let masks = config.tables.iter().flat_map(|table| &table.columns.mask);
    let hashes = masks.into_iter().any(|(_, mask)| *mask == Mask::Hash);
    let Some(secret) = config.source.mask_salt.as_ref().filter(|_| hashes) else {
        return Ok(None);
    };
    let revealed = secret.read()?;
    let bytes = revealed.expose().as_bytes();
    if bytes.len() < Salt::BYTES_MIN {
        return Err(Error::halt(Condition::new(
            Code::ColumnSelection,
            format!(
                "source.mask_salt has fewer than {} bytes: what it hashes can be guessed",
                Salt::BYTES_MIN
            ),
            format!(
                "put a longer one into {}, such as that of `openssl rand -hex 32`",
                secret.reference()
            ),
        )));
    }
    Ok(Some(Salt::new(bytes)))
}

pub(crate) async fn open_buckets(
    config: &Config,
    jetstream: jetstream::Context,
) -> Result<Stream, Error> {
    let source = &config.source.name;
    let replicas = usize::from(config.stream.replicas);
    let bucket = async |kind: &str| {
        stream::bucket(&jetstream, source, kind, replicas)
            .await
            .map_err(|error| {
                Error::retry("what is stored beside the stream cannot be opened", error)
            })
    };
    let (schemas, sinks) = (bucket(work::SCHEMAS).await?, bucket(work::SINKS).await?);
    let (copies, state) = (bucket(work::COPIES).await?, bucket(work::STATE).await?);
    let name = subject::stream_name(source);
    Ok(Stream {
        jetstream,
        name,
        schemas,
        sinks,
        copies,
        state,
        unsynced: Unsynced::default(),
    })
}

/// Whether anything was ever captured of this source, as far as the broker shows it.
pub(crate) async fn captured_before(
    config: &Config,
    jetstream: &jetstream::Context,
) -> Result<bool, Error> {
    let state = subject::bucket_name(&config.source.name, work::STATE);
    let found = stream::find_stream(jetstream, &format!("KV_{state}")).await?;
    Ok(found.is_some())
}

fn settings(
    config: &Config,
    facts: &SourceFacts,
    tables: &[SourceTable],
    epoch: u32,
    max_payload: usize,
) -> Settings {
    let confirm = match config.stream.kept_until_synced() {
        Some(age) => ConfirmPolicy::Synced(age),
        None => ConfirmPolicy::Acked,
    };
    let keys: HashMap<_, _> = tables
        .iter()
        .map(|table| (table.name.clone(), table.key.clone()))
        .collect();
    let selections = tables
        .iter()
        .map(|table| (table.name.clone(), Arc::clone(&table.selection)))
        .collect();
    Settings {
        source: config.source.name.clone(),
        db: facts.database.clone(),
        epoch,
        tables: keys,
        selections,
        limits: MessageLimits {
            events: config.stream.events_per_message,
            bytes: max_payload.saturating_sub(MESSAGE_OVERHEAD_BYTES).max(1024),
            row_bytes: limits::ROW_BYTES_MAX,
        },
        confirm,
    }
}
