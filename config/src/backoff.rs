//! How long to wait before the next attempt.

use std::time::Duration;

use crate::limits::{BACKOFF_FIRST, BACKOFF_MAX};

/// A retry policy: doubling waits with jitter, without an end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    /// The longest wait after the first failure.
    pub first: Duration,
    /// The longest wait of all.
    pub max: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self {
            first: BACKOFF_FIRST,
            max: BACKOFF_MAX,
        }
    }
}

impl Backoff {
    /// The wait before attempt `attempt + 1`, where `attempt` failures in a row came before (from 1; 0 waits
    /// nothing). `jitter` is a random number in `0..1`: the wait is between half the full step and the step.
    #[must_use]
    pub fn delay(self, attempt: u32, jitter: f64) -> Duration {
        if attempt == 0 {
            return Duration::ZERO;
        }
        let doubled = 1_u32.checked_shl(attempt - 1).unwrap_or(u32::MAX);
        let step = self
            .first
            .checked_mul(doubled)
            .unwrap_or(self.max)
            .min(self.max);
        let jitter = if jitter.is_finite() {
            jitter.clamp(0.0, 1.0)
        } else {
            1.0
        };
        step.mul_f64(0.5 + jitter / 2.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_the_limit_and_jitter_takes_at_most_half() {
        let backoff = Backoff::default();
        let full: Vec<_> = (0..10).map(|n| backoff.delay(n, 1.0).as_millis()).collect();
        assert_eq!(
            full,
            [0, 200, 400, 800, 1600, 3200, 6400, 12800, 25600, 30000]
        );
        assert_eq!(backoff.delay(3, 0.0), Duration::from_millis(400));
        assert_eq!(backoff.delay(u32::MAX, 1.0), BACKOFF_MAX);
        assert_eq!(backoff.delay(1, f64::NAN), BACKOFF_FIRST);
    }
}
