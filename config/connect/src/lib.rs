//! Connections to Postgres and NATS, made from settings.
//!
//! Secrets are read at each connect, errors name the address that was tried, and neither errors nor `Debug` show
//! a password. Nothing here logs and nothing retries: the caller decides both.

#[cfg(feature = "nats")]
pub mod nats;
#[cfg(any(feature = "nats", feature = "postgres"))]
mod percent;
#[cfg(feature = "postgres")]
pub mod postgres;
pub mod tls;
