//! How much of a load is held that was read and is not published yet.
//!
//! Ranges are read beside one another and published one after the other. So what a later range holds is freed only once
//! those before it are through, and theirs must never wait for it: the range whose turn it is may always hold one
//! message, however large, beside what the others hold.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// So many payload bytes of a load are held, with the exception of one message: what three ranges of usual rows come to.
const HELD_BYTES_MAX: usize = 16 * 1024 * 1024;

/// What the ranges hold, by their numbers in the order of publishing.
#[derive(Debug, Default)]
struct Held {
    /// The range that is published.
    turn: usize,
    /// Bytes of those that hold any: there are never more than are read, or wait to be published.
    ranges: BTreeMap<usize, usize>,
}

impl Held {
    /// Takes bytes for a message of a range, if it may hold them.
    fn take(&mut self, range: usize, bytes: usize) -> bool {
        let all: usize = self.ranges.values().sum();
        let fits = all + bytes <= HELD_BYTES_MAX;
        let is_next = range == self.turn && !self.ranges.contains_key(&range);
        if fits || is_next {
            *self.ranges.entry(range).or_default() += bytes;
        }
        fits || is_next
    }

    fn give(&mut self, range: usize, bytes: usize) {
        if let Some(held) = self.ranges.get_mut(&range) {
            *held -= bytes;
            if *held == 0 {
                self.ranges.remove(&range);
            }
        }
    }
}

/// Room for what is read of one table, which its readers share.
#[derive(Debug, Default)]
pub(super) struct Room {
    held: Mutex<Held>,
    changed: Notify,
}

/// The room of one message, until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    room: Arc<Room>,
    range: usize,
    bytes: usize,
}

impl Room {
    /// Waits until there is room for a message of a range. Safe to cancel.
    pub(super) async fn take(self: &Arc<Self>, range: usize, bytes: usize) -> Place {
        loop {
            // Armed before it looks, so nothing is given back in between.
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            if self.lock().take(range, bytes) {
                let room = Arc::clone(self);
                return Place { room, range, bytes };
            }
            changed.await;
        }
    }

    /// It is this range's turn to be published. They come in the order of their numbers, from 0.
    pub(super) fn turn_of(&self, range: usize) {
        self.lock().turn = range;
        self.changed.notify_waiters();
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        // A panic while it was held ends the process anyway; what it left is whole.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.room.lock().give(self.range, self.bytes);
        self.room.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use futures_util::FutureExt as _;
    use proptest::prelude::*;

    use super::*;

    const MAX: usize = HELD_BYTES_MAX;

    #[test]
    fn a_later_range_waits_for_room_and_the_one_whose_turn_it_is_does_not() {
        let room = Arc::new(Room::default());
        let later = room.take(1, MAX).now_or_never().expect("there is room");
        assert!(room.take(2, 1).now_or_never().is_none());
        let large = room.take(0, 4 * MAX).now_or_never();
        let large = large.expect("its turn");
        assert!(room.take(0, 1).now_or_never().is_none(), "one message");
        drop(large);
        let next = room.take(0, 1).now_or_never().expect("its turn again");
        drop((later, next));
        assert!(room.take(2, MAX).now_or_never().is_some());
    }

    #[tokio::test]
    async fn who_waits_is_told_of_room_and_of_the_turn() {
        let room = Arc::new(Room::default());
        let soon = std::time::Duration::from_secs(10);
        let full = room.take(0, MAX).await;
        let waits = tokio::time::timeout(soon, room.take(1, 1));
        let (taken, ()) = tokio::join!(waits, async { drop(full) });
        drop(taken.expect("told of room"));
        let _full = room.take(0, MAX).await;
        let waits = tokio::time::timeout(soon, room.take(1, 2 * MAX));
        let (taken, ()) = tokio::join!(waits, async { room.turn_of(1) });
        taken.expect("told of the turn");
    }

    /// Readers that take one range after another, and a publisher that takes their messages in the ranges' order.
    struct Load {
        held: Held,
        rest: VecDeque<(usize, VecDeque<usize>)>,
        reading: [Option<(usize, VecDeque<usize>)>; 2],
        read: Vec<VecDeque<usize>>,
        is_read: Vec<bool>,
    }

    impl Load {
        fn reader(&mut self, who: usize) {
            let Some((number, messages)) = &mut self.reading[who] else {
                self.reading[who] = self.rest.pop_front();
                return;
            };
            match messages.front().copied() {
                Some(bytes) if self.held.take(*number, bytes) => {
                    self.read[*number].push_back(bytes);
                    messages.pop_front();
                }
                Some(_) => {}
                None => {
                    self.is_read[*number] = true;
                    self.reading[who] = None;
                }
            }
        }

        fn publisher(&mut self) {
            let turn = self.held.turn;
            match self.read.get_mut(turn).and_then(VecDeque::pop_front) {
                Some(bytes) => self.held.give(turn, bytes),
                None if self.is_read.get(turn) == Some(&true) => self.held.turn += 1,
                None => {}
            }
        }
    }

    proptest! {
        #[test]
        fn whoever_goes_on_next_all_is_published_and_no_more_held_than_may_be(
            ranges in prop::collection::vec(prop::collection::vec(1..2 * MAX, 0..5), 1..8),
            at_random in prop::collection::vec(0..3_usize, 0..300),
        ) {
            let count = ranges.len();
            let largest = ranges.iter().flatten().max().copied().unwrap_or(0);
            let rest = ranges.into_iter().map(VecDeque::from).enumerate();
            let mut load = Load {
                held: Held::default(),
                rest: rest.collect(),
                reading: [None, None],
                read: vec![VecDeque::new(); count],
                is_read: vec![false; count],
            };
            for who in at_random.into_iter().chain((0..3).cycle().take(1_000)) {
                match who {
                    2 => load.publisher(),
                    reader => load.reader(reader),
                }
                prop_assert!(load.held.ranges.values().sum::<usize>() <= MAX + largest);
            }
            prop_assert_eq!(load.held.turn, count);
        }
    }
}
