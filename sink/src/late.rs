//! Whether a sink is so far behind that its stream comes before everything else: freshness goes before completeness.
//! Pure.

/// A sink that is further behind than this, microseconds, follows its stream and does nothing beside it.
pub const LAG_MAX_US: i64 = 30_000_000;

/// Whether a sink is late whose newest change is of `source_ts_us`, both in microseconds since 1970. A sink that has
/// no change yet (0) is not.
#[must_use]
pub fn is_late(source_ts_us: i64, now_us: i64) -> bool {
    source_ts_us != 0 && now_us.saturating_sub(source_ts_us) > LAG_MAX_US
}

/// Whether rows beside the stream may be asked for and applied now. A sink that has `drained` its stream can do nothing
/// about its age.
pub(crate) fn may_run_beside(source_ts_us: i64, now_us: i64, drained: bool) -> bool {
    drained || !is_late(source_ts_us, now_us)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW_US: i64 = 1_800_000_000_000_000;

    #[test]
    fn a_sink_is_late_behind_the_bound() {
        assert!(!is_late(NOW_US - LAG_MAX_US, NOW_US));
        assert!(is_late(NOW_US - LAG_MAX_US - 1, NOW_US));
        // The source's clock may be ahead.
        assert!(!is_late(NOW_US + LAG_MAX_US * 2, NOW_US));
        // Nothing was applied yet.
        assert!(!is_late(0, NOW_US));
    }

    #[test]
    fn what_is_beside_a_late_stream_waits_until_it_is_drained() {
        let late = NOW_US - LAG_MAX_US - 1;
        assert!(!may_run_beside(late, NOW_US, false));
        assert!(may_run_beside(late, NOW_US, true));
        for near in [0, NOW_US, NOW_US - LAG_MAX_US] {
            assert!(may_run_beside(near, NOW_US, false), "{near}");
        }
    }
}
