//! The rows and the truncates of the transaction that is being read.

use std::collections::VecDeque;

use millrace_event::{Before, Lsn, Op, Position};

use super::{Capture, CaptureError, Output, State};
use crate::pgoutput::{self, OldTuple, Tuple};
use crate::relation::{Announced, RelationError, Relations};
use crate::tuple::{RowChange, Writer};

impl Capture {
    pub(super) fn on_row(
        &mut self,
        op: Op,
        relid: u32,
        (old, new): (Option<OldTuple<'_>>, Option<Tuple<'_>>),
        lsn: Lsn,
        sent_at_us: i64,
    ) -> Result<(), CaptureError> {
        let State::InTransaction(open) = &mut self.state else {
            return Err(CaptureError::Protocol("a change outside of a transaction"));
        };
        self.changes += 1;
        // An update that carries an old row may be a key change, which is two changes. Whether it is depends
        // on the configured key, and the numbers must not: it takes two in any case.
        let first = open.seq + 1;
        open.seq += if old.is_some() && new.is_some() { 2 } else { 1 };
        let skipped = Position::from(open.transaction.version(open.seq)) <= self.skip_to;
        describe(&mut self.outputs, &mut self.relations, relid, !skipped);
        // What is left out is told of WAL that the stream already holds too: the broker may have kept the stream's end
        // and lost what was remembered beside it.
        let published = match announced(&self.relations, relid)? {
            Announced::Published(published) => published,
            Announced::NotConfigured => return Ok(()),
            Announced::LeftOut(error) => {
                leave_out(&mut self.outputs, error.clone(), open.commit_lsn);
                return Ok(());
            }
        };
        let row = match RowChange::new(published, old, new, &mut self.masked) {
            Ok(Some(row)) => row,
            Ok(None) => {
                let table = published.relation.name().clone();
                let error = RelationError::KeyNull { table };
                leave_out(&mut self.outputs, error, open.commit_lsn);
                return Ok(());
            }
            // It was published as the table was configured then.
            Err(_) if skipped => return Ok(()),
            Err(error) => return Err(error),
        };
        if skipped {
            return Ok(());
        }
        let mut writer = Writer {
            assembler: &mut self.assembler,
            published,
            transaction: &open.transaction,
            skip_to: self.skip_to,
            lsn,
            sent_at_us,
        };
        row.write(op, first, &mut writer)?;
        self.relations.count(relid, op);
        Ok(())
    }

    pub(super) fn on_truncate(
        &mut self,
        truncate: &pgoutput::Truncate<'_>,
        lsn: Lsn,
        sent_at_us: i64,
    ) -> Result<(), CaptureError> {
        let State::InTransaction(open) = &mut self.state else {
            return Err(CaptureError::Protocol(
                "a truncate outside of a transaction",
            ));
        };
        for relid in truncate.relids.iter() {
            self.changes += 1;
            open.seq += 1;
            let behind = Position::from(open.transaction.version(open.seq)) > self.skip_to;
            describe(&mut self.outputs, &mut self.relations, relid, behind);
            let published = match announced(&self.relations, relid)? {
                Announced::Published(published) => published,
                Announced::NotConfigured => continue,
                Announced::LeftOut(error) => {
                    leave_out(&mut self.outputs, error.clone(), open.commit_lsn);
                    continue;
                }
            };
            let mut writer = Writer {
                assembler: &mut self.assembler,
                published,
                transaction: &open.transaction,
                skip_to: self.skip_to,
                lsn,
                sent_at_us,
            };
            writer.write(Op::Truncate, Before::None, None, None, open.seq)?;
            self.relations.count(relid, Op::Truncate);
        }
        Ok(())
    }
}

/// Has a relation's schema kept before the first change that is published under it. An earlier life has seen to those
/// of the changes that the stream has: of them it is looked whether the broker still holds it.
fn describe(outputs: &mut VecDeque<Output>, relations: &mut Relations, relid: u32, behind: bool) {
    let output = match behind {
        true => relations.take_new(relid).map(Output::Describe),
        false => relations.take_skipped(relid).map(Output::DescribeIfLost),
    };
    outputs.extend(output);
}

/// Says it once where it is said of many changes in a row.
fn leave_out(outputs: &mut VecDeque<Output>, error: RelationError, commit_lsn: Lsn) {
    let said = outputs.back().is_some_and(|last| {
        matches!(last, Output::LeftOut(last, lsn) if *lsn == commit_lsn && last.table() == error.table())
    });
    if !said {
        outputs.push_back(Output::LeftOut(error, commit_lsn));
    }
}

fn announced(relations: &Relations, relid: u32) -> Result<&Announced, CaptureError> {
    relations.get(relid).ok_or(CaptureError::Protocol(
        "a change of a relation that was not announced",
    ))
}
