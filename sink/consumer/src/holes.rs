//! The holes of a stream that a reader of some tables has yet to judge. Pure.
//!
//! The sequences of such a reader have holes by nature, so what the stream lost in its middle shows in nothing that it
//! receives. The stream's own count shows it: how many sequences between its oldest message and its end have none.

/// Sequences without a message that are listed at most, at 8 bytes each. Of a stream with more, nothing is proven.
pub(crate) const LISTED_MAX: u64 = 1_000_000;

/// Sequences without a message, from the one to the other, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Hole {
    pub(crate) first: u64,
    pub(crate) last: u64,
}

/// The holes that were listed, and up to where they are judged.
#[derive(Debug)]
pub(crate) struct Holes {
    /// Rising.
    listed: Vec<Hole>,
    judged: u64,
}

impl Holes {
    /// Of a reader that goes on behind this sequence: what lies before it was judged when the place was found.
    pub(crate) fn after(stream_seq: u64) -> Self {
        Self {
            listed: Vec::new(),
            judged: stream_seq,
        }
    }

    /// Whether those that were listed are all that a stream has which begins with `first` and lacks `count` messages.
    pub(crate) fn are_all(&self, first: u64, count: u64) -> bool {
        let behind = self.listed.iter().filter(|hole| hole.first > first);
        let known: u64 = behind.map(|hole| hole.last - hole.first + 1).sum();
        known == count
    }

    /// Takes in the sequences without a message, in any order.
    pub(crate) fn list(&mut self, mut sequences: Vec<u64>) {
        sequences.sort_unstable();
        self.listed.clear();
        for sequence in sequences {
            match self.listed.last_mut() {
                Some(hole) if hole.last + 1 >= sequence => hole.last = sequence,
                _ => self.listed.push(Hole {
                    first: sequence,
                    last: sequence,
                }),
            }
        }
    }

    /// The holes that lie before `newest` and are not judged, the oldest first.
    pub(crate) fn before(&self, newest: u64) -> Vec<Hole> {
        let open = |hole: &&Hole| hole.last > self.judged && hole.last < newest;
        self.listed.iter().filter(open).copied().collect()
    }

    /// The first sequence of which nothing is known.
    pub(crate) fn first_unjudged(&self) -> u64 {
        self.judged + 1
    }

    /// Whatever lies before `newest` is judged.
    pub(crate) fn judged(&mut self, newest: u64) {
        self.judged = self.judged.max(newest);
    }

    /// The sequence before one, over holes.
    pub(crate) fn step_back(&self, stream_seq: u64) -> u64 {
        let before = stream_seq.saturating_sub(1);
        let next = self.listed.partition_point(|hole| hole.last < before);
        match self.listed.get(next) {
            Some(hole) if hole.first <= before => hole.first - 1,
            _ => before,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hole(first: u64, last: u64) -> Hole {
        Hole { first, last }
    }

    #[test]
    fn sequences_that_follow_each_other_are_one_hole() {
        let mut holes = Holes::after(0);
        assert!(holes.are_all(1, 0));
        assert!(!holes.are_all(1, 5));
        holes.list(vec![9, 3, 4, 12, 11]);
        assert!(holes.are_all(1, 5));
        assert!(holes.are_all(5, 3), "what was purged is no hole any more");
        assert!(!holes.are_all(5, 5));
        assert_eq!(holes.before(100), [hole(3, 4), hole(9, 9), hole(11, 12)]);
    }

    #[test]
    fn a_hole_is_judged_once_and_with_a_message_behind_it() {
        let mut holes = Holes::after(4);
        holes.list(vec![3, 4, 9, 11, 12]);
        assert_eq!(holes.before(12), [hole(9, 9)]);
        holes.judged(10);
        assert_eq!(holes.before(12), []);
        assert_eq!(holes.before(13), [hole(11, 12)]);
    }

    #[test]
    fn the_way_back_leads_over_holes() {
        let mut holes = Holes::after(0);
        holes.list(vec![1, 3, 4, 6]);
        let back = [8, 7, 5, 2, 1].map(|stream_seq| holes.step_back(stream_seq));
        assert_eq!(back, [7, 5, 2, 0, 0]);
    }
}
