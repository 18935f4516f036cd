//! Our own replication connection: the `replication=database` session, and the thread that reads its WAL.
//!
//! One thread owns the socket for the connection's whole life, from the dial on, so that the reader never
//! shares a reactor with the rest of the program. [`ReplicationConnection`] sends it commands; after
//! [`ReplicationConnection::start`] it only reads WAL and reports what is confirmed.

mod auth;
mod command;
mod connection;
mod error;
mod feedback;
mod framing;
mod pace;
mod reader;
mod session;
mod wal;

pub use command::{CreatedSlot, SlotKind, Snapshot, StartOptions, SystemIdentity};
pub use connection::ReplicationConnection;
pub use error::{AuthError, ServerError, WalError};
pub use framing::{Frame, FramingError, WalBatch};
pub(crate) use pace::{NEAR_RECEIVE_BUFFER_BYTES, NEAR_ROUND_TRIP_MAX};
pub use wal::{WalHandle, WalReader, WalStats};
