//! The goal of `run --once`: what is committed when it starts.

use std::time::Duration;

use millrace_config::{Code, Condition, State, chain};
use millrace_connect::postgres::{ConnectError, Session, connect};
use millrace_event::{Lsn, Position, TableName};

use super::attempts::Attempts;
use super::run::Parts;
use crate::connection::{self, nats_condition};

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

/// Why there is no goal.
enum NoGoal {
    /// An operator must act.
    Never(Condition),
    /// It passes, or may: the reason.
    NotYet(String),
}

/// Reads the goal: from the source where capture runs here, else from the stream.
pub(super) async fn goal(parts: &Parts) -> Result<Goal, Condition> {
    let began = tokio::time::Instant::now();
    let mut attempts = Attempts::default();
    loop {
        let (server, goal) = match parts.capture {
            Some(_) => ("the source", source_goal(parts).await),
            None => ("NATS", stream_goal(parts).await),
        };
        let error = match goal {
            Ok(goal) => return Ok(goal),
            Err(NoGoal::Never(condition)) => return Err(condition),
            Err(NoGoal::NotYet(error)) => error,
        };
        let failed = attempts.failed(&error, began.elapsed());
        if failed.tell {
            tracing::warn!(%error, "waiting for {server}");
        }
        tokio::time::sleep(failed.pause).await;
    }
}

async fn source_goal(parts: &Parts) -> Result<Goal, NoGoal> {
    let dsn = connection::dsn(&parts.config.source.url, "source.url");
    let dsn = dsn.map_err(NoGoal::Never)?;
    let session = Session {
        application_name: "millrace once".to_owned(),
        options: Vec::new(),
    };
    let client = connect(&dsn, session).await.map_err(|error| match error {
        ConnectError::Auth { .. } => NoGoal::Never(Condition::new(
            Code::SourceAuth,
            error.to_string(),
            "correct the user or password that source.url refers to",
        )),
        error => NoGoal::NotYet(chain(&error)),
    })?;
    let lsn = millrace_cdc::source::wal_position(&client).await;
    let lsn = lsn.map_err(|error| NoGoal::NotYet(chain(&error)))?;
    Ok(Goal::Source(lsn))
}

async fn stream_goal(parts: &Parts) -> Result<Goal, NoGoal> {
    use millrace_connect::nats::{self, NatsError, Reconnect};
    let inbox = "_INBOX_millrace_once";
    let stream = &parts.config.stream;
    let client = nats::connect(stream, "millrace once", inbox, Reconnect::Never).await;
    let client = client.map_err(|error| match &error {
        NatsError::Auth { .. } | NatsError::Secret(_) => NoGoal::Never(nats_condition(&error)),
        NatsError::Unreachable { .. } | NatsError::Tls { .. } => NoGoal::NotYet(chain(&error)),
    })?;
    let jetstream = async_nats::jetstream::new(client);
    let name = millrace_event::subject::stream_name(&parts.config.source.name);
    match millrace_cdc::stream::tail(&jetstream, &name).await {
        Ok(Some(tail)) => Ok(Goal::Stream(tail.position)),
        Ok(None) => Err(NoGoal::NotYet(format!("stream {name} holds nothing yet"))),
        Err(error) => Err(NoGoal::NotYet(chain(&error))),
    }
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
