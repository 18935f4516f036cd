//! How long the reading thread lets the walsender get on between two reads. Pure.
//!
//! The walsender writes its messages one by one. If we waited for each, every row would cost both sides a wake-up,
//! which is more than the row itself. And while our receive buffer has room, each write of the walsender goes
//! through the whole network stack by itself; once the buffer is full, the writes gather on its side and come as
//! one. So a busy stream is left alone for milliseconds, and then read until nothing more is waiting.

use std::time::Duration;

/// The receive buffer where the source is near: Linux doubles it and keeps a part for itself. It bounds the rate to
/// about 24 KiB a round trip, so it is for short ones only.
pub(crate) const NEAR_RECEIVE_BUFFER_BYTES: u32 = 16 << 10;

/// Up to this round trip a source is near; the buffer above allows 80 MB/s then.
pub(crate) const NEAR_ROUND_TRIP_MAX: Duration = Duration::from_micros(300);

/// A stream that brought this many bytes for each microsecond of a long pause is busy: 10 MB/s.
const BUSY_BYTES_PER_MICROSECOND: u128 = 10;

/// When a pause brought so many bytes, the buffer of a near source was about full, and more may be waiting on the
/// other side.
const BACKLOG_BYTES: usize = 12 << 10;

/// The pause of a stream that is not busy, and between the reads of a backlog. An idle stream's first message has
/// been handed over by then.
const PAUSE_MIN: Duration = Duration::from_micros(100);

/// The longest pause of a busy stream. It is part of the delay of every change.
const PAUSE_MAX: Duration = Duration::from_millis(4);

/// The pauses, fitted to what the reads brought.
#[derive(Debug)]
pub(super) struct Pace {
    /// The long pause: it grows while the stream is busy.
    long: Duration,
    /// Whether the last pause was the long one.
    was_long: bool,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            long: PAUSE_MIN,
            was_long: false,
        }
    }
}

impl Pace {
    /// What to wait after a read of `bytes` that followed the last pause.
    pub(super) fn after(&mut self, bytes: usize) -> Option<Duration> {
        if bytes == 0 {
            return None;
        }
        if self.was_long {
            let busy = bytes as u128 >= self.long.as_micros() * BUSY_BYTES_PER_MICROSECOND
                || bytes >= BACKLOG_BYTES;
            self.long = match busy {
                true => (self.long * 3 / 2).min(PAUSE_MAX),
                false => (self.long / 2).max(PAUSE_MIN),
            };
        }
        // A long pause is followed by a short one, which tells whether everything has come.
        self.was_long = !self.was_long && bytes < BACKLOG_BYTES;
        Some(match self.was_long {
            true => self.long,
            false => PAUSE_MIN,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The pauses after `reads` reads of which each brings what a stream of this rate has sent meanwhile.
    fn pauses(bytes_per_microsecond: usize, reads: usize) -> Vec<Duration> {
        let mut pace = Pace::default();
        let mut pause = PAUSE_MIN;
        let mut next = || {
            let bytes = bytes_per_microsecond * pause.as_micros() as usize;
            pause = pace.after(bytes).unwrap_or_default();
            pause
        };
        (0..reads).map(|_| next()).collect()
    }

    #[test]
    fn nothing_read_is_nothing_to_wait_for() {
        assert_eq!(Pace::default().after(0), None);
    }

    #[test]
    fn a_trickle_is_read_after_the_shortest_pause() {
        assert!(pauses(3, 100).iter().all(|pause| *pause == PAUSE_MIN));
    }

    #[test]
    fn a_busy_stream_is_left_alone_every_other_time() {
        let pauses = pauses(20, 100);
        assert_eq!(pauses[98..].iter().max(), Some(&PAUSE_MAX));
        assert_eq!(pauses[98..].iter().min(), Some(&PAUSE_MIN));
    }

    #[test]
    fn a_backlog_is_read_without_a_long_pause() {
        assert!(pauses(200, 100).iter().all(|pause| *pause == PAUSE_MIN));
    }

    #[test]
    fn a_stream_that_calms_down_is_read_soon_again() {
        let mut pace = Pace::default();
        for _ in 0..100 {
            pace.after(BACKLOG_BYTES - 1);
        }
        for _ in 0..20 {
            pace.after(300);
        }
        assert_eq!(pace.after(300), Some(PAUSE_MIN));
        assert_eq!(pace.after(300), Some(PAUSE_MIN));
    }
}
