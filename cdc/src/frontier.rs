//! From publish acknowledgements to the LSN that the slot may forget.
//!
//! Pure. A *boundary* is a message after which the stream holds everything of the source up to an LSN: a
//! transaction's last event, a heartbeat, a progress message. Only boundaries are ever confirmed.

use std::collections::VecDeque;
use std::time::Duration;

use millrace_event::{Lsn, Position};

/// When the slot may forget what the stream holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConfirmPolicy {
    /// As soon as JetStream has acknowledged it.
    Acked,
    /// When JetStream acknowledged it longer ago than this, the broker's sync interval plus a margin, and
    /// still has it: a tail that the broker loses can then be read from the slot again.
    Synced(Duration),
}

/// A message after which the stream holds everything up to `end_lsn`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Boundary {
    /// The message's stream sequence.
    pub stream_seq: u64,
    /// What the message must still carry when its sequence is read.
    pub position: Position,
    /// Everything of the source whose commit ends here or below is in the stream.
    pub end_lsn: Lsn,
}

/// At most so many boundaries age at once; more often than every `age / AGING_MAX` none is kept.
const AGING_MAX: u32 = 256;

#[derive(Debug)]
struct Aging {
    boundary: Boundary,
    /// When it is old enough.
    due_at: Duration,
}

/// A group of boundaries that were acknowledged shortly after another; the newest stands for all.
#[derive(Debug)]
struct Granule {
    opened_at: Duration,
    newest: Aging,
}

/// What has been published, acknowledged and confirmed on one life of the publisher.
#[derive(Debug)]
pub struct Frontier {
    policy: ConfirmPolicy,
    /// The stream's last sequence when this life began: message number `n` gets sequence `base + n`.
    base: u64,
    published: u64,
    acked: u64,
    /// Boundaries that are published and not acknowledged, oldest first. As many as the publish window has
    /// messages, at most.
    unacked: VecDeque<(u64, Position, Lsn)>,
    /// Boundaries that wait to be old enough, oldest first.
    aging: VecDeque<Aging>,
    granule: Option<Granule>,
    /// The boundary that is being looked up in the stream.
    verifying: Option<Boundary>,
    confirmed: Lsn,
}

impl Frontier {
    /// Begins with a stream that ends at sequence `base` and a slot that is confirmed up to `confirmed`.
    #[must_use]
    pub fn new(policy: ConfirmPolicy, base: u64, confirmed: Lsn) -> Self {
        Self {
            policy,
            base,
            published: 0,
            acked: 0,
            unacked: VecDeque::new(),
            aging: VecDeque::new(),
            granule: None,
            verifying: None,
            confirmed,
        }
    }

    /// Takes a boundary that the stream already held before this life, and has held for `held`.
    pub fn found(&mut self, boundary: Boundary, held: Duration, now: Duration) {
        assert_eq!(
            self.published, 0,
            "what was found is older than what is published"
        );
        assert!(
            boundary.stream_seq <= self.base,
            "what was found is in the stream"
        );
        match self.policy {
            ConfirmPolicy::Acked => self.confirm(boundary.end_lsn),
            ConfirmPolicy::Synced(age) => self.aging.push_back(Aging {
                boundary,
                // A life's clock begins with it: only what is left to wait can be told by it.
                due_at: now + age.saturating_sub(held),
            }),
        }
    }

    /// Takes note of the next message; `boundary` says that the stream is complete up to an LSN after it.
    pub fn on_published(&mut self, position: Position, boundary: Option<Lsn>) {
        self.published += 1;
        if let Some(end_lsn) = boundary {
            self.unacked.push_back((self.published, position, end_lsn));
        }
    }

    /// Takes the acknowledgement of the first `count` messages of this life.
    pub fn on_acked(&mut self, count: u64, now: Duration) {
        assert!(
            count <= self.published,
            "an acknowledgement is for what was published"
        );
        // Acknowledgements are cumulative: an older one says nothing new.
        self.acked = self.acked.max(count);
        let mut newest = None;
        while let Some((number, position, end_lsn)) = self.unacked.front().copied() {
            if number > self.acked {
                break;
            }
            self.unacked.pop_front();
            newest = Some(Boundary {
                stream_seq: self.base + number,
                position,
                end_lsn,
            });
        }
        let Some(boundary) = newest else { return };
        match self.policy {
            ConfirmPolicy::Acked => self.confirm(boundary.end_lsn),
            ConfirmPolicy::Synced(age) => self.age(boundary, age, now),
        }
    }

    fn age(&mut self, boundary: Boundary, age: Duration, now: Duration) {
        let newest = Aging {
            boundary,
            due_at: now + age,
        };
        match &mut self.granule {
            Some(granule) if now < granule.opened_at + age / AGING_MAX => granule.newest = newest,
            granule => {
                if let Some(full) = granule.replace(Granule {
                    opened_at: now,
                    newest,
                }) {
                    self.aging.push_back(full.newest);
                }
            }
        }
        assert!(
            self.aging.len() <= AGING_MAX as usize * 2,
            "aging boundaries are bounded"
        );
    }

    /// The newest boundary that is old enough to be confirmed, to be looked up in the stream. Answer with
    /// [`Frontier::on_verified`]; until then there is no other.
    pub fn due(&mut self, now: Duration) -> Option<Boundary> {
        if self.verifying.is_some() {
            return None;
        }
        let old_enough = |aging: &Aging| now >= aging.due_at;
        if self
            .granule
            .as_ref()
            .is_some_and(|granule| old_enough(&granule.newest))
        {
            self.aging
                .extend(self.granule.take().map(|granule| granule.newest));
        }
        while self.aging.front().is_some_and(old_enough) {
            self.verifying = self.aging.pop_front().map(|aging| aging.boundary);
        }
        self.verifying
    }

    /// The boundary that was looked up is still in the stream.
    pub fn on_verified(&mut self, boundary: Boundary) {
        assert_eq!(
            self.verifying.take(),
            Some(boundary),
            "only what was asked is answered"
        );
        self.confirm(boundary.end_lsn);
    }

    fn confirm(&mut self, end_lsn: Lsn) {
        // A boundary that was found at the start may lie below what the slot already forgot.
        self.confirmed = self.confirmed.max(end_lsn);
    }

    /// What the slot may forget: everything up to here is in the stream under the policy.
    #[must_use]
    pub fn confirmed(&self) -> Lsn {
        self.confirmed
    }

    /// How many messages were published and not acknowledged.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        self.published - self.acked
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(lsn: u64) -> Position {
        Position::new(1, Lsn(lsn), 1)
    }

    #[test]
    fn acked_confirms_the_newest_acknowledged_boundary_only() {
        let mut frontier = Frontier::new(ConfirmPolicy::Acked, 100, Lsn(5));
        frontier.on_published(at(10), None);
        frontier.on_published(at(10), Some(Lsn(15)));
        frontier.on_published(at(20), None);
        frontier.on_acked(1, Duration::ZERO);
        assert_eq!(frontier.confirmed(), Lsn(5));
        frontier.on_acked(3, Duration::ZERO);
        assert_eq!(frontier.confirmed(), Lsn(15));
        assert_eq!(frontier.in_flight(), 0);
    }

    #[test]
    fn synced_confirms_after_the_age_and_a_look_into_the_stream() {
        let age = Duration::from_secs(256);
        let mut frontier = Frontier::new(ConfirmPolicy::Synced(age), 100, Lsn(5));
        frontier.on_published(at(10), Some(Lsn(15)));
        frontier.on_acked(1, Duration::from_secs(1));
        assert_eq!(frontier.due(Duration::from_secs(256)), None);
        let due = frontier.due(Duration::from_secs(257)).expect("old enough");
        assert_eq!(
            due,
            Boundary {
                stream_seq: 101,
                position: at(10),
                end_lsn: Lsn(15)
            }
        );
        assert_eq!(frontier.confirmed(), Lsn(5));
        frontier.on_verified(due);
        assert_eq!(frontier.confirmed(), Lsn(15));
    }

    #[test]
    fn what_the_stream_held_long_before_this_life_is_due_at_once() {
        let age = Duration::from_secs(150);
        let boundary = Boundary {
            stream_seq: 100,
            position: at(10),
            end_lsn: Lsn(15),
        };
        for (held, due) in [(600, 1), (150, 1), (149, 2), (0, 151)] {
            let mut frontier = Frontier::new(ConfirmPolicy::Synced(age), 100, Lsn(5));
            let began = Duration::from_secs(1);
            frontier.found(boundary, Duration::from_secs(held), began);
            let before = Duration::from_secs(due) - Duration::from_millis(1);
            assert_eq!(frontier.due(before), None, "held for {held} s");
            assert_eq!(frontier.due(Duration::from_secs(due)), Some(boundary));
        }
    }

    #[test]
    fn a_constant_flow_is_confirmed_within_a_granule_of_the_age() {
        let age = Duration::from_secs(256);
        let mut frontier = Frontier::new(ConfirmPolicy::Synced(age), 0, Lsn::ZERO);
        for tick in 1..=10_000_u64 {
            let now = Duration::from_millis(tick * 100);
            frontier.on_published(at(tick), Some(Lsn(tick)));
            frontier.on_acked(tick, now);
            if let Some(due) = frontier.due(now) {
                frontier.on_verified(due);
            }
            let oldest_allowed = tick.saturating_sub((256 + 2) * 10);
            assert!(frontier.confirmed() >= Lsn(oldest_allowed), "tick {tick}");
            assert!(
                frontier.confirmed() <= Lsn(tick.saturating_sub(2560)),
                "tick {tick}"
            );
        }
    }

    proptest! {
        /// Against the naive model: the newest boundary among the acknowledged messages.
        #[test]
        fn acked_equals_the_naive_model(
            boundaries in prop::collection::vec(any::<bool>(), 1..50),
            acks in prop::collection::vec(0_usize..50, 0..20),
        ) {
            let mut frontier = Frontier::new(ConfirmPolicy::Acked, 7, Lsn::ZERO);
            for (index, boundary) in boundaries.iter().enumerate() {
                let lsn = index as u64 + 1;
                frontier.on_published(at(lsn), boundary.then_some(Lsn(lsn)));
            }
            let mut acked = 0;
            for ack in acks {
                let ack = ack.min(boundaries.len());
                acked = acked.max(ack);
                frontier.on_acked(ack as u64, Duration::ZERO);
                let naive = boundaries[..acked].iter().rposition(|b| *b).map_or(0, |i| i as u64 + 1);
                prop_assert_eq!(frontier.confirmed(), Lsn(naive));
            }
        }
    }
}
