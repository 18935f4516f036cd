//! From a change's tuples to its events: the new row completed from the old one, a key change told apart.
//!
//! Pure.

use millrace_event::{Before, Change, Datum, Lsn, Op, Position, Transaction, write_change};

use crate::assemble::Assembler;
use crate::capture::CaptureError;
use crate::pgoutput::{self, OldKind, OldTuple, Tuple};
use crate::relation::{Published, SubjectId};

/// Writes the events of one change, those that the stream already holds excepted.
pub(crate) struct Writer<'c> {
    pub(crate) assembler: &'c mut Assembler,
    pub(crate) published: &'c Published,
    pub(crate) transaction: &'c Transaction,
    pub(crate) skip_to: Position,
    pub(crate) lsn: Lsn,
    pub(crate) sent_at_us: i64,
}

impl Writer<'_> {
    pub(crate) fn write(
        &mut self,
        op: Op,
        before: Before<'_>,
        after: Option<&[Datum<'_>]>,
        key: Option<&[Datum<'_>]>,
        seq: u32,
    ) -> Result<(), CaptureError> {
        let position = Position::from(self.transaction.version(seq));
        if position <= self.skip_to {
            return Ok(());
        }
        let subject: SubjectId = self.published.subject(op);
        let out = self.assembler.begin_line(subject, position);
        let change = Change {
            op,
            before,
            after,
            key,
            seq,
            lsn: self.lsn,
            sent_at_us: self.sent_at_us,
        };
        write_change(out, &self.published.relation, self.transaction, &change)?;
        Ok(())
    }
}

/// What masks wrote for the rows of one change; used again for each.
#[derive(Debug, Default)]
pub(crate) struct MaskedTexts {
    old: Vec<u8>,
    new: Vec<u8>,
}

/// A row change with its tuples laid out, the new row completed from the old one where that has more, and both
/// masked.
pub(crate) struct RowChange<'a> {
    old: Option<(OldKind, Vec<Datum<'a>>)>,
    new: Option<Vec<Datum<'a>>>,
    key_changed: bool,
}

impl<'a> RowChange<'a> {
    /// `None` where a key column is NULL: when the change was made, it was in no key.
    pub(crate) fn new(
        published: &Published,
        old: Option<OldTuple<'a>>,
        new: Option<Tuple<'a>>,
        masked: &'a mut MaskedTexts,
    ) -> Result<Option<Self>, CaptureError> {
        let relation = &published.relation;
        let mut old = match old {
            Some(OldTuple { kind, tuple }) => Some((kind, row(published, tuple)?)),
            None => None,
        };
        let mut new = new.map(|tuple| row(published, tuple)).transpose()?;
        let mut key_changed = false;
        if let (Some((kind, old)), Some(new)) = (&mut old, &mut new) {
            // A partition that logs less of old rows than its table is told as the table: NULL stands for what it
            // does not log. What is unchanged is not NULL, and shows it.
            let lacks = |(new, old): (&Datum<'_>, &Datum<'_>)| {
                *new == Datum::Unchanged && *old == Datum::Null
            };
            if new.iter().zip(old.iter()).any(lacks) {
                *kind = OldKind::Key;
            }
            // A key tuple says NULL for every other column: only its key columns are values.
            for (index, (datum, known)) in new.iter_mut().zip(old.iter()).enumerate() {
                let has_value = *kind == OldKind::Full || relation.key().contains(&index);
                if *datum == Datum::Unchanged && has_value {
                    *datum = *known;
                }
            }
            key_changed = relation
                .key()
                .iter()
                .any(|index| old.get(*index) != new.get(*index));
        }
        let rows = || new.iter().chain(old.iter().map(|(_, row)| row));
        let mut keys = rows().flat_map(|row| relation.key().iter().map(|index| row.get(*index)));
        if keys.any(|value| matches!(value, Some(Datum::Null))) {
            return Ok(None);
        }
        let is_text = |value: Option<&Datum<'_>>| matches!(value, Some(Datum::Text(_)));
        let complete =
            rows().all(|row| relation.key().iter().all(|index| is_text(row.get(*index))));
        if !complete {
            return Err(CaptureError::Protocol("a key column has no value"));
        }
        if let Some(binding) = &published.binding {
            if let Some((_, old)) = &mut old {
                binding.mask(old, &mut masked.old);
            }
            if let Some(new) = &mut new {
                binding.mask(new, &mut masked.new);
            }
        }
        Ok(Some(Self {
            old,
            new,
            key_changed,
        }))
    }

    pub(crate) fn write(
        &self,
        op: Op,
        first: u32,
        writer: &mut Writer<'_>,
    ) -> Result<(), CaptureError> {
        let before = match &self.old {
            None => Before::None,
            Some((OldKind::Key, row)) => Before::Key(row),
            Some((OldKind::Full, row)) => Before::Row(row),
        };
        let old = self.old.as_ref().map(|(_, row)| row.as_slice());
        let new = self.new.as_deref();
        if self.key_changed {
            writer.write(Op::Delete, before, None, old, first)?;
            return writer.write(Op::Create, before, new, new, first + 1);
        }
        // An update whose key stayed has no use for a key tuple that says so.
        let before = match before {
            Before::Key(_) if op == Op::Update => Before::None,
            before => before,
        };
        writer.write(op, before, new, new.or(old), first)
    }
}

/// The columns of a tuple that travel.
fn row<'a>(published: &Published, tuple: Tuple<'a>) -> Result<Vec<Datum<'a>>, CaptureError> {
    if tuple.len() != published.wal_columns {
        return Err(CaptureError::Protocol(
            "a row does not have its relation's columns",
        ));
    }
    let Some(binding) = &published.binding else {
        return tuple.iter().map(datum).collect();
    };
    let columns = tuple.iter().enumerate();
    let kept = columns.filter(|(index, _)| binding.keeps(*index));
    kept.map(|(_, value)| datum(value)).collect()
}

fn datum(value: pgoutput::Datum<'_>) -> Result<Datum<'_>, CaptureError> {
    match value {
        pgoutput::Datum::Null => Ok(Datum::Null),
        pgoutput::Datum::Unchanged => Ok(Datum::Unchanged),
        pgoutput::Datum::Text(text) => Ok(Datum::Text(text)),
        pgoutput::Datum::Binary(_) => Err(CaptureError::Protocol(
            "a binary value, which was not asked for",
        )),
    }
}
