//! Where and when a message was stored, as the reply subject of its delivery says. Pure.

use std::time::{Duration, SystemTime};

/// What the subject begins with.
const PREFIX: &str = "$JS.ACK.";

/// Dots behind it that are looked at: where more follow, they are behind what is needed.
const DOTS: usize = 9;

/// What a reader needs of a delivery's reply subject. The client's own parser takes the whole of it apart, for each
/// message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stored {
    /// The message's sequence in the stream.
    pub(crate) stream_seq: u64,
    /// Its number among those that the consumer was sent, from 1.
    pub(crate) consumer_seq: u64,
    /// When, by the server's clock.
    pub(crate) at: SystemTime,
}

impl Stored {
    /// Reads `$JS.ACK.<stream>.<consumer>.<deliveries>.<stream_seq>.<consumer_seq>.<nanoseconds>.<pending>`; newer
    /// servers write `<domain>.<account>.` before the stream, and may write more at the end.
    #[must_use]
    pub(crate) fn parse(reply: &str) -> Option<Self> {
        let tokens = reply.strip_prefix(PREFIX)?;
        let mut dots = [tokens.len(); DOTS];
        let mut found = 0;
        for (dot, at) in dots
            .iter_mut()
            .zip(memchr::memchr_iter(b'.', tokens.as_bytes()))
        {
            *dot = at;
            found += 1;
        }
        let first = match found {
            6 => 3,
            8.. => 5,
            _ => return None,
        };
        let number = |token: usize| {
            let digits = tokens.get(dots[token - 1] + 1..dots[token]);
            digits?.parse::<u64>().ok()
        };
        let (stream_seq, consumer_seq) = (number(first)?, number(first + 1)?);
        let nanoseconds = number(first + 2)?;
        Some(Self {
            stream_seq,
            consumer_seq,
            at: SystemTime::UNIX_EPOCH + Duration::from_nanos(nanoseconds),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subjects_of_all_servers_are_read() {
        let stored = Stored {
            stream_seq: 20,
            consumer_seq: 21,
            at: SystemTime::UNIX_EPOCH + Duration::from_nanos(1_700_000_000_123_456_789),
        };
        for reply in [
            "$JS.ACK.CDC_s.c.1.20.21.1700000000123456789.5",
            "$JS.ACK._.hash.CDC_s.c.1.20.21.1700000000123456789.5",
            "$JS.ACK.hub.hash.CDC_s.c.1.20.21.1700000000123456789.5.random",
            "$JS.ACK.hub.hash.CDC_s.c.1.20.21.1700000000123456789.5.random.more",
        ] {
            assert_eq!(Stored::parse(reply), Some(stored), "{reply}");
        }
    }

    #[test]
    fn what_is_no_such_subject_is_refused() {
        for reply in [
            "",
            "_INBOX.x",
            "$JS.ACK.CDC_s.c.1.20.21.1700000000123456789",
            "$JS.ACK.x.CDC_s.c.1.20.21.1700000000123456789.5",
            "$JS.ACK.CDC_s.c.1.x.21.1700000000123456789.5",
            "$JS.ACK.CDC_s.c.1.20.21.-1.5",
        ] {
            assert_eq!(Stored::parse(reply), None, "{reply}");
        }
    }
}
