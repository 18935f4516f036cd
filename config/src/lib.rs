//! What an operator writes and what an operator reads: settings, limits, conditions and states.
//!
//! No sockets and no clock. Files and environment variables are read in two places only: [`Config::load`] and
//! [`Secret::read`].

mod backoff;
mod chain;
mod code;
mod error;
mod fault;
pub mod limits;
mod load;
mod place;
mod reader;
mod report;
mod secret;
mod settings;
mod state;
mod stored;
mod unbuilt;

pub use backoff::Backoff;
pub use chain::chain;
pub use code::{Code, Condition, UnknownCode};
pub use error::{ConfigError, ConfigErrors};
pub use fault::Fault;
pub use place::Place;
pub use secret::{Revealed, Secret, SecretError};
pub use settings::{
    Admin, Auth, Batch, Columns, Config, Confirm, Create, Filter, Guard, Log, LogFormat, LogLevel,
    Mask, Mode, OnDelete, OnRowError, OnSchemaChange, OnTruncate, Origin, Retention, ServerUrl,
    Sink, SinkType, Source, Stream, SyncInterval, Table,
};
pub use state::{Exit, State};
pub use stored::understood;
