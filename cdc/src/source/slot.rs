//! The replication slot.

use millrace_config::{Code, Condition};
use millrace_event::Lsn;
use tokio_postgres::Client;

use super::lsn;
use crate::Error;

/// The slot of a source: `millrace_<source>`.
#[must_use]
pub fn slot_name(source: &str) -> String {
    format!("millrace_{source}")
}

/// The statement that makes the slot by hand.
#[must_use]
pub fn make_slot(name: &str) -> String {
    format!("SELECT pg_create_logical_replication_slot('{name}', 'pgoutput')")
}

/// A slot as `pg_replication_slots` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotState {
    /// The process that reads from it.
    pub active_pid: Option<i32>,
    /// Where decoding would begin: everything below was confirmed.
    pub confirmed: Lsn,
    /// The oldest WAL that the slot keeps.
    pub restart: Option<Lsn>,
    /// `reserved`, `extended`, `unreserved` or `lost`.
    pub wal_status: Option<String>,
    /// How many bytes of WAL the source keeps for it.
    pub retained_bytes: u64,
    /// How many bytes of WAL were written since what it has forgotten.
    pub lag_bytes: u64,
    /// Its output plugin.
    pub plugin: String,
    /// Its database.
    pub database: Option<String>,
}

/// Looks a slot up.
///
/// # Errors
/// The connection failed.
pub async fn find_slot(client: &Client, name: &str) -> Result<Option<SlotState>, Error> {
    let row = client
        .query_opt(
            "SELECT active_pid, coalesce(confirmed_flush_lsn, '0/0')::text, restart_lsn::text, wal_status, \
             coalesce(pg_wal_lsn_diff(now.lsn, restart_lsn), 0)::bigint, coalesce(plugin::text, ''), \
             database::text, coalesce(pg_wal_lsn_diff(now.lsn, confirmed_flush_lsn), 0)::bigint \
             FROM pg_replication_slots, (SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() \
             ELSE pg_current_wal_insert_lsn() END) now(lsn) WHERE slot_name = $1",
            &[&name],
        )
        .await?;
    let Some(row) = row else { return Ok(None) };
    let restart = row
        .get::<_, Option<String>>(2)
        .map(|text| lsn(&text))
        .transpose()?;
    Ok(Some(SlotState {
        active_pid: row.get(0),
        confirmed: lsn(&row.get::<_, String>(1))?,
        restart,
        wal_status: row.get(3),
        retained_bytes: u64::try_from(row.get::<_, i64>(4)).unwrap_or(0),
        lag_bytes: u64::try_from(row.get::<_, i64>(7)).unwrap_or(0),
        plugin: row.get(5),
        database: row.get(6),
    }))
}

/// Checks that a slot can be read from: of the right kind, and not invalidated.
///
/// # Errors
/// The condition that an operator must resolve.
pub fn slot_precondition(name: &str, database: &str, slot: &SlotState) -> Result<(), Error> {
    if slot.plugin != "pgoutput" || slot.database.as_deref() != Some(database) {
        return Err(Error::halt(Condition::new(
            Code::SlotMissing,
            format!(
                "slot \"{name}\" exists with plugin \"{}\" in database \"{}\"",
                slot.plugin,
                slot.database.as_deref().unwrap_or("none"),
            ),
            format!(
                "drop it (SELECT pg_drop_replication_slot('{name}')) or choose another source.name"
            ),
        )));
    }
    if slot.wal_status.as_deref() == Some("lost") {
        return Err(Error::halt(Condition::new(
            Code::SlotLost,
            format!(
                "slot \"{name}\" was invalidated: the source removed WAL that was not read yet"
            ),
            "run `millrace drop`, then `millrace run`: the tables are copied again; \
             raise max_slot_wal_keep_size so that it does not happen again",
        )));
    }
    Ok(())
}

/// Drops a slot that nobody reads from; does nothing where there is none.
///
/// # Errors
/// Somebody reads from it, a privilege is missing, or the connection failed.
pub async fn drop_slot(client: &Client, name: &str) -> Result<bool, Error> {
    let dropped = client
        .execute(
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = $1",
            &[&name],
        )
        .await?;
    Ok(dropped > 0)
}
