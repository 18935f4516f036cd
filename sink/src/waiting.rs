//! How soon a sink looks again whether capture has done what it waits for.
//!
//! Each look is a life of the sink: a login and a write at the target, a login at the broker. The first looks come
//! quickly, because sink and capture are often started together. Pure.

use std::time::Duration;

/// The pause after the first look; each time it takes twice as long.
const LOOK_FIRST: Duration = Duration::from_millis(5);
/// The longest pause between two looks at first.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);
/// Who has waited for so long waits for a capture that does not run, and says so.
const LONG: Duration = Duration::from_secs(10);
/// The pause between two looks then.
const LOOK_INTERVAL_LONG: Duration = Duration::from_secs(3);

/// What a sink waits for.
#[derive(Debug, Default)]
pub(crate) struct Waiting {
    /// What capture has not done yet, and since when it is waited for.
    what: Option<(String, Duration)>,
    pause: Duration,
}

/// What a sink does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Look {
    /// It looks again after this.
    pub(crate) pause: Duration,
    /// It has not waited for this before.
    pub(crate) is_new: bool,
    /// It has waited for long.
    pub(crate) is_long: bool,
}

impl Waiting {
    /// A life of the sink that began at `began` found at `now` that capture has not done `what`.
    pub(crate) fn look(&mut self, what: &str, began: Duration, now: Duration) -> Look {
        // One that went on for a while had what it needed, and waits anew.
        let anew = now.saturating_sub(began) >= LONG;
        let known = self.what.take().filter(|(known, _)| known == what && !anew);
        let is_new = known.is_none();
        let (what, since) = known.unwrap_or_else(|| (what.to_owned(), now));
        self.what = Some((what, since));
        let is_long = now.saturating_sub(since) >= LONG;
        self.pause = match (is_new, is_long) {
            (true, _) => LOOK_FIRST,
            (false, true) => LOOK_INTERVAL_LONG,
            (false, false) => (self.pause * 2).min(LOOK_INTERVAL),
        };
        Look {
            pause: self.pause,
            is_new,
            is_long,
        }
    }

    /// The sink failed otherwise: what it waits for next it waits for anew.
    pub(crate) fn ended(&mut self) {
        self.what = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &str = "begin stream CDC_shop";

    fn secs(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// Looks from `at` on until `end`, each after the pause of the one before.
    fn looks(waiting: &mut Waiting, what: &str, mut at: Duration, end: Duration) -> Vec<Look> {
        let mut looks = Vec::new();
        while at < end {
            let look = waiting.look(what, at, at);
            at += look.pause;
            looks.push(look);
        }
        looks
    }

    #[test]
    fn the_first_seconds_are_quick_and_then_a_look_comes_every_few_seconds() {
        let mut waiting = Waiting::default();
        let first = looks(&mut waiting, STREAM, secs(0), secs(10));
        assert!(first[0].is_new && first[0].pause == LOOK_FIRST);
        let quick = |look: &Look| !look.is_new && !look.is_long && look.pause <= LOOK_INTERVAL;
        assert!(first[1..].iter().all(quick), "{first:?}");
        assert!(first.len() > 40, "{}", first.len());
        let minute = looks(&mut waiting, STREAM, secs(11), secs(71));
        assert!(
            minute.iter().all(|look| look.is_long && !look.is_new),
            "{minute:?}"
        );
        assert_eq!(minute.len(), 20);
    }

    #[test]
    fn another_wait_begins_anew() {
        let quick = Look {
            pause: LOOK_FIRST,
            is_new: true,
            is_long: false,
        };
        let mut waiting = Waiting::default();
        looks(&mut waiting, STREAM, secs(0), secs(60));
        // Something else.
        let table = "describe table public.t";
        assert_eq!(waiting.look(table, secs(60), secs(60)), quick);
        looks(&mut waiting, table, secs(60), secs(120));
        // The same again after a life that streamed for an hour.
        assert_eq!(waiting.look(table, secs(120), secs(3720)), quick);
        looks(&mut waiting, table, secs(3720), secs(3780));
        // Or after one that failed.
        waiting.ended();
        assert_eq!(waiting.look(table, secs(3780), secs(3780)), quick);
    }
}
