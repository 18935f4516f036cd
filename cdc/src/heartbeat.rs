//! Heartbeats: small messages in the source's WAL that advance the slot of an idle source and measure the
//! whole path. They need no table and no grant beyond login.

use std::time::Duration;

use millrace_connect::postgres::{Dsn, Session, connect};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use crate::Error;
use crate::capture::HEARTBEAT_PREFIX;

/// Writes heartbeats until it fails. Returns only with an error.
///
/// # Errors
/// The source's connection failed, or ended because the source shuts down.
pub(crate) async fn beat(dsn: &Dsn, interval: Duration) -> Result<std::convert::Infallible, Error> {
    // A heartbeat that is lost in a crash is written again soon: no commit need wait for it.
    let session = Session {
        application_name: "millrace heartbeat".to_owned(),
        options: vec![("synchronous_commit".to_owned(), "off".to_owned())],
    };
    let client = connect(dsn, session).await?;
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut warned = false;
    loop {
        ticks.tick().await;
        match write(&client).await {
            Ok(()) => warned = false,
            Err(error) if cannot_be_written(&error) => {
                if !warned {
                    tracing::warn!(%error, "heartbeats cannot be written here; following the WAL's progress");
                }
                warned = true;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Writes a heartbeat whose commit waits for the local disk only: it is decoded at once, and held up by no standby.
pub(crate) async fn write_now(client: &Client) -> Result<(), tokio_postgres::Error> {
    client
        .batch_execute("SET synchronous_commit = local")
        .await?;
    write(client).await
}

async fn write(client: &Client) -> Result<(), tokio_postgres::Error> {
    client
        .execute(
            "SELECT pg_logical_emit_message(true, $1, '')",
            &[&HEARTBEAT_PREFIX],
        )
        .await
        .map(|_| ())
}

/// A standby, a read-only session, or a right that is missing: not a failure of the connection.
pub(crate) fn cannot_be_written(error: &tokio_postgres::Error) -> bool {
    let codes = [
        SqlState::READ_ONLY_SQL_TRANSACTION,
        SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE,
        SqlState::INSUFFICIENT_PRIVILEGE,
    ];
    error.code().is_some_and(|code| codes.contains(code))
}
