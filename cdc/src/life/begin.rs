//! How a life begins: what is found at the source and in the stream, and what is made that is missing.

use std::time::Duration;

use async_nats::jetstream::{self, kv};
use millrace_config::{Code, Condition, Config, Create};
use millrace_connect::clock::now_us;
use millrace_event::{Control, ControlKind, Lsn, Position, StreamOrigin, subject};
use tokio_postgres::Client;

use super::publishing::Publishing;
use super::{Stream, Without};
use crate::Error;
use crate::birth::{self, Found, Plan, SlotFound, SlotPlan, StreamFound, TailFound};
use crate::identity::published::Earlier;
use crate::replication::{ReplicationConnection, SlotKind, Snapshot, SystemIdentity};
use crate::source::{self, SourceFacts, SourceTable};
use crate::stream::{self, StreamShape};

/// How long creating the slot may wait for transactions that are open at the source.
const SLOT_TIMEOUT: Duration = Duration::from_secs(30);

pub(super) async fn decide(
    config: &Config,
    client: &Client,
    facts: &SourceFacts,
    tables: &[SourceTable],
    stream: &Stream,
) -> Result<Plan, Error> {
    let name = source::slot_name(&config.source.name);
    let slot = match source::find_slot(client, &name).await? {
        None => SlotFound::Missing,
        Some(slot) => {
            source::slot_precondition(&name, &facts.database, &slot)?;
            match slot.active_pid {
                Some(pid) => SlotFound::Active { pid },
                None => SlotFound::Inactive {
                    confirmed: slot.confirmed,
                },
            }
        }
    };
    let confirmed = match slot {
        SlotFound::Inactive { confirmed } => confirmed,
        SlotFound::Missing | SlotFound::Active { .. } => Lsn::ZERO,
    };
    let found = match stream::find_stream(&stream.jetstream, &stream.name).await? {
        None => StreamFound::Missing,
        Some(state) if state.last_seq == 0 => StreamFound::Empty,
        Some(_) => match stream::tail_covering(&stream.jetstream, &stream.name, confirmed).await? {
            None => StreamFound::Emptied,
            Some(tail) => StreamFound::Tail(TailFound {
                position: tail.position,
                end_lsn: tail.end_lsn,
            }),
        },
    };
    // The slot was looked for first: a stream that another process has begun since is no gap.
    let began = slot == SlotFound::Missing && matches!(found, StreamFound::Tail(_));
    if began && source::find_slot(client, &name).await?.is_some() {
        return Err(Error::retry_because("another process begins the stream"));
    }
    let sink_position = has_sink_position(&stream.sinks).await?;
    let begins = matches!(found, StreamFound::Missing | StreamFound::Empty) && !sink_position;
    if begins && config.source.create == Create::Never {
        require_publication(config, client, facts, tables, slot).await?;
    }
    let found = Found {
        name: &name,
        stream: found,
        slot,
        sink_position,
        create: config.source.create,
    };
    match birth::plan(&found).map_err(Error::halt)? {
        Plan::Standby { pid } => Err(Error::Standby(Condition::new(
            Code::SlotActive,
            format!("slot \"{name}\" is read by process {pid}"),
            "nothing to do: this process takes over when that one ends",
        ))),
        plan => Ok(plan),
    }
}

/// Checks that a publication which may not be made is there before anything begins. A slot decodes with the
/// publication as it was, so it comes first, and the remedy has both statements where both are missing.
async fn require_publication(
    config: &Config,
    client: &Client,
    facts: &SourceFacts,
    tables: &[SourceTable],
    slot: SlotFound,
) -> Result<(), Error> {
    let publication = source::publication_name(&config.source.name);
    let condition =
        match source::publication_change(client, facts.version, &publication, tables).await {
            Ok(None) => return Ok(()),
            Ok(Some(change)) => change.condition(),
            Err(Error::Halt(condition)) => condition,
            Err(other) => return Err(other),
        };
    if slot != SlotFound::Missing {
        return Err(Error::halt(condition));
    }
    let make = source::make_slot(&source::slot_name(&config.source.name));
    let remedy = format!("{}; then {make}", condition.remedy);
    Err(Error::halt(Condition {
        remedy,
        ..condition
    }))
}

async fn has_sink_position(sinks: &kv::Store) -> Result<bool, Error> {
    use futures_util::StreamExt;
    let failed = |error| Error::retry("sink reports cannot be read", error);
    let mut keys = sinks.keys().await.map_err(failed)?;
    Ok(keys.next().await.is_some())
}

/// Makes what is missing: stream, then publication, then slot.
pub(super) async fn prepare(
    publishing: &Publishing<'_>,
    earlier: &mut Earlier,
    replication: &mut ReplicationConnection,
    plan: Plan,
) -> Result<Without, Error> {
    let Publishing {
        config,
        client,
        stream,
        ..
    } = *publishing;
    let shape = StreamShape {
        source: config.source.name.clone(),
        max_bytes: config.stream.retention.max_bytes,
        replicas: usize::from(config.stream.replicas),
        partitions: config.stream.partitions,
        kept_until_synced: config.stream.kept_until_synced().is_some(),
    };
    stream::ensure_stream(&stream.jetstream, &shape).await?;
    let without = publishing.ensure(earlier, plan).await?;
    let slot = source::slot_name(&config.source.name);
    let Plan::Begin { slot: slot_plan } = plan else {
        return Ok(without);
    };
    match slot_plan {
        SlotPlan::Take => return Ok(without),
        SlotPlan::Recreate => {
            tracing::info!(%slot, "dropping a slot that a crash left before its stream began");
            source::drop_slot(client, &slot).await?;
        }
        SlotPlan::Create => {}
    }
    assert_eq!(
        config.source.create,
        Create::Auto,
        "only what may be created is"
    );
    let created = replication.create_slot(&slot, SlotKind::Permanent, Snapshot::None);
    match tokio::time::timeout(SLOT_TIMEOUT, created).await {
        Ok(created) => {
            let consistent_point = created?.consistent_point;
            tracing::info!(%slot, %consistent_point, "slot created");
            Ok(without)
        }
        Err(_) => Err(Error::retry_because(slot_blocked(client).await.to_string())),
    }
}

/// Which transactions keep a slot from being created.
pub(crate) async fn slot_blocked(client: &Client) -> Condition {
    let blockers = client
        .query(
            "SELECT pid, coalesce(application_name, '') FROM pg_stat_activity \
             WHERE backend_xid IS NOT NULL AND pid <> pg_backend_pid() ORDER BY xact_start LIMIT 3",
            &[],
        )
        .await
        .unwrap_or_default();
    let pids: Vec<String> = blockers
        .iter()
        .map(|row| format!("{} ({})", row.get::<_, i32>(0), row.get::<_, String>(1)))
        .collect();
    let open = if pids.is_empty() {
        "unknown".to_owned()
    } else {
        pids.join(", ")
    };
    Condition::new(
        Code::SlotBlocked,
        format!("a slot waits for every open transaction to end; open: {open}"),
        "end the transactions that are open for long; it is tried again by itself",
    )
}

pub(super) async fn publish_start(
    config: &Config,
    stream: &Stream,
    identity: &SystemIdentity,
    epoch: u32,
    confirmed: Lsn,
) -> Result<(), Error> {
    let ts_us = now_us();
    let control = Control {
        kind: ControlKind::Start,
        position: Position::new(epoch, confirmed, 0),
        end_lsn: confirmed,
        ts_us,
        origin: Some(StreamOrigin {
            system_id: identity.system_id.clone(),
            timeline: identity.timeline,
            slot: source::slot_name(&config.source.name),
        }),
    };
    let payload = serde_json::to_vec(&control).expect("plain JSON");
    let subject = subject::control(&config.source.name, ControlKind::Start);
    let failed = |error| Error::retry("the stream's start cannot be published", error);
    let message = jetstream::message::PublishMessage::build()
        .payload(payload.into())
        .expected_last_sequence(0);
    stream
        .jetstream
        .send_publish(subject, message)
        .await
        .map_err(failed)?
        .await
        .map_err(failed)?;
    tracing::info!(position = %control.position, "stream begun");
    Ok(())
}
