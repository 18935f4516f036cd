//! Capture: from a Postgres source's write-ahead log to a JetStream stream.
//!
//! A frame of the replication connection is read as a [`pgoutput`] message, becomes a change with a version
//! ([`capture`]), a message with a subject ([`assemble`]), and is published ([`publish`]). Acknowledgements
//! move the [`frontier`], and that is what the slot may forget. [`capture::Capture`] is the machine in the
//! middle; [`run`] carries bytes to it and away from it.

mod birth;
mod check;
mod commits;
mod copy;
mod error;
mod heartbeat;
mod identity;
mod left_out;
mod life;
mod named;
mod orders;
mod relation;
mod retention;
mod run;
mod schemas;
mod seen;
mod settled;
mod status;
mod tuple;
mod watch;

pub mod assemble;
pub mod capture;
pub mod frontier;
pub mod pgoutput;
pub mod publish;
pub mod replication;
pub mod selection;
pub mod source;
pub mod stream;

pub use check::check;
pub use commits::Committed;
pub use copy::rule;
pub use error::Error;
pub use identity::published::{Captured, captured};
pub use millrace_config::understood;
pub use relation::{RelationError, SubjectId};
pub use run::run;
pub use status::{CopyTrouble, Status};
