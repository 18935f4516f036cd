//! The source database over SQL: what it is, what its tables look like, and the objects that we keep there.

mod catalog;
mod describe;
mod estimate;
mod generated;
mod inspect;
mod key;
mod leaves;
mod logged;
mod membership;
mod partitions;
mod publication;
mod room;
mod selection;
mod slot;

use millrace_config::{Code, Condition, Source};
use millrace_connect::postgres::{ConnectError, Dsn};
use millrace_event::Lsn;
use tokio_postgres::Client;

pub(crate) use catalog::together;
pub use catalog::{Harm, Inspected, Refused, SourceTable};
pub use describe::describe;
pub(crate) use describe::{
    SETTLING_MAX, describe_now, describe_selected, is_as_announced, settled,
};
pub use estimate::estimate_rows;
pub use inspect::inspect_tables;
pub(crate) use membership::locked_out;
pub use membership::{
    Alteration, Clause, Member, harmed_children, is_free, left_publication, parked_refused,
    published_tables, withdraw,
};
pub(crate) use partitions::partition_tree;
pub use publication::{
    PublicationChange, adopt_filters, check_names, check_options, find_publication,
    publication_change, publication_gone, publication_name, unlisted_column,
};
pub use room::room_for;
pub(crate) use selection::{renamed_column, unknown_columns};
pub use slot::{SlotState, drop_slot, find_slot, make_slot, slot_name, slot_precondition};

use crate::Error;

/// The oldest server that is supported: 14.
const VERSION_MIN: i32 = 140_000;

/// Where the source is. The secret is read now: it may have changed since this life began.
///
/// # Errors
/// [`Error::Refused`]: the secret cannot be read, or holds no URL.
pub(crate) fn dsn(source: &Source) -> Result<Dsn, Error> {
    let url = source.url.read()?;
    Ok(Dsn::parse(url.expose()).map_err(ConnectError::from)?)
}

/// What the source is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceFacts {
    /// As `server_version_num`: 150018.
    pub version: i32,
    /// The database.
    pub database: String,
    /// Whether it is a standby, where no heartbeat can be written.
    pub in_recovery: bool,
}

/// Reads what the source is, and checks what every capture needs.
///
/// # Errors
/// A precondition that does not hold, or the connection failed.
pub async fn inspect(client: &Client) -> Result<SourceFacts, Error> {
    let row = client
        .query_one(
            "SELECT current_setting('server_version_num')::int, current_setting('wal_level'), \
             current_setting('server_encoding'), current_database()::text, pg_is_in_recovery()",
            &[],
        )
        .await?;
    let (version, wal_level, encoding): (i32, String, String) =
        (row.get(0), row.get(1), row.get(2));
    if version < VERSION_MIN {
        return Err(Error::halt(Condition::new(
            Code::SourceVersion,
            format!("the source is Postgres {}", version / 10_000),
            "upgrade the source to Postgres 14 or later",
        )));
    }
    if wal_level != "logical" {
        return Err(Error::halt(Condition::new(
            Code::WalLevel,
            format!("the source's wal_level is {wal_level}"),
            "ALTER SYSTEM SET wal_level = 'logical'; then restart the source \
             (managed services have a switch for it, such as rds.logical_replication)",
        )));
    }
    // SQL_ASCII stores bytes of any encoding, so nothing says what they mean.
    if encoding == "SQL_ASCII" {
        return Err(Error::halt(Condition::new(
            Code::SourceEncoding,
            format!(
                "the database's encoding is {encoding}, which does not say what its bytes mean"
            ),
            "move the data to a database with encoding UTF8",
        )));
    }
    Ok(SourceFacts {
        version,
        database: row.get(3),
        in_recovery: row.get(4),
    })
}

/// The end of the WAL as the source stands: every commit that anyone saw complete lies below.
///
/// # Errors
/// The connection failed.
pub async fn wal_position(client: &Client) -> Result<Lsn, Error> {
    let row = client
        .query_one(
            "SELECT (CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() \
             ELSE pg_current_wal_insert_lsn() END)::text",
            &[],
        )
        .await?;
    lsn(&row.get::<_, String>(0))
}

/// Reads an LSN that the source printed.
fn lsn(text: &str) -> Result<Lsn, Error> {
    text.parse()
        .map_err(|error| Error::retry("the source printed an LSN that is none", error))
}
