//! One life of a capture: from nothing to streaming. What it finds decides how it begins.

mod away;
mod begin;
mod publishing;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use async_nats::jetstream::{self, kv};
use millrace_config::{Code, Condition, Config, Mask, Origin as OriginFilter, limits};
use millrace_connect::nats::{self, Reconnect};
use millrace_connect::postgres::{Dsn, Session, connect};
use millrace_event::{Lsn, Position, subject, work};
use tokio_postgres::Client;

pub(crate) use self::away::Away;
pub(crate) use self::begin::slot_blocked;
use self::begin::{decide, prepare, publish_start};
use self::publishing::Publishing;
pub(crate) use self::publishing::{NOT_CONFIGURED, Without, relieve};
use crate::Error;
use crate::assemble::MessageLimits;
use crate::birth::{self, Plan, TailFound};
use crate::capture::{Capture, Resume, Settings};
use crate::frontier::{Boundary, ConfirmPolicy};
use crate::identity;
use crate::identity::published::Earlier;
use crate::left_out::LeftOut;
use crate::orders::{self, Unsynced};
use crate::publish::{self, Acks, Sender};
use crate::replication::{
    NEAR_RECEIVE_BUFFER_BYTES, NEAR_ROUND_TRIP_MAX, ReplicationConnection, StartOptions, WalReader,
};
use crate::schemas;
use crate::seen::{FirstLook, Watched};
use crate::selection::Salt;
use crate::source::{self, Inspected, SourceFacts, SourceTable};
use crate::stream::{self, StreamState, Tail};

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

/// How often the way to the source is measured; the shortest counts, because the others had to wait for a processor.
const ROUND_TRIPS: usize = 5;

/// Gives the replication connection a small receive buffer where the source is near enough for it. Of several hosts
/// it may reach another one than was measured.
async fn fitted(dsn: Dsn, client: &Client) -> Result<Dsn, Error> {
    if dsn.hosts() > 1 {
        return Ok(dsn);
    }
    let mut shortest = Duration::MAX;
    for _ in 0..ROUND_TRIPS {
        let sent = Instant::now();
        client.batch_execute("").await?;
        shortest = shortest.min(sent.elapsed());
    }
    Ok(match shortest <= NEAR_ROUND_TRIP_MAX {
        true => dsn.with_receive_buffer(NEAR_RECEIVE_BUFFER_BYTES),
        false => dsn,
    })
}

/// The broker, as far as it must be there before anything is decided.
struct Reached {
    jetstream: jetstream::Context,
    /// In bytes.
    max_payload: usize,
    /// Whether anything was ever captured of this source.
    captured_before: bool,
}

async fn reach(config: &Config) -> Result<Reached, Error> {
    let admin = nats::connect(&config.stream, "millrace capture", INBOX, Reconnect::Itself).await?;
    let max_payload = admin.server_info().max_payload;
    let jetstream = jetstream::new(admin);
    stream::require_level(&jetstream).await?;
    let captured_before = captured_before(config, &jetstream).await?;
    Ok(Reached {
        jetstream,
        max_payload,
        captured_before,
    })
}

/// Connects, checks, begins or resumes, and starts replication.
pub(crate) async fn open(config: &Config, now: Duration, away: &mut Away) -> Result<Life, Error> {
    let dsn = Dsn::parse(config.source.url.read()?.expose())
        .map_err(millrace_connect::postgres::ConnectError::from)?;
    let session = Session {
        application_name: "millrace".to_owned(),
        // The catalog is asked about all tables at once: compiling that takes longer than answering.
        options: vec![("jit".to_owned(), "off".to_owned())],
    };
    let client = connect(&dsn, session).await?;
    let facts = source::inspect(&client).await?;
    let salt = salt(config)?;
    let first = FirstLook::take(config, &client).await?;
    let inspected = source::inspect_tables(&client, &facts, &config.tables, salt.as_ref()).await?;

    let reached = match reach(config).await {
        Ok(reached) => reached,
        Err(error) => {
            let refused = match away.outlasts(&error) {
                true => inspected.refused.as_slice(),
                false => &[],
            };
            let relieved = away.relieve(config, &client, facts.version, refused).await;
            if let Err(error) = relieved {
                tracing::warn!(reason = %error.chain(), "tables stay published that their application cannot change");
            }
            return Err(error);
        }
    };
    let max_payload = reached.max_payload;
    let inspected = match inspected.refused.is_empty() || reached.captured_before {
        true => inspected,
        // Nothing is made for a capture that does not begin.
        false => Inspected {
            tables: inspected.all()?,
            refused: Vec::new(),
        },
    };
    let stream = open_buckets(config, reached.jetstream).await?;
    let publication = source::publication_name(&config.source.name);
    let mut members = source::published_tables(&client, facts.version, &publication).await?;
    let mut known = Earlier::read(&stream).await?;
    away.settle(&mut known, &stream).await?;
    known.recall(&mut members);
    let (mut tables, refused) = known.admit(inspected, &members, |_| true)?;
    let watched = Watched::begin(first, &client, &refused, &stream.state).await?;
    let mut earlier = Earlier::read(&stream).await?;
    earlier.carry_over(&mut tables)?;
    if facts.in_recovery {
        source::adopt_filters(&client, facts.version, &publication, &mut tables).await?;
    }
    let tables = Arc::new(tables);

    let plan = match decide(config, &client, &facts, &tables, &stream).await {
        Ok(plan) => Ok(plan),
        // What the source is comes first: another server's lack of a slot is no gap of this stream.
        Err(Error::Halt(condition)) => Err(condition),
        Err(passing) => return Err(passing),
    };
    let mut replication =
        ReplicationConnection::connect(&fitted(dsn.clone(), &client).await?, "millrace").await?;
    let identity = replication.identify_system().await?;
    let left_out = LeftOut::read(&stream.state, &client, identity.timeline).await?;
    let known = stream_tail(&stream, Lsn::ZERO).await?;
    let known = known.map(|(_, tail)| tail);
    let epoch = identity::check(&stream, &mut replication, &identity, known.as_ref()).await?;
    let plan = plan.map_err(Error::Halt)?;
    // Before this life writes lists by itself.
    orders::renew(config, &stream).await?;
    let publishing = Publishing {
        config,
        client: &client,
        version: facts.version,
        tables: &tables,
        refused: &refused,
        stream: &stream,
    };
    let without = prepare(&publishing, &mut earlier, &mut replication, plan).await?;
    let locked = |table: &SourceTable| without.locked.iter().any(|(name, _)| *name == table.name);
    let tables = match without.locked.is_empty() {
        true => tables,
        // As if they were not configured: their changes are dropped, and whoever asks for their rows waits.
        false => Arc::new(
            tables
                .iter()
                .filter(|table| !locked(table))
                .cloned()
                .collect(),
        ),
    };
    schemas::describe_tables(&client, &stream.schemas, &tables).await?;

    let slot = source::slot_name(&config.source.name);
    let origin_none =
        config.source.origin == OriginFilter::None && facts.version >= ORIGIN_VERSION_MIN;
    let options = StartOptions {
        slot: &slot,
        start: Lsn::ZERO,
        publications: &[&publication],
        messages: true,
        origin_none,
    };
    let wal = replication.start(&options).await?;

    // Only now nobody else can move the slot or the stream's tail.
    let confirmed = source::find_slot(&client, &slot)
        .await?
        .ok_or_else(|| Error::retry_because("the slot vanished while it was read"))?
        .confirmed;
    if matches!(plan, Plan::Begin { .. }) && stream_tail(&stream, confirmed).await?.is_none() {
        publish_start(config, &stream, &identity, epoch, confirmed).await?;
    }
    let (state, tail) = stream_tail(&stream, confirmed)
        .await?
        .ok_or_else(|| Error::retry_because("the stream's start is gone again"))?;
    let found = TailFound {
        position: tail.position,
        end_lsn: tail.end_lsn,
    };
    birth::check_tail(&slot, found, confirmed).map_err(Error::halt)?;
    identity::remember(&stream, &identity, epoch).await?;
    let after = stream::whole_at(&stream.jetstream, &stream.name, &tail).await?;

    let publisher = nats::connect(
        &config.stream,
        "millrace publisher",
        INBOX,
        Reconnect::Never,
    )
    .await?;
    let (sender, acks) = publish::open(publisher, state.last_seq)
        .await
        .map_err(|error| Error::retry(error.to_string(), error))?;
    let settings = settings(config, &facts, &tables, epoch, max_payload);
    let capture = Capture::new(settings, resume(&state, &tail, confirmed), now);
    away.streams(&tables, &refused);
    let source = Source {
        dsn,
        client,
        facts,
        tables,
        epoch,
        timeline: identity.timeline,
    };
    Ok(Life {
        capture,
        after,
        wal,
        sender,
        acks,
        source,
        stream,
        watched,
        left_out,
        without,
    })
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

async fn stream_tail(
    stream: &Stream,
    confirmed: Lsn,
) -> Result<Option<(StreamState, Tail)>, Error> {
    let Some(state) = stream::find_stream(&stream.jetstream, &stream.name).await? else {
        return Ok(None);
    };
    let tail = stream::tail_covering(&stream.jetstream, &stream.name, confirmed).await?;
    Ok(tail.map(|tail| (state, tail)))
}

/// This machine's clock, microseconds since 1970.
pub(crate) fn now_us() -> i64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |age| i64::try_from(age.as_micros()).unwrap_or(i64::MAX))
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

fn resume(state: &StreamState, tail: &Tail, confirmed: Lsn) -> Resume {
    let age = state.now.duration_since(tail.stored_at).unwrap_or_default();
    let boundary = tail.end_lsn.map(|end_lsn| {
        (
            Boundary {
                stream_seq: tail.stream_seq,
                position: tail.position,
                end_lsn,
            },
            age,
        )
    });
    let last_seq = state.last_seq.max(tail.stream_seq);
    Resume {
        last_seq,
        tail: tail.position,
        boundary,
        confirmed,
    }
}
