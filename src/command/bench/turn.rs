//! One contender's turn at the backlog: how long it took, what it used, and whether it really did it.

use std::time::{Duration, Instant};

use millrace_consumer::{Body, Reader, ReaderOptions, Start};
use millrace_event::subject;
use millrace_lab::{Compared, LabError, Pipeline, compare};
use serde::Serialize;

use super::contender::Contender;
use super::stage::{Backlog, DATABASE, LIMIT_ARGUMENT, Stage, TABLE, execute};
use super::usage::{self, ServersCpu, Usage};

/// How long the stream may stay silent before its last row has come.
const READ_TIMEOUT: Duration = Duration::from_secs(30);

/// What was seen.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Turn {
    pub(super) contender: Contender,
    /// From the start of the process, or of the subscription, until the last row was there: for a replica
    /// visible in its target; for an initial copy until the table was complete; else until the process had
    /// ended.
    pub(super) seconds: f64,
    pub(super) rows_per_second: f64,
    /// The contender's own process; native replication has none.
    pub(super) process: Option<Usage>,
    /// The servers' processor time during the turn.
    pub(super) servers_cpu_seconds: ServersCpu,
}

/// Lets the contender work through the backlog, and checks that it has.
pub(super) async fn take(
    stage: &Stage,
    contender: Contender,
    backlog: &Backlog,
) -> Result<Turn, LabError> {
    stage.settle().await?;
    let before = stage.cpu();
    let began = Instant::now();
    let (took, process) = match contender {
        Contender::Native => {
            subscription(stage, contender, "ENABLE").await?;
            let last = (backlog.rows, backlog.rows);
            stage.until_visible(contender, last, 1, None).await?;
            let took = began.elapsed();
            (took, None)
        }
        Contender::NativeSync => {
            contender.synchronize(stage).await?;
            stage.until_synchronized(contender).await?;
            (began.elapsed(), None)
        }
        _ => {
            let mut run = start(stage, contender, backlog)?;
            let watched = usage::watch(run.pid());
            let mut took = None;
            if matches!(contender, Contender::Replica | Contender::ReplicaPacked) {
                let last = (backlog.rows, backlog.rows);
                let run = Some(&mut run);
                stage.until_visible(contender, last, 1, run).await?;
                took = Some(began.elapsed());
            }
            stage.succeed(&mut run, contender.name()).await?;
            let took = took.unwrap_or_else(|| began.elapsed());
            (took, watched.await.ok().flatten())
        }
    };
    let servers_cpu_seconds = stage.cpu().since(before);
    verify(stage, contender, backlog).await?;
    clear(stage, contender).await?;
    Ok(Turn {
        contender,
        seconds: took.as_secs_f64(),
        rows_per_second: backlog.rows as f64 / took.as_secs_f64(),
        process,
        servers_cpu_seconds,
    })
}

fn start(stage: &Stage, contender: Contender, backlog: &Backlog) -> Result<Pipeline, LabError> {
    let folder = stage.folder(contender);
    if contender == Contender::PgRecvlogical {
        let url = stage.source.url(DATABASE);
        let (slot, end) = (contender.slot(), backlog.end_lsn.to_string());
        let publication = format!("publication_names={slot}");
        return Pipeline::spawn(
            &stage.source.bin("pg_recvlogical"),
            folder,
            &[
                "--dbname",
                &url,
                "--slot",
                &slot,
                "--start",
                "--no-loop",
                "--file",
                "/dev/null",
                "--endpos",
                &end,
                "--option",
                "proto_version=1",
                "--option",
                &publication,
            ],
        );
    }
    let mut arguments = vec!["run", "--once", "--timeout", LIMIT_ARGUMENT];
    arguments.extend(contender.parts());
    Pipeline::spawn(&stage.bin, folder, &arguments)
}

/// Enables or disables the native subscription.
pub(super) async fn subscription(
    stage: &Stage,
    contender: Contender,
    verb: &str,
) -> Result<(), LabError> {
    let client = stage.target.connect(contender.name()).await?;
    let slot = contender.slot();
    execute(&client, &format!("ALTER SUBSCRIPTION {slot} {verb}")).await
}

/// Fails unless the contender holds everything.
async fn verify(stage: &Stage, contender: Contender, backlog: &Backlog) -> Result<(), LabError> {
    match contender {
        Contender::PgRecvlogical => confirmed(stage, contender, backlog).await,
        Contender::Capture | Contender::CapturePacked => in_stream(stage, contender, backlog).await,
        Contender::Native
        | Contender::Replica
        | Contender::ReplicaPacked
        | Contender::NativeSync
        | Contender::Load => {
            let source = stage.source.url(DATABASE);
            let target = contender.target_url(&stage.target);
            let found = compare(&source, &target, &[Compared::same(TABLE)]).await?;
            if found.is_equal() && found.rows == backlog.rows {
                return Ok(());
            }
            Err(wrong(contender, &found.to_string()))
        }
    }
}

/// What went to /dev/null cannot be counted: its slot tells how far it has read.
async fn confirmed(stage: &Stage, contender: Contender, backlog: &Backlog) -> Result<(), LabError> {
    let query = "SELECT confirmed_flush_lsn >= $1 FROM pg_replication_slots WHERE slot_name = $2";
    let row = stage
        .client
        .query_one(query, &[&backlog.end_lsn, &contender.slot()])
        .await
        .map_err(LabError::postgres("read how far a slot is"))?;
    match row.get(0) {
        true => Ok(()),
        false => Err(wrong(contender, "it ended before the end of the load")),
    }
}

/// Reads the whole stream: every row once, and nothing else.
async fn in_stream(stage: &Stage, contender: Contender, backlog: &Backlog) -> Result<(), LabError> {
    let jetstream = async_nats::jetstream::new(stage.nats.client().await?);
    let options = ReaderOptions::new(jetstream, contender.name(), Start::Beginning);
    let mut reader = Reader::open(options);
    let unexpected = |what: String| wrong(contender, &what);
    let mut seen = vec![false; usize::try_from(backlog.rows).unwrap_or(usize::MAX)];
    let mut missing = seen.len();
    while missing > 0 {
        let delivery = tokio::time::timeout(READ_TIMEOUT, reader.next())
            .await
            .map_err(|_| unexpected(format!("{missing} rows are not in the stream")))?
            .map_err(|error| unexpected(error.to_string()))?;
        if matches!(delivery.body, Body::Control(_)) {
            continue;
        }
        for event in delivery.changes() {
            let event = event.map_err(|error| unexpected(error.to_string()))?;
            let id = event
                .after
                .as_ref()
                .and_then(|columns| columns.iter().find(|(name, _)| *name == "id"))
                .and_then(|(_, value)| value.as_text()?.parse::<usize>().ok());
            match id.and_then(|id| seen.get_mut(id.checked_sub(1)?)) {
                Some(slot) if !*slot => *slot = true,
                _ => return Err(unexpected(format!("unexpected or twice: row {id:?}"))),
            }
            missing -= 1;
        }
    }
    Ok(())
}

/// Removes what would be in the way of the next contender: a subscription at work, a stream on the disk.
async fn clear(stage: &Stage, contender: Contender) -> Result<(), LabError> {
    match contender {
        Contender::PgRecvlogical => Ok(()),
        Contender::Native | Contender::NativeSync => {
            subscription(stage, contender, "DISABLE").await
        }
        _ => {
            let jetstream = async_nats::jetstream::new(stage.nats.client().await?);
            let name = subject::stream_name(contender.name());
            let deleted = jetstream.delete_stream(name).await;
            deleted
                .map(drop)
                .map_err(|error| LabError::Unexpected(format!("deleting a stream: {error}")))
        }
    }
}

fn wrong(contender: Contender, what: &str) -> LabError {
    LabError::Unexpected(format!("{}: {what}", contender.name()))
}
