//! The machine of a parked table that catches up: from its changes to batches, each with where the table stands
//! once it is applied. It knows no network and no clock.

use std::sync::Arc;

use bytes::Bytes;
use millrace_consumer::Token;
use millrace_event::{ChangeEvent, Op, Position};

use crate::batch::Step;
use crate::fold::Fold;
use crate::row::{RowError, TableLayout};
use crate::worker::BatchLimits;

/// A part of what the table missed.
#[derive(Debug)]
pub struct Part {
    /// Where the table goes on once this is applied.
    pub after: Token,
    /// What to apply.
    pub steps: Vec<Step>,
}

/// Collects a table's changes, message by message.
#[derive(Debug)]
pub struct Catching {
    limits: BatchLimits,
    fold: Fold,
    /// The message before the one whose changes are taken.
    before: Token,
    /// The last change taken, if it was a delete within its transaction: the next one may be the other half of its
    /// key change.
    open: Option<Position>,
}

impl Catching {
    /// Begins behind `from`.
    pub fn new(limits: BatchLimits, from: Token) -> Self {
        Self {
            limits,
            fold: Fold::new(),
            before: from,
            open: None,
        }
    }

    /// Takes one change of the table, whose texts are slices of `payload`.
    ///
    /// # Errors
    /// The event does not have its key.
    pub fn push(
        &mut self,
        layout: &Arc<TableLayout>,
        event: &ChangeEvent<'_>,
        payload: &Bytes,
    ) -> Result<(), RowError> {
        let is_open = event.op == Op::Delete && !event.source.last;
        self.open = is_open.then(|| event.source.version.into());
        self.fold.push(layout, event, payload)
    }

    /// Ends the message that stands at `at`: what to apply, once it is as much as the limits say.
    ///
    /// Where the message ends in a delete, that one is held back, and the table stands before the message: after a
    /// crash it is read again as a whole, and what was applied of it is stale then. Waiting for a better place would
    /// hold all of a transaction that empties the table row by row.
    pub fn end_message(&mut self, at: Token) -> Option<Part> {
        let before = std::mem::replace(&mut self.before, at);
        if self.fold.rows() < self.limits.rows && self.fold.bytes() < self.limits.bytes {
            return None;
        }
        self.part(before, at)
    }

    /// What was taken so far, however little: where the table stands then, too.
    pub fn flush(&mut self) -> Option<Part> {
        let at = self.before;
        if self.open == Some(at.position) {
            return None;
        }
        let steps = self.fold.finish();
        Some(Part { after: at, steps })
    }

    fn part(&mut self, before: Token, at: Token) -> Option<Part> {
        // A delete that further messages followed is not the half of anything.
        let part = if self.open == Some(at.position) {
            let steps = self.fold.cut();
            let after = before;
            Part { after, steps }
        } else {
            let steps = self.fold.finish();
            Part { after: at, steps }
        };
        // Only the delete that was held back is there, and it is nothing new.
        (!part.steps.is_empty()).then_some(part)
    }

    /// What is left once the table is where its sink is: at the end of a transaction.
    pub fn finish(mut self) -> Vec<Step> {
        self.fold.finish()
    }
}

#[cfg(test)]
mod tests {
    use millrace_event::{Lsn, TableName, Version, decode_line};

    use super::*;
    use crate::batch::{Action, RowOp};
    use crate::row::LayoutColumn;

    const LIMITS: BatchLimits = BatchLimits {
        rows: 100,
        bytes: 1 << 20,
    };

    fn layout() -> Arc<TableLayout> {
        let column = |name: &str| LayoutColumn {
            source: name.to_owned(),
            target: name.to_owned(),
            cast: "text".to_owned(),
        };
        Arc::new(TableLayout {
            source: TableName::new("public", "t"),
            target: TableName::new("public", "t"),
            columns: vec![column("id"), column("big")],
            key: vec![0],
            shape: String::new(),
        })
    }

    /// The token of the message that ends with change `seq` of the one transaction.
    fn token(stream_seq: u64, seq: u64) -> Token {
        Token {
            stream_seq,
            position: version(seq).into(),
        }
    }

    fn version(seq: u64) -> Version {
        Version::new(1, Lsn(100), u32::try_from(seq).expect("is small"))
    }

    fn line(op: &str, rows: &str, seq: u64) -> Bytes {
        format!(
            r#"{{"op":"{op}",{rows},"ts_ms":1,"source":{{"name":"s","db":"d","schema":"public","table":"t","table_version":"0","snapshot":"false","txId":1,"ts_us":1,"version":"{}","lsn":1}}}}"#,
            version(seq)
        )
        .into()
    }

    fn delete(id: u64, seq: u64) -> Bytes {
        let rows = format!(r#""before":null,"after":null,"key":{{"id":{id}}}"#);
        line("d", &rows, seq)
    }

    /// The half of a key change that writes the row, without its large value.
    fn create(id: u64, old: u64, seq: u64) -> Bytes {
        let rows = format!(r#""before":{{"id":{old}}},"after":{{"id":{id}}},"key":{{"id":{id}}}"#);
        line("c", &rows, seq)
    }

    fn push(catching: &mut Catching, layout: &Arc<TableLayout>, payload: &Bytes) {
        let event = decode_line(payload).expect("is well formed");
        catching
            .push(layout, &event, payload)
            .expect("is well formed");
    }

    fn rows(steps: &[Step]) -> Vec<&RowOp> {
        let rows = steps.iter().filter_map(|step| match step {
            Step::Rows(tables) => Some(tables.iter().flat_map(|table| &table.rows)),
            _ => None,
        });
        rows.flatten().collect()
    }

    #[test]
    fn a_transaction_that_deletes_much_is_applied_in_parts() {
        const A_MESSAGE: u64 = 10;
        let (layout, mut catching) = (layout(), Catching::new(LIMITS, token(0, 0)));
        let mut deleted = Vec::new();
        let mut parts = 0;
        for message in 1..=1_000 {
            for seq in (message - 1) * A_MESSAGE + 1..=message * A_MESSAGE {
                push(&mut catching, &layout, &delete(seq, seq));
            }
            assert!(catching.fold.rows() <= LIMITS.rows + A_MESSAGE as usize);
            let Some(Part { after, steps }) =
                catching.end_message(token(message, message * A_MESSAGE))
            else {
                continue;
            };
            parts += 1;
            assert_eq!(after, token(message - 1, (message - 1) * A_MESSAGE));
            deleted.extend(rows(&steps).iter().map(|row| row.version));
            // All but the delete that was held back.
            assert_eq!(deleted.len() as u64, message * A_MESSAGE - 1);
        }
        assert!(parts >= 90, "{parts}");
        deleted.extend(rows(&catching.finish()).iter().map(|row| row.version));
        deleted.sort();
        assert_eq!(deleted, (1..=10_000).map(version).collect::<Vec<_>>());
    }

    #[test]
    fn the_halves_of_a_key_change_stay_together_at_a_limit() {
        let limits = BatchLimits { rows: 2, ..LIMITS };
        let (layout, mut catching) = (layout(), Catching::new(limits, token(0, 0)));
        push(&mut catching, &layout, &delete(7, 1));
        assert!(catching.end_message(token(1, 1)).is_none());
        push(&mut catching, &layout, &delete(1, 2));
        let part = catching.end_message(token(2, 2)).expect("is full");
        assert_eq!(part.after, token(1, 1));
        assert_eq!(rows(&part.steps).len(), 1);
        assert_eq!(rows(&part.steps)[0].version, version(1));

        push(&mut catching, &layout, &create(2, 1, 3));
        let part = catching.end_message(token(3, 3)).expect("is full");
        assert_eq!(part.after, token(3, 3));
        let [Step::Move(moves), Step::Rows(_)] = part.steps.as_slice() else {
            panic!("{:?}", part.steps)
        };
        assert_eq!(moves[0].row.version, version(3));
        let [old] = rows(&part.steps)[..] else {
            panic!("{:?}", part.steps)
        };
        assert!(matches!(old.action, Action::Delete { .. }), "{old:?}");
        assert_eq!(old.version, version(2));
    }

    #[test]
    fn a_delete_that_other_tables_follow_is_not_held_back() {
        let limits = BatchLimits { rows: 1, ..LIMITS };
        let (layout, mut catching) = (layout(), Catching::new(limits, token(0, 0)));
        push(&mut catching, &layout, &delete(1, 1));
        assert!(catching.end_message(token(1, 1)).is_none());
        let part = catching.end_message(token(2, 2)).expect("is full");
        assert_eq!(part.after, token(2, 2));
        assert_eq!(rows(&part.steps).len(), 1);
    }
}
