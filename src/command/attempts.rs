//! How soon a server that was not there is tried again, and how often that is told. Pure.

use std::time::Duration;

use millrace_config::Backoff;

/// The first wait is short, because servers are often started together; the longest is one that nobody minds.
const BACKOFF: Backoff = Backoff {
    first: Duration::from_millis(200),
    max: Duration::from_secs(4),
};

/// The same reason is told again after this, then after twice as long, and so on.
const TELL_AGAIN_FIRST: Duration = Duration::from_secs(10);
/// The longest time between two times that it is told.
const TELL_AGAIN_MAX: Duration = Duration::from_secs(600);

/// Attempts to reach a server, none of which has succeeded.
#[derive(Debug, Default)]
pub(super) struct Attempts {
    failures: u32,
    /// Why the last one failed that was told, and when it is told again.
    told: Option<Told>,
}

#[derive(Debug)]
struct Told {
    reason: String,
    /// How long after the last time.
    interval: Duration,
    /// When, by the clock of the attempts.
    again: Duration,
}

/// What follows a failed attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Failed {
    /// Whether the reason is told now.
    pub(super) tell: bool,
    /// The wait before the next attempt.
    pub(super) pause: Duration,
}

impl Attempts {
    /// An attempt failed at `now`, on a clock that only goes forward.
    pub(super) fn failed(&mut self, reason: &str, now: Duration) -> Failed {
        self.failures = self.failures.saturating_add(1);
        let interval = match &self.told {
            Some(told) if told.reason == reason && now < told.again => None,
            Some(told) if told.reason == reason => Some((told.interval * 2).min(TELL_AGAIN_MAX)),
            _ => Some(TELL_AGAIN_FIRST),
        };
        if let Some(interval) = interval {
            self.told = Some(Told {
                reason: reason.to_owned(),
                interval,
                again: now + interval,
            });
        }
        Failed {
            tell: interval.is_some(),
            // One command: there are no others that it should not meet.
            pause: BACKOFF.delay(self.failures, 1.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// When these attempts are told until `end`, in seconds, each made after the pause of the one before.
    fn told(attempts: &mut Attempts, reason: &str, mut now: Duration, end: Duration) -> Vec<u64> {
        let mut told = Vec::new();
        while now < end {
            let failed = attempts.failed(reason, now);
            if failed.tell {
                told.push(now.as_secs());
            }
            now += failed.pause;
        }
        told
    }

    #[test]
    fn the_same_reason_is_told_at_growing_intervals() {
        let mut attempts = Attempts::default();
        let (begin, end) = (Duration::ZERO, Duration::from_secs(3_000));
        let times = told(&mut attempts, "no route", begin, end);
        let between: Vec<_> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert_eq!(times[0], 0);
        let expected = [10, 20, 40, 80, 160, 320, 600, 600, 600];
        for (found, expected) in between.iter().zip(expected) {
            assert!((expected..=expected + 4).contains(found), "{between:?}");
        }
    }

    #[test]
    fn another_reason_is_told_at_once() {
        let mut attempts = Attempts::default();
        let now = Duration::from_secs(1);
        assert!(attempts.failed("no route", now).tell);
        assert!(!attempts.failed("no route", now).tell);
        assert!(attempts.failed("starting up", now).tell);
        assert!(!attempts.failed("starting up", now).tell);
    }

    #[test]
    fn pauses_grow_to_a_few_seconds() {
        let mut attempts = Attempts::default();
        let pauses = (0..7).map(|_| attempts.failed("no route", Duration::ZERO).pause);
        let pauses: Vec<_> = pauses.map(|pause| pause.as_millis()).collect();
        assert_eq!(pauses, [200, 400, 800, 1_600, 3_200, 4_000, 4_000]);
    }
}
