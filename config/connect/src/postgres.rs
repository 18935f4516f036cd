//! Connections to Postgres.

mod dial;
mod dsn;
mod error;
mod keywords;
mod login;
mod stream;

pub use dial::{Attempt, Dialed, dial, dial_with};
pub use dsn::{Dsn, DsnError, SslMode};
pub use error::ConnectError;
pub use login::{PINNED, Session, connect, pinned_options};
pub use stream::MaybeTlsStream;
