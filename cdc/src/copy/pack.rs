//! From rows as COPY writes them to messages of a copy stream. Pure.

use bytes::{Buf as _, Bytes};
use millrace_config::limits;
use millrace_event::{
    Before, Change, Datum, LineEnd, Lsn, Op, Relation, Transaction, write_change, write_line_end,
};

use super::failure::Failure;
use super::text::CopyRow;
use crate::selection::Binding;

/// A message of the copy stream holds at most this many payload bytes, unless one row alone is larger. It
/// travels in chunks where the broker takes less.
const MESSAGE_BYTES: usize = 256 * 1024;

/// Packs rows of one table that share a version.
pub(super) struct Packer<'r> {
    relation: &'r Relation,
    binding: Option<&'r Binding>,
    transaction: Transaction,
    lsn: Lsn,
    read_at_us: i64,
    row: CopyRow,
    /// What masks wrote.
    room: Vec<u8>,
    payload: Vec<u8>,
    full: Vec<Bytes>,
    full_bytes: usize,
    rows: u64,
}

impl<'r> Packer<'r> {
    /// Rows of this table with the version `(epoch, lsn, 0)`, read at `read_at_us` (microseconds since 1970).
    /// `binding` makes them the published ones.
    pub(super) fn new(
        relation: &'r Relation,
        binding: Option<&'r Binding>,
        epoch: u32,
        lsn: Lsn,
        read_at_us: i64,
    ) -> Self {
        Self {
            relation,
            binding,
            room: Vec::new(),
            transaction: Transaction::new(epoch, lsn, 0, read_at_us),
            lsn,
            read_at_us,
            row: CopyRow::default(),
            payload: Vec::new(),
            full: Vec::new(),
            full_bytes: 0,
            rows: 0,
        }
    }

    /// Takes a row as COPY writes it.
    ///
    /// # Errors
    /// The row cannot be put on the stream.
    pub(super) fn take(&mut self, line: &[u8]) -> Result<(), Failure> {
        let table = self.relation.name();
        self.row
            .read(line)
            .map_err(|error| Failure::of_row(table, &error))?;
        let mut data: Vec<Datum<'_>> = self.row.data().collect();
        if let Some(binding) = self.binding {
            binding.mask(&mut data, &mut self.room);
        }
        let before = self.payload.len();
        if before > 0 {
            self.payload.push(b'\n');
        }
        let change = Change {
            op: Op::Read,
            before: Before::None,
            after: Some(&data),
            key: Some(&data),
            seq: 0,
            lsn: self.lsn,
            sent_at_us: self.read_at_us,
        };
        write_change(&mut self.payload, self.relation, &self.transaction, &change)
            .map_err(|error| Failure::of_row(table, &error))?;
        write_line_end(&mut self.payload, LineEnd::More);
        self.rows += 1;
        if self.payload.len() < MESSAGE_BYTES {
            return Ok(());
        }
        let mut full = Bytes::from(std::mem::take(&mut self.payload));
        // A large row does not share a message: it alone must keep to the limit of a row.
        if before > 0 && full.len() - before > MESSAGE_BYTES {
            self.push(full.split_to(before));
            full.advance(1);
        }
        if full.len() > limits::ROW_BYTES_MAX {
            return Err(Failure::too_large(table, full.len()));
        }
        self.push(full);
        Ok(())
    }

    /// The texts of the newest row's key columns, as the source has them.
    pub(super) fn last_key(&self) -> Option<Vec<String>> {
        let data: Vec<Datum<'_>> = self.row.data().collect();
        let text = |index: &usize| match data.get(*index)? {
            Datum::Text(text) => Some(std::str::from_utf8(text).ok()?.to_owned()),
            _ => None,
        };
        self.relation.key().iter().map(text).collect()
    }

    /// How many rows it took.
    pub(super) fn rows(&self) -> u64 {
        self.rows
    }

    /// How many bytes it holds.
    pub(super) fn bytes(&self) -> usize {
        self.full_bytes + self.payload.len()
    }

    /// The messages.
    pub(super) fn finish(mut self) -> Vec<Bytes> {
        if !self.payload.is_empty() {
            let rest = std::mem::take(&mut self.payload);
            self.push(rest.into());
        }
        self.full
    }

    fn push(&mut self, message: Bytes) {
        self.full_bytes += message.len();
        self.full.push(message);
    }
}

#[cfg(test)]
mod tests {
    use millrace_event::{ColumnShape, TableName};

    use super::*;

    fn relation() -> Relation {
        let shape = |name, type_oid| ColumnShape {
            name,
            type_oid,
            typmod: -1,
        };
        let columns = [shape("v", 25), shape("b", 23), shape("a", 25)];
        let name = TableName::new("public", "t");
        Relation::new("shop", "db", name, &columns, vec![2, 1])
    }

    #[test]
    fn rows_share_messages_and_a_large_one_has_its_own() {
        let relation = relation();
        let mut packer = Packer::new(&relation, None, 3, Lsn(0x10), 0);
        let large = "x".repeat(MESSAGE_BYTES);
        for value in ["one", "two", &large, "three"] {
            packer.take(format!("{value}\t1\tk\n").as_bytes()).unwrap();
        }
        assert_eq!(packer.rows(), 4);
        let held = packer.bytes();
        let messages = packer.finish();
        let lines = |message: &Bytes| message.split(|byte| *byte == b'\n').count();
        assert_eq!(messages.iter().map(lines).collect::<Vec<_>>(), [2, 1, 1]);
        assert_eq!(messages.iter().map(Bytes::len).sum::<usize>(), held);
        let first = std::str::from_utf8(&messages[0]).unwrap();
        assert!(
            first.starts_with("{\"op\":\"r\",\"before\":null,\"after\":{\"v\":\"one\",\"b\":1")
        );
        assert!(
            first.contains("\"version\":\"00000003000000000000001000000000\""),
            "{first}"
        );
    }

    #[test]
    fn the_last_key_has_the_texts_of_its_columns() {
        let relation = relation();
        let mut packer = Packer::new(&relation, None, 1, Lsn(1), 0);
        assert_eq!(packer.last_key(), None);
        packer.take(b"v\t-7\ttab\\tand \\\\N\n").unwrap();
        let key = vec!["tab\tand \\N".to_owned(), "-7".to_owned()];
        assert_eq!(packer.last_key(), Some(key));
    }
}
