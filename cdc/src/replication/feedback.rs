//! When to report to the walsender, and what. Pure: time is an argument.

use std::time::{Duration, Instant};

use bytes::{BufMut, BytesMut};
use millrace_event::Lsn;

use super::framing::POSTGRES_EPOCH_US;

/// The longest time between two reports.
const INTERVAL_MAX: Duration = Duration::from_secs(10);

/// The shortest time between two reports that only carry a new confirmed LSN.
const CONFIRM_INTERVAL_MIN: Duration = Duration::from_millis(100);

/// A report as CopyData: tag, length, and 34 bytes.
const REPORT_BYTES: u32 = 4 + 34;

/// The state of our reports to one walsender.
#[derive(Debug)]
pub(super) struct Feedback {
    interval: Duration,
    reported_at: Instant,
    reported: Lsn,
    received: Lsn,
    reply_requested: bool,
}

impl Feedback {
    /// Reports for a server with this `wal_sender_timeout` (`None`: it has none).
    pub(super) fn new(now: Instant, sender_timeout: Option<Duration>) -> Self {
        let third = sender_timeout.map_or(INTERVAL_MAX, |timeout| timeout / 3);
        Self {
            interval: third.min(INTERVAL_MAX),
            reported_at: now,
            reported: Lsn::ZERO,
            received: Lsn::ZERO,
            reply_requested: false,
        }
    }

    /// Takes in a keepalive: everything below `wal_end` was sent.
    pub(super) fn keepalive(&mut self, wal_end: Lsn, reply_requested: bool) {
        self.received = self.received.max(wal_end);
        self.reply_requested |= reply_requested;
    }

    /// When the next report is due; a time that has passed means now.
    pub(super) fn due(&self, confirmed: Lsn) -> Instant {
        if self.reply_requested {
            self.reported_at
        } else if confirmed > self.reported {
            self.reported_at + CONFIRM_INTERVAL_MIN.min(self.interval)
        } else {
            self.reported_at + self.interval
        }
    }

    /// Writes a report to `out`. Flush and apply are the confirmed LSN and nothing else: they alone let the
    /// slot forget. An LSN of zero says nothing to the server.
    pub(super) fn report(
        &mut self,
        now: Instant,
        confirmed: Lsn,
        unix_us: i64,
        out: &mut BytesMut,
    ) {
        self.reported_at = now;
        self.reported = confirmed;
        self.reply_requested = false;
        out.put_u8(b'd');
        out.put_u32(REPORT_BYTES);
        out.put_u8(b'r');
        out.put_u64(self.received.max(confirmed).0);
        out.put_u64(confirmed.0);
        out.put_u64(confirmed.0);
        out.put_i64(unix_us.saturating_sub(POSTGRES_EPOCH_US));
        out.put_u8(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_are_due_by_time_by_request_and_by_progress() {
        let start = Instant::now();
        let mut feedback = Feedback::new(start, Some(Duration::from_secs(6)));
        let mut out = BytesMut::new();
        assert_eq!(feedback.due(Lsn::ZERO), start + Duration::from_secs(2));
        assert_eq!(feedback.due(Lsn(1)), start + CONFIRM_INTERVAL_MIN);
        feedback.keepalive(Lsn(9), false);
        assert_eq!(feedback.due(Lsn::ZERO), start + Duration::from_secs(2));
        feedback.keepalive(Lsn(7), true);
        assert_eq!(feedback.due(Lsn::ZERO), start);
        let later = start + Duration::from_secs(1);
        feedback.report(later, Lsn(5), POSTGRES_EPOCH_US + 3, &mut out);
        assert_eq!(feedback.due(Lsn(5)), later + Duration::from_secs(2));
        let mut expected = vec![b'd', 0, 0, 0, 38, b'r'];
        for number in [9_u64, 5, 5, 3] {
            expected.extend(number.to_be_bytes());
        }
        expected.push(0);
        assert_eq!(out.as_ref(), expected);
    }

    #[test]
    fn a_server_without_a_timeout_still_hears_from_us() {
        let start = Instant::now();
        for timeout in [None, Some(Duration::from_secs(3600))] {
            assert_eq!(
                Feedback::new(start, timeout).due(Lsn::ZERO),
                start + INTERVAL_MAX
            );
        }
    }
}
