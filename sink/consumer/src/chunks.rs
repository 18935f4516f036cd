//! Puts the chunks of one large message together again. Pure.

use bytes::{Bytes, BytesMut};

/// The largest message that is put together, bytes: what a publisher splits at most.
pub(crate) const ROW_BYTES_MAX: usize = 64 * 1024 * 1024;

/// A chunk's place: the header `<i>/<n>/<publisher>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place<'a> {
    /// From 1.
    pub(crate) index: u32,
    /// Chunks of the set.
    pub(crate) count: u32,
    /// Who wrote it: two publishers' sets may interleave for a moment.
    pub(crate) publisher: &'a str,
}

impl<'a> Place<'a> {
    /// Reads the header's value.
    #[must_use]
    pub(crate) fn parse(text: &'a str) -> Option<Self> {
        let mut parts = text.splitn(3, '/');
        let (index, count) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
        let publisher = parts.next()?;
        (1 <= index && index <= count).then_some(Self {
            index,
            count,
            publisher,
        })
    }
}

/// The sets of chunks that are not complete. At most one of each publisher, and two publishers at a time.
#[derive(Debug, Default)]
pub(crate) struct Assembly {
    sets: Vec<Set>,
}

#[derive(Debug)]
struct Set {
    publisher: String,
    count: u32,
    next: u32,
    bytes: BytesMut,
}

impl Set {
    fn continues_with(&self, place: Place<'_>) -> bool {
        self.next == place.index && self.count == place.count
    }
}

/// Publishers that write at the same time: one, and the one that it takes over from.
const PUBLISHERS_MAX: usize = 2;

impl Assembly {
    /// Whether a set is in progress.
    #[must_use]
    pub(crate) fn is_empty(&self) -> bool {
        self.sets.is_empty()
    }

    /// Forgets every set in progress.
    pub(crate) fn clear(&mut self) {
        self.sets.clear();
    }

    /// Whether a chunk is the next one of a set in progress.
    #[must_use]
    pub(crate) fn expects(&self, place: Place<'_>) -> bool {
        self.sets
            .iter()
            .any(|set| set.continues_with(place) && set.publisher == place.publisher)
    }

    /// Takes in a chunk; `Some` with the whole message when it completes its set. Chunk 1 starts its publisher's
    /// set anew; a chunk that does not continue a set, or makes one larger than [`ROW_BYTES_MAX`], drops it.
    pub(crate) fn push(&mut self, place: Place<'_>, payload: &Bytes) -> Option<Bytes> {
        let known = self
            .sets
            .iter()
            .position(|set| set.publisher == place.publisher);
        let mut set = match (known.map(|index| self.sets.remove(index)), place.index) {
            (_, 1) => Set {
                publisher: place.publisher.to_owned(),
                count: place.count,
                next: 1,
                bytes: BytesMut::new(),
            },
            (Some(set), _) if set.continues_with(place) => set,
            _ => return None,
        };
        if set.bytes.len() + payload.len() > ROW_BYTES_MAX {
            return None;
        }
        set.bytes.extend_from_slice(payload);
        set.next += 1;
        if place.index == place.count {
            return Some(set.bytes.freeze());
        }
        if self.sets.len() == PUBLISHERS_MAX {
            self.sets.remove(0);
        }
        self.sets.push(set);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn push(assembly: &mut Assembly, place: &str, payload: &'static str) -> Option<String> {
        let place = Place::parse(place)?;
        let whole = assembly.push(place, &Bytes::from_static(payload.as_bytes()))?;
        String::from_utf8(whole.to_vec()).ok()
    }

    #[test]
    fn a_set_that_starts_again_drops_its_prefix() {
        let mut assembly = Assembly::default();
        assert_eq!(push(&mut assembly, "1/3/a", "x"), None);
        assert_eq!(push(&mut assembly, "2/3/a", "y"), None);
        assert_eq!(push(&mut assembly, "1/2/a", "p"), None);
        assert_eq!(push(&mut assembly, "2/2/a", "q").as_deref(), Some("pq"));
        assert!(assembly.is_empty());
    }

    #[test]
    fn sets_of_two_publishers_interleave() {
        let mut assembly = Assembly::default();
        assert_eq!(push(&mut assembly, "1/2/a", "1"), None);
        assert_eq!(push(&mut assembly, "1/2/b", "3"), None);
        assert_eq!(push(&mut assembly, "2/2/a", "2").as_deref(), Some("12"));
        assert_eq!(push(&mut assembly, "2/2/b", "4").as_deref(), Some("34"));
    }

    #[test]
    fn a_chunk_that_continues_nothing_is_dropped() {
        let mut assembly = Assembly::default();
        assert_eq!(push(&mut assembly, "2/2/a", "x"), None);
        assert_eq!(push(&mut assembly, "1/3/a", "x"), None);
        assert_eq!(push(&mut assembly, "3/3/a", "x"), None);
        assert!(assembly.is_empty());
        assert_eq!(Place::parse("0/2/a"), None);
        assert_eq!(Place::parse("3/2/a"), None);
    }
}
