//! What may happen where a batch meets the target: a crash before or behind it, a target that fails for a moment, a
//! second worker, and sabotage.

use millrace_event::Version;
use millrace_sink::batch::{Batch, Step};
use millrace_sink::memory::MemorySink;
use millrace_sink::sink::{Elected, Sink, SinkError};
use rand::Rng;

use super::{End, NAME, now};
use crate::world::{Failure, Sabotage, World};

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
        let mut batch = batch.clone();
        if !batch.commit && self.sabotage(Sabotage::CommitHalf) {
            batch.commit = true;
            self.sabotaged = true;
        }
        let applied = now(sink.apply(&batch)).map_err(|error| format!("apply failed: {error}"))?;
        if applied.dead() > 0 {
            return Err(format!(
                "rows were set aside: {:?}",
                self.replica.target.letters()
            ));
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
