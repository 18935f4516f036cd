//! Whose batch the target gets next: the worker's, which are the stream's, or one of what is beside it. Pure.

/// Whose batch is in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Whose {
    Nobodys,
    Workers,
    Besides,
}

/// After so many batches of the worker what is beside the stream has its turn, although more changes wait: at most a
/// fifth of the batches are not the stream's then, and a copy goes on under any load.
const WORKERS_IN_A_ROW_MAX: u32 = 4;

/// They take turns.
#[derive(Debug)]
pub(crate) struct Turns {
    in_flight: Whose,
    /// Whose batch came last.
    last: Whose,
    /// How many batches of the worker began since what is beside the stream was asked.
    workers_in_a_row: u32,
}

impl Turns {
    pub(crate) fn new() -> Self {
        Self {
            in_flight: Whose::Nobodys,
            last: Whose::Nobodys,
            workers_in_a_row: 0,
        }
    }

    pub(crate) fn in_flight(&self) -> Whose {
        self.in_flight
    }

    /// A batch is handed to the target.
    pub(crate) fn begun(&mut self, whose: Whose) {
        (self.in_flight, self.last) = (whose, whose);
        if whose == Whose::Workers {
            self.workers_in_a_row = self.workers_in_a_row.saturating_add(1);
        }
    }

    /// The batch in flight is applied, or was not. Returns whose it was.
    pub(crate) fn ended(&mut self) -> Whose {
        std::mem::replace(&mut self.in_flight, Whose::Nobodys)
    }

    /// The worker had its turn and no batch.
    pub(crate) fn passed(&mut self) {
        self.last = Whose::Nobodys;
    }

    /// What is beside the stream was asked for a batch, and had one or none.
    pub(crate) fn asked_beside(&mut self) {
        self.workers_in_a_row = 0;
    }

    /// Whether what is beside the stream comes before the worker's next batch, if that is not waited for.
    pub(crate) fn is_besides(&self) -> bool {
        self.in_flight == Whose::Nobodys && self.last != Whose::Besides
    }

    /// Whether it does although the worker's next batch may be full already.
    pub(crate) fn is_beside_due(&self) -> bool {
        self.is_besides() && self.workers_in_a_row >= WORKERS_IN_A_ROW_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_batches_leave_a_share_to_what_is_beside_the_stream() {
        let mut turns = Turns::new();
        let mut besides = 0;
        for _ in 0..100 {
            let whose = match turns.is_beside_due() {
                true => {
                    turns.asked_beside();
                    Whose::Besides
                }
                false => Whose::Workers,
            };
            besides += u32::from(whose == Whose::Besides);
            turns.begun(whose);
            assert!(!turns.is_besides(), "one batch is in flight at a time");
            assert_eq!(turns.ended(), whose);
        }
        assert_eq!(besides, 20);
    }

    #[test]
    fn what_has_nothing_is_not_asked_before_each_batch() {
        let mut turns = Turns::new();
        let mut asked = 0;
        for _ in 0..100 {
            if turns.is_beside_due() {
                asked += 1;
                turns.asked_beside();
            }
            turns.begun(Whose::Workers);
            turns.ended();
        }
        assert_eq!(asked, 24);
    }

    #[test]
    fn two_batches_beside_the_stream_never_follow_each_other_while_the_worker_has_one() {
        let mut turns = Turns::new();
        assert!(turns.is_besides());
        turns.begun(Whose::Besides);
        turns.ended();
        assert!(!turns.is_besides());
        turns.passed();
        assert!(turns.is_besides());
    }
}
