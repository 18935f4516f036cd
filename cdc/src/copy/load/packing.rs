//! Messages full of rows.

use bytes::Bytes;

/// A message of a load holds about so many payload bytes, unless one row alone is larger.
const MESSAGE_BYTES: usize = 256 * 1024;

/// Room in a message's buffer for the row that fills it, so that most need no other.
const MESSAGE_SPARE_BYTES: usize = 4 * 1024;

/// Rows on their way to the stream.
pub(super) struct Message {
    pub(super) payload: Bytes,
    pub(super) count: u64,
}

/// Fills messages with rows.
pub(super) struct Packing<'h> {
    head: &'h [u8],
    payload: Vec<u8>,
    count: u64,
}

impl<'h> Packing<'h> {
    pub(super) fn new(head: &'h [u8]) -> Self {
        Self {
            head,
            payload: Vec::new(),
            count: 0,
        }
    }

    /// Adds a row, and returns what is full. A large row does not share its message: it alone must keep to the
    /// limit of a row.
    pub(super) fn push(&mut self, row: &[u8]) -> [Option<Message>; 2] {
        let before = (row.len() >= MESSAGE_BYTES).then(|| self.take()).flatten();
        if self.payload.is_empty() {
            let room = self.head.len() + MESSAGE_BYTES.max(row.len()) + MESSAGE_SPARE_BYTES;
            self.payload.reserve(room);
            self.payload.extend_from_slice(self.head);
        }
        self.payload.extend_from_slice(row);
        self.count += 1;
        let full = self.payload.len() >= MESSAGE_BYTES;
        [before, full.then(|| self.take()).flatten()]
    }

    /// What there is, if there are rows.
    pub(super) fn take(&mut self) -> Option<Message> {
        let (payload, count) = (
            std::mem::take(&mut self.payload),
            std::mem::take(&mut self.count),
        );
        (count > 0).then(|| Message {
            payload: payload.into(),
            count,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_row_does_not_share_its_message() {
        let mut packing = Packing::new(b"head\n");
        let large = vec![b'x'; MESSAGE_BYTES];
        assert!(packing.push(b"1\n").iter().all(Option::is_none));
        let [before, alone] = packing.push(&large);
        let before = before.expect("the small row goes first");
        assert_eq!((&before.payload[..], before.count), (&b"head\n1\n"[..], 1));
        let alone = alone.expect("the large row fills a message");
        assert_eq!((alone.payload.len(), alone.count), (5 + MESSAGE_BYTES, 1));
        assert!(packing.take().is_none());
    }
}
