//! The goal of `run --once`: what is committed when it starts.

use std::time::Duration;

use millrace_config::{Code, Condition, State};
use millrace_connect::postgres::{ConnectError, Dsn, Session, connect};
use millrace_event::{Lsn, Position};

use super::run::Parts;

/// How often an unreachable server is tried again.
const RETRY_INTERVAL: Duration = Duration::from_millis(500);

/// When the process has done what it was started for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Goal {
    /// The source's WAL position: the stream must cover it, and every sink that runs here must have applied
    /// what lies below.
    Source(Lsn),
    /// The stream's newest position: every sink that runs here must have applied it.
    Stream(Position),
}

impl Goal {
    /// Whether every part of this process has reached it.
    pub(super) fn is_reached(&self, parts: &Parts) -> bool {
        let captured = match (self, &parts.capture) {
            (Self::Source(goal), Some(status)) => status.covered() >= *goal,
            _ => true,
        };
        captured
            && parts.sinks.iter().all(|(_, status)| {
                let snapshot = status.snapshot();
                let copied = snapshot.begun
                    && snapshot
                        .tables
                        .iter()
                        .all(|(_, state, _)| matches!(state, State::Streaming | State::Parked(_)));
                let reached = match self {
                    // A heartbeat written after the goal was read lies above it.
                    Self::Source(goal) => snapshot.checkpoint.position.commit_lsn() >= *goal,
                    Self::Stream(goal) => snapshot.checkpoint.position >= *goal,
                };
                copied && reached
            })
    }
}

/// Whether a sink of this process left a table behind.
pub(super) fn is_incomplete(parts: &Parts) -> bool {
    let parked = |state: &State| matches!(state, State::Parked(_));
    parts.sinks.iter().any(|(_, status)| {
        status
            .snapshot()
            .tables
            .iter()
            .any(|(_, state, _)| parked(state))
    })
}

/// Reads the goal: from the source where capture runs here, else from the stream.
pub(super) async fn goal(parts: &Parts) -> Result<Goal, Condition> {
    loop {
        let goal = match parts.capture {
            Some(_) => source_goal(parts).await,
            None => stream_goal(parts).await,
        };
        match goal {
            Ok(Some(goal)) => return Ok(goal),
            Ok(None) => tokio::time::sleep(RETRY_INTERVAL).await,
            Err(condition) => return Err(condition),
        }
    }
}

async fn source_goal(parts: &Parts) -> Result<Option<Goal>, Condition> {
    let unusable = |message: String| {
        Condition::new(
            Code::ConfigInvalid,
            message,
            "correct the URL that source.url refers to",
        )
    };
    let url = parts
        .config
        .source
        .url
        .read()
        .map_err(|error| unusable(error.to_string()))?;
    let dsn = Dsn::parse(url.expose()).map_err(|error| unusable(error.to_string()))?;
    let session = Session {
        application_name: "millrace once".to_owned(),
        options: Vec::new(),
    };
    match connect(&dsn, session).await {
        Ok(client) => Ok(millrace_cdc::source::wal_position(&client)
            .await
            .ok()
            .map(Goal::Source)),
        Err(error @ ConnectError::Auth { .. }) => Err(Condition::new(
            Code::SourceAuth,
            error.to_string(),
            "correct the user or password that source.url refers to",
        )),
        Err(error) => {
            tracing::warn!(%error, "waiting for the source");
            Ok(None)
        }
    }
}

async fn stream_goal(parts: &Parts) -> Result<Option<Goal>, Condition> {
    use millrace_connect::nats::{self, Reconnect};
    let inbox = "_INBOX_millrace_once";
    let client = match nats::connect(
        &parts.config.stream,
        "millrace once",
        inbox,
        Reconnect::Never,
    )
    .await
    {
        Ok(client) => client,
        Err(error) => {
            tracing::warn!(%error, "waiting for NATS");
            return Ok(None);
        }
    };
    let jetstream = async_nats::jetstream::new(client);
    let name = millrace_event::subject::stream_name(&parts.config.source.name);
    let tail = millrace_cdc::stream::tail(&jetstream, &name)
        .await
        .ok()
        .flatten();
    Ok(tail.map(|tail| Goal::Stream(tail.position)))
}
