//! Why a sink does nothing beside its stream for now. Pure.

use millrace_sink::late::is_late;

use super::super::status::SinkSeen;

/// No process holds the sink.
pub(super) const STOPPED: &str = "no process runs the sink now";

/// Its stream comes first.
pub(super) const LATE: &str =
    "the sink is more than 30 s behind the source: its stream comes first";

/// Whether no process holds a sink.
pub(super) fn is_stopped(seen: &SinkSeen) -> bool {
    seen.part.state == "stopped"
}

/// Why a sink does nothing beside its stream, whose newest message is `last_seq`; `None`: that is not known. As the
/// sink decides it: one that has everything can do nothing about its age, which a rare heartbeat alone makes.
pub(super) fn held(seen: &SinkSeen, last_seq: Option<u64>, now_us: i64) -> Option<&'static str> {
    if is_stopped(seen) {
        return Some(STOPPED);
    }
    let at = seen.row.as_ref()?.checkpoint;
    let drained = last_seq.is_some_and(|last_seq| at.stream_seq >= last_seq);
    (!drained && is_late(at.source_ts_us, now_us)).then_some(LATE)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use millrace_sink::batch::PositionRow;
    use millrace_sink::late::LAG_MAX_US;

    use super::*;
    use crate::admin::LivePart;

    const NOW_US: i64 = 1_800_000_000_000_000;

    fn seen(state: &str, stream_seq: u64, source_ts_us: i64) -> SinkSeen {
        let mut row = PositionRow::default();
        row.checkpoint.stream_seq = stream_seq;
        row.checkpoint.source_ts_us = source_ts_us;
        SinkSeen {
            part: LivePart::of(state),
            row: Some(row),
            dead_letters: BTreeMap::new(),
        }
    }

    #[test]
    fn a_late_sink_is_held_until_it_has_everything() {
        let late_us = NOW_US - LAG_MAX_US - 1;
        let late = seen("streaming", 7, late_us);
        assert_eq!(held(&late, Some(8), NOW_US), Some(LATE));
        assert_eq!(held(&late, None, NOW_US), Some(LATE));
        assert_eq!(held(&late, Some(7), NOW_US), None);
        let near = seen("streaming", 7, NOW_US);
        assert_eq!(held(&near, Some(8), NOW_US), None);
        let stopped = seen("stopped", 7, late_us);
        assert_eq!(held(&stopped, Some(7), NOW_US), Some(STOPPED));
        let new = SinkSeen {
            row: None,
            ..seen("new", 0, 0)
        };
        assert_eq!(held(&new, Some(8), NOW_US), None);
    }
}
