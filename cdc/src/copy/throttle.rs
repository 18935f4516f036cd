//! How many rows the next chunk has, and when it may be read. Pure: time is an argument.

use std::time::Duration;

/// Rows of the first chunk: nothing is known of them yet.
const ROWS_FIRST: u32 = 500;
/// The most rows of a chunk: what is read under one snapshot, and read again if it is refused.
const ROWS_MAX: u32 = 10_000;
/// How long reading a chunk's rows should take: so long the source keeps what its snapshot shows. What a chunk takes
/// however few rows it has comes on top.
const READ_GOAL: Duration = Duration::from_millis(500);
/// A chunk that takes too long has at least so many rows nevertheless: the time may not be theirs.
const ROWS_LEAST: u128 = 50;
/// The payload bytes of a chunk, which wait in memory until the reader of the WAL has passed its snapshot.
pub(super) const CHUNK_BYTES_MAX: usize = 8 * 1024 * 1024;
/// What part of that a chunk is planned for: rows differ, and one that is cut off costs a session.
const BYTES_PLANNED: u64 = CHUNK_BYTES_MAX as u64 / 2;

/// What reading a chunk took.
#[derive(Clone, Copy, Debug)]
pub(super) struct Taken {
    pub(super) rows: u64,
    pub(super) bytes: usize,
    pub(super) time: Duration,
}

/// One table's chunks.
#[derive(Debug)]
pub(super) struct Throttle {
    rows: u32,
    rows_per_second: Option<u32>,
    due: Duration,
    /// What the quickest chunk took. Of a source that is far most is spent on the way: fewer rows take as long.
    least: Option<Duration>,
}

impl Throttle {
    /// At most so many rows a second.
    pub(super) fn new(rows_per_second: Option<u32>) -> Self {
        Self {
            rows: ROWS_FIRST,
            rows_per_second,
            due: Duration::ZERO,
            least: None,
        }
    }

    /// How many rows the next chunk may have, at least one.
    pub(super) fn rows(&self) -> u32 {
        // Half a second's, so that the rate is one and not a burst and a pause.
        let rate = self.rows_per_second.map_or(ROWS_MAX, |rate| rate / 2);
        self.rows.min(rate).max(1)
    }

    /// When the next chunk may be read.
    pub(super) fn due(&self) -> Duration {
        self.due
    }

    /// A chunk was read, and published at `now`.
    pub(super) fn read(&mut self, taken: Taken, now: Duration) {
        if let Some(rate) = self.rows_per_second {
            // What was not used is not saved up.
            let from = self.due.max(now.saturating_sub(taken.time));
            self.due = from + Duration::from_secs(taken.rows) / rate.max(1);
        }
        if taken.rows == 0 {
            return;
        }
        let bytes_each = (taken.bytes as u64 / taken.rows).max(1);
        let by_bytes = BYTES_PLANNED / bytes_each;
        let for_rows = taken.time.saturating_sub(self.least.unwrap_or_default());
        let least = self.least.map_or(taken.time, |least| least.min(taken.time));
        self.least = Some(least);
        let nanos_each = (for_rows.as_nanos() / u128::from(taken.rows)).max(1);
        let by_time = (READ_GOAL.as_nanos() / nanos_each).max(ROWS_LEAST);
        // Not more than twice as many: a small chunk says little.
        let most = u64::from(self.rows()).saturating_mul(2);
        let next = by_bytes
            .min(u64::try_from(by_time).unwrap_or(u64::MAX))
            .min(most);
        self.rows = u32::try_from(next).unwrap_or(ROWS_MAX).clamp(1, ROWS_MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(rows: u64, bytes: usize, millis: u64) -> Taken {
        Taken {
            rows,
            bytes,
            time: Duration::from_millis(millis),
        }
    }

    #[test]
    fn chunks_grow_to_their_limit_and_no_further() {
        let mut throttle = Throttle::new(None);
        let mut sizes = Vec::new();
        for _ in 0..7 {
            sizes.push(throttle.rows());
            throttle.read(
                taken(u64::from(throttle.rows()), 50_000, 10),
                Duration::ZERO,
            );
        }
        assert_eq!(sizes, [500, 1_000, 2_000, 4_000, 8_000, 10_000, 10_000]);
        assert_eq!(throttle.due(), Duration::ZERO);
    }

    #[test]
    fn chunks_shrink_with_slow_and_with_large_rows() {
        let mut throttle = Throttle::new(None);
        throttle.read(taken(500, 50_000, 5_000), Duration::ZERO);
        assert_eq!(throttle.rows(), 50);
        let mut throttle = Throttle::new(None);
        throttle.read(taken(8, CHUNK_BYTES_MAX, 100), Duration::ZERO);
        assert_eq!(throttle.rows(), 4);
        throttle.read(taken(1, CHUNK_BYTES_MAX * 8, 100), Duration::ZERO);
        assert_eq!(throttle.rows(), 1);
        throttle.read(taken(0, 0, 60_000), Duration::ZERO);
        assert_eq!(throttle.rows(), 1);
    }

    /// How many rows chunks have, and how long they take, if each takes `fixed` and each of its rows `micros_each`.
    fn chunks(
        throttle: &mut Throttle,
        count: usize,
        fixed: u64,
        micros_each: u64,
    ) -> Vec<(u32, u64)> {
        let chunk = |_| {
            let rows = throttle.rows();
            let millis = fixed + u64::from(rows) * micros_each / 1_000;
            throttle.read(taken(rows.into(), 50_000, millis), Duration::ZERO);
            (rows, millis)
        };
        (0..count).map(chunk).collect()
    }

    #[test]
    fn a_source_that_is_far_is_no_reason_for_small_chunks() {
        let mut throttle = Throttle::new(None);
        let sizes = chunks(&mut throttle, 12, 2_000, 10);
        assert!(sizes.iter().all(|(rows, _)| *rows >= 100), "{sizes:?}");
        assert_eq!(throttle.rows(), ROWS_MAX, "{sizes:?}");
        // Where it becomes far on the way, they stay large enough to come to an end.
        let mut throttle = Throttle::new(None);
        chunks(&mut throttle, 8, 5, 10);
        let sizes = chunks(&mut throttle, 20, 2_000, 10);
        assert!(sizes.iter().all(|(rows, _)| *rows >= 50), "{sizes:?}");
    }

    #[test]
    fn slow_rows_take_no_longer_for_all_that() {
        let mut throttle = Throttle::new(None);
        chunks(&mut throttle, 1, 0, 10_000);
        let sizes = chunks(&mut throttle, 20, 0, 10_000);
        assert!(
            sizes.iter().all(|(_, millis)| *millis <= 1_000),
            "{sizes:?}"
        );
    }

    #[test]
    fn a_rate_is_kept_over_time_and_not_saved_up() {
        let mut throttle = Throttle::new(Some(100));
        let mut now = Duration::from_secs(1);
        let mut rows = 0;
        while now < Duration::from_secs(11) {
            now = now.max(throttle.due());
            let chunk = u64::from(throttle.rows());
            assert!(chunk <= 50);
            rows += chunk;
            now += Duration::from_millis(30);
            throttle.read(taken(chunk, 1_000, 30), now);
        }
        assert!((950..=1_100).contains(&rows), "{rows}");
        // A sink that kept it waiting for a minute gets no minute's rows at once.
        now += Duration::from_secs(60);
        throttle.read(taken(50, 1_000, 30), now);
        assert!(throttle.due() >= now + Duration::from_millis(400));
    }

    #[test]
    fn the_lowest_rate_is_a_row_a_second() {
        for rate in [0, 1] {
            let mut throttle = Throttle::new(Some(rate));
            assert_eq!(throttle.rows(), 1);
            throttle.read(taken(1, 100, 0), Duration::from_secs(5));
            assert_eq!(throttle.due(), Duration::from_secs(6));
        }
    }
}
