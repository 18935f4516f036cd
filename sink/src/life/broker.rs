//! The client's connection to the broker: short breaks are its own to mend, long ones end the life.
//!
//! A client connects again with the secrets it was made with. If the broker was given others it never gets in, and
//! nobody would be told: nothing is delivered, as if nothing happened at the source. The next life reads them anew.

use std::time::Duration;

use async_nats::Client;
use async_nats::connection::State;
use tokio::time::Instant;

use crate::error::Error;

/// So long the client may try by itself.
const BREAK_MAX: Duration = Duration::from_secs(5);

/// A connection and how long it is broken.
pub(super) struct Broker {
    client: Client,
    broken: Broken,
}

impl Broker {
    pub(super) fn new(client: Client) -> Self {
        Self {
            client,
            broken: Broken::default(),
        }
    }

    /// Looks at the connection, as often as one likes.
    pub(super) fn look(&mut self, now: Instant) -> Result<(), Error> {
        let is_connected = self.client.connection_state() == State::Connected;
        match self.broken.is_long(is_connected, now) {
            true => Err(Error::retry_because("the connection to NATS is broken")),
            false => Ok(()),
        }
    }
}

/// Since when there is no connection.
#[derive(Debug, Default)]
struct Broken(Option<Instant>);

impl Broken {
    fn is_long(&mut self, is_connected: bool, now: Instant) -> bool {
        if is_connected {
            self.0 = None;
            return false;
        }
        now - *self.0.get_or_insert(now) >= BREAK_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_break_is_long_if_nothing_mends_it() {
        let mut broken = Broken::default();
        let at = Instant::now();
        assert!(!broken.is_long(true, at));
        assert!(!broken.is_long(false, at));
        assert!(!broken.is_long(true, at + BREAK_MAX));
        assert!(!broken.is_long(false, at + BREAK_MAX));
        assert!(!broken.is_long(false, at + BREAK_MAX * 3 / 2));
        assert!(broken.is_long(false, at + BREAK_MAX * 2));
    }
}
