//! Connections to Postgres and NATS, made from settings; and the clock, in the lowest crate that knows the world.
//!
//! Secrets are read at each connect, errors name the address that was tried, and neither errors nor `Debug` show
//! a password. Nothing here logs and nothing retries: the caller decides both.

pub mod clock;
#[cfg(feature = "nats")]
pub mod nats;
#[cfg(any(feature = "nats", feature = "postgres"))]
mod percent;
#[cfg(feature = "postgres")]
pub mod postgres;
pub mod tls;
