//! Which batch the target gets next: one of the stream, which is the worker's, or one of what is beside it. Pure.

/// What is in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum InFlight {
    /// No batch.
    Nothing,
    /// One of the stream.
    Stream,
    /// One of what is beside it.
    Beside,
}

/// After so many batches of the stream what is beside it comes next, although more changes wait: at most a fifth of the
/// batches are not the stream's then, and a copy goes on under any load.
const STREAM_IN_A_ROW_MAX: u32 = 4;

/// Shares the target between the two.
#[derive(Debug)]
pub(crate) struct Schedule {
    in_flight: InFlight,
    /// What was in flight last.
    last: InFlight,
    /// How many batches of the stream began since what is beside it was asked.
    stream_in_a_row: u32,
}

impl Schedule {
    pub(crate) fn new() -> Self {
        Self {
            in_flight: InFlight::Nothing,
            last: InFlight::Nothing,
            stream_in_a_row: 0,
        }
    }

    pub(crate) fn in_flight(&self) -> InFlight {
        self.in_flight
    }

    /// A batch is handed to the target.
    pub(crate) fn begun(&mut self, of: InFlight) {
        (self.in_flight, self.last) = (of, of);
        if of == InFlight::Stream {
            self.stream_in_a_row = self.stream_in_a_row.saturating_add(1);
        }
    }

    /// The batch in flight is applied, or was not. Returns of what it was.
    pub(crate) fn ended(&mut self) -> InFlight {
        std::mem::replace(&mut self.in_flight, InFlight::Nothing)
    }

    /// The stream was asked for a batch, and had none.
    pub(crate) fn stream_had_none(&mut self) {
        self.last = InFlight::Nothing;
    }

    /// What is beside the stream was asked for a batch, and had one or none.
    pub(crate) fn asked_beside(&mut self) {
        self.stream_in_a_row = 0;
    }

    /// Whether what is beside the stream comes before the stream's next batch, if that is not waited for.
    pub(crate) fn is_beside_next(&self) -> bool {
        self.in_flight == InFlight::Nothing && self.last != InFlight::Beside
    }

    /// Whether it does although the stream's next batch may be full already.
    pub(crate) fn is_beside_due(&self) -> bool {
        self.is_beside_next() && self.stream_in_a_row >= STREAM_IN_A_ROW_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_batches_leave_a_share_to_what_is_beside_the_stream() {
        let mut schedule = Schedule::new();
        let mut beside = 0;
        for _ in 0..100 {
            let of = match schedule.is_beside_due() {
                true => {
                    schedule.asked_beside();
                    InFlight::Beside
                }
                false => InFlight::Stream,
            };
            beside += u32::from(of == InFlight::Beside);
            schedule.begun(of);
            assert!(
                !schedule.is_beside_next(),
                "one batch is in flight at a time"
            );
            assert_eq!(schedule.ended(), of);
        }
        assert_eq!(beside, 20);
    }

    #[test]
    fn what_has_nothing_is_not_asked_before_each_batch() {
        let mut schedule = Schedule::new();
        let mut asked = 0;
        for _ in 0..100 {
            if schedule.is_beside_due() {
                asked += 1;
                schedule.asked_beside();
            }
            schedule.begun(InFlight::Stream);
            schedule.ended();
        }
        assert_eq!(asked, 24);
    }

    #[test]
    fn two_batches_beside_the_stream_never_follow_each_other_while_the_stream_has_one() {
        let mut schedule = Schedule::new();
        assert!(schedule.is_beside_next());
        schedule.begun(InFlight::Beside);
        schedule.ended();
        assert!(!schedule.is_beside_next());
        schedule.stream_had_none();
        assert!(schedule.is_beside_next());
    }
}
