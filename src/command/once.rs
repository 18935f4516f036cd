//! The goal of `run --once`: what is committed when it starts.

use std::time::Duration;

use millrace_config::{Code, Condition, State};
use millrace_connect::postgres::{ConnectError, Dsn, Session, connect};
use millrace_event::{Lsn, Position, TableName};

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
        let parked = parts.capture.as_ref().map(|status| status.parked());
        let parked = parked.unwrap_or_default();
        // Nobody brings its rows.
        let is_parked = |name: &TableName| parked.iter().any(|(table, _)| table == name);
        captured
            && parts.sinks.iter().all(|(_, status)| {
                let snapshot = status.snapshot();
                let copied = snapshot.begun
                    && snapshot.tables.iter().all(|(name, state, _)| {
                        matches!(state, State::Streaming | State::Parked(_)) || is_parked(name)
                    });
                let reached = match self {
                    // A heartbeat written after the goal was read lies above it.
                    Self::Source(goal) => snapshot.checkpoint.position.commit_lsn() >= *goal,
                    Self::Stream(goal) => snapshot.checkpoint.position >= *goal,
                };
                copied && reached
            })
    }
}

/// Whether a part of this process left a table behind.
pub(super) fn is_incomplete(parts: &Parts) -> bool {
    let captured = parts.capture.as_ref();
    if captured.is_some_and(|status| !status.parked().is_empty()) {
        return true;
    }
    let parked = |state: &State| matches!(state, State::Parked(_));
    parts.sinks.iter().any(|(_, status)| {
        status
            .snapshot()
            .tables
            .iter()
            .any(|(_, state, _)| parked(state))
    })
}

/// What `--once` has done, in one line.
pub(super) fn summary(goal: &Goal, parts: &Parts, took: Duration) -> String {
    let (mut rows, mut letters) = (0, 0);
    for (_, status) in &parts.sinks {
        let snapshot = status.snapshot();
        rows += snapshot.written;
        letters += snapshot.dead_letters;
    }
    let changes = parts.capture.as_ref().map(|status| status.changes());
    done(
        goal,
        changes,
        (!parts.sinks.is_empty()).then_some((rows, letters)),
        took,
    )
}

/// `changes` were read from the WAL where capture ran here; (`rows`, dead letters) became of it where a sink did.
fn done(goal: &Goal, changes: Option<u64>, sinks: Option<(u64, u64)>, took: Duration) -> String {
    let counted = |count: u64, what: &str| {
        let plural = if count == 1 { "" } else { "s" };
        format!("{count} {what}{plural}")
    };
    let mut did = Vec::new();
    if let Some(changes) = changes {
        did.push(format!("{} read", counted(changes, "change")));
    }
    if let Some((rows, letters)) = sinks {
        did.push(format!("{} written", counted(rows, "row")));
        if letters > 0 {
            did.push(format!("{} set aside", counted(letters, "row")));
        }
    }
    let lsn = match goal {
        Goal::Source(lsn) => *lsn,
        Goal::Stream(position) => position.commit_lsn(),
    };
    let done = if sinks.is_some() {
        "applied"
    } else {
        "published"
    };
    format!(
        "{done} everything up to {lsn}: {} in {:.1} s",
        did.join(", "),
        took.as_secs_f64()
    )
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_done_is_told_in_one_line() {
        let took = Duration::from_millis(1_240);
        let source = Goal::Source(Lsn(0x1_0000_00A0));
        assert_eq!(
            done(&source, Some(1), Some((1_000, 0)), took),
            "applied everything up to 1/A0: 1 change read, 1000 rows written in 1.2 s"
        );
        assert_eq!(
            done(&source, Some(2), None, took),
            "published everything up to 1/A0: 2 changes read in 1.2 s"
        );
        let stream = Goal::Stream(Position::new(1, Lsn(0xA0), 3));
        assert_eq!(
            done(&stream, None, Some((0, 1)), took),
            "applied everything up to 0/A0: 0 rows written, 1 row set aside in 1.2 s"
        );
    }
}
