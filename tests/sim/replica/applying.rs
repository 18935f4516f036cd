//! What may happen where a batch meets the target: a crash before or behind it, a target that fails for a moment, a
//! second worker, and sabotage.

use millrace_event::{TableName, Version};
use millrace_sink::batch::{Batch, Step};
use millrace_sink::memory::{MemorySink, MemoryTable};
use millrace_sink::sink::{Elected, Sink, SinkError};
use millrace_sink::sql::INCOMPLETE;
use rand::Rng;

use super::{End, NAME, now};
use crate::world::{Failure, Sabotage, World};

type Tables = Vec<(TableName, MemoryTable)>;

/// No row goes back to an older version, not even over its delete.
fn check_versions(before: &Tables, after: &Tables) -> Result<(), Failure> {
    for ((name, before), (_, after)) in before.iter().zip(after) {
        for (key, (version, _)) in &after.rows {
            let row = before.rows.get(key).map(|(version, _)| *version);
            if row == Some(*version) {
                continue;
            }
            let known = row.max(before.tombstones.get(key).copied());
            if known > Some(*version) {
                return Err(format!(
                    "{name} {key:?} went back from {known:?} to {version}"
                ));
            }
        }
    }
    Ok(())
}

impl World {
    /// Applies a batch, unless something happens before, at or behind it.
    pub(super) fn apply(&mut self, batch: &Batch) -> Result<End, Failure> {
        let Some(mut sink) = self.replica.sink.take() else {
            return Ok(End::Over);
        };
        if self.fault(0.03) {
            self.note("sink crashed before a batch");
            return Ok(End::Over);
        }
        if self.fault(0.03) {
            self.note("the target failed for a moment");
            now(sink.roll_back()).map_err(|error| error.to_string())?;
            self.replica.sink = Some(sink);
            return Ok(End::Over);
        }
        if self.fault(0.03) {
            return self.depose(sink, batch);
        }
        if self.is_too_old(batch) {
            // The same rows would be refused for ever: another request reads them again.
            self.note("copied rows are older than what deletes are known of");
            self.counts.copies_too_old += 1;
            self.copier.request = None;
            self.replica.sink = Some(sink);
            return Ok(End::Over);
        }
        let mut batch = batch.clone();
        for step in &mut batch.steps {
            if let Step::Sweep { below, .. } = step
                && self.breaks(Sabotage::SweepMore)
            {
                *below = batch.from.position.0;
            }
        }
        if !batch.commit && self.sabotage(Sabotage::CommitHalf) {
            batch.commit = true;
            self.sabotaged = true;
        }
        let before = self.tables();
        let applied = now(sink.apply(&batch)).map_err(|error| format!("apply failed: {error}"))?;
        let mut letters = self.replica.target.letters().into_iter();
        if let Some(letter) = letters.find(|letter| letter.reason != INCOMPLETE) {
            return Err(format!("a row was set aside: {letter:?}"));
        }
        self.note(format!(
            "applied {} to {} ({} written, {} stale){}",
            batch.from.position,
            batch.to.position,
            applied.written,
            applied.stale,
            if batch.commit { "" } else { ", open" }
        ));
        let commit = batch.commit;
        if batch.copy.is_none() {
            self.replica.applied.push(batch);
        }
        check_versions(&before, &self.tables())?;
        if let Some(row) = self.replica.position() {
            let finished = |order: &String| row.copy.finished.contains(order);
            let before = self.replica.wrong.len();
            self.replica.wrong.retain(|_, order| !finished(order));
            self.counts.repairs += (before - self.replica.wrong.len()) as u64;
        }
        self.check_target()?;
        if commit && self.sabotage(Sabotage::IgnoreGuard) {
            self.ignore_guard(&mut sink)?;
        }
        if self.fault(0.03) {
            self.note("sink crashed behind a batch");
            return Ok(End::Over);
        }
        self.replica.sink = Some(sink);
        Ok(End::Applied)
    }

    fn tables(&self) -> Tables {
        let specs = self.source.specs.iter().filter(|spec| spec.configured);
        let tables = specs.map(|spec| (spec.name.clone(), self.replica.target.table(&spec.name)));
        tables.collect()
    }

    /// Whether a copy brings a row that a forgotten delete may have removed, as the Postgres sink looks at it.
    fn is_too_old(&self, batch: &Batch) -> bool {
        let rows = batch.steps.iter().filter_map(|step| match step {
            Step::Rows(tables) if batch.copy.is_some() => Some(tables),
            _ => None,
        });
        rows.flatten().any(|table| {
            let oldest = table.rows.iter().map(|op| op.version).min();
            oldest <= self.replica.forgotten.get(&table.layout.source).copied()
        })
    }

    /// A second worker takes the sink over; the first does not know, and must not write any more.
    fn depose(&mut self, mut first: MemorySink, batch: &Batch) -> Result<End, Failure> {
        self.note("a second worker takes over");
        self.counts.deposed += 1;
        self.replica.target.depose(NAME);
        let mut second = self.replica.target.sink(NAME);
        let elected = now(second.open()).map_err(|error| error.to_string())?;
        if elected == Elected::No {
            return Err("the lock is free, and yet nobody is elected".to_owned());
        }
        match now(first.apply(batch)) {
            Err(SinkError::Fenced) => {}
            other => return Err(format!("a deposed worker still writes: {other:?}")),
        }
        self.check_target()?;
        // It opens again as the next life's worker.
        self.replica.sink = Some(second);
        Ok(End::Over)
    }

    fn ignore_guard(&mut self, sink: &mut MemorySink) -> Result<(), Failure> {
        let Some(row) = self.replica.position() else {
            return Ok(());
        };
        let from = row.checkpoint;
        let position = from.position.0;
        let above = Version {
            seq: position.seq.saturating_add(1),
            ..position
        };
        let at = self.rng.random_range(0..=self.replica.applied.len() / 2);
        let Some(old) = self.replica.applied.get(at) else {
            return Ok(());
        };
        let mut steps = old.steps.clone();
        steps.retain(|step| matches!(step, Step::Rows(_)));
        for step in &mut steps {
            if let Step::Rows(tables) = step {
                tables
                    .iter_mut()
                    .flat_map(|table| &mut table.rows)
                    .for_each(|op| op.version = above);
            }
        }
        if steps.is_empty() {
            return Ok(());
        }
        self.sabotaged = true;
        let batch = Batch {
            from,
            to: from,
            copy: None,
            steps,
            commit: true,
        };
        now(sink.apply(&batch)).map_err(|error| error.to_string())?;
        self.check_target()
    }
}
