//! The laboratory: throwaway Postgres and NATS servers, a TCP fault proxy, the product as a child
//! process, traffic, and the comparison that decides whether a replica equals its source.
//!
//! Used by `millrace demo`, `millrace bench` and the tests. It never links the product: it starts
//! the binary it is given and looks only at servers, files and exit codes.

mod compare;
mod error;
mod folder;
mod nats;
mod pipeline;
mod place;
mod postgres;
mod process;
mod proxy;
pub mod shop;
mod traffic;

pub use compare::{Compared, Comparison, compare, every_table};
pub use error::LabError;
pub use folder::{ConfigDir, ConfigFolder};
pub use nats::{Nats, NatsOptions, Operator};
pub use pipeline::Pipeline;
pub use place::Place;
pub use postgres::{Postgres, PostgresOptions};
pub use proxy::Proxy;
pub use traffic::{Traffic, TrafficReport};
