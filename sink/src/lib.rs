//! JetStream to databases: folds the stream's changes into batches and applies them under the version guard.
//!
//! A delivery's changes go through [`worker::Worker`], which collects whole source transactions and folds them
//! ([`fold`]) into a [`batch::Batch`]; a [`sink::Sink`] applies it in one target transaction together with its
//! checkpoint. [`run`] carries deliveries to the machine and batches to the target.

mod beside;
mod copy;
mod error;
mod evolution;
mod failures;
mod life;
mod meters;
mod refit;
mod registration;
mod rejoin;
mod run;
mod schedule;
mod status;
mod upkeep;
mod waiting;

pub mod asking;
pub mod batch;
pub mod catching;
#[cfg(feature = "conformance")]
pub mod conformance;
pub mod copying;
pub mod fold;
pub mod guard;
pub mod late;
pub mod load;
pub mod memory;
pub mod postgres;
pub mod progress;
pub mod row;
pub mod sink;
pub mod sql;
pub mod worker;

pub use error::Error;
pub use run::run;
pub use status::{Snapshot, Status};
