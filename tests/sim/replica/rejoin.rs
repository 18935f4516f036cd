//! Tables that were loaded catch up with what was changed meanwhile, and rejoin their sink.

use std::collections::BTreeMap;

use millrace_consumer::Token;
use millrace_event::{Lsn, Position, TableName};
use millrace_sink::batch::{Batch, Checkpoint};
use millrace_sink::catching::{Catching, Part};
use millrace_sink::progress::{Claim, CopyProgress, CopyState};

use super::{End, beside, events_above};
use crate::reader::{Body, Delivery, Reader};
use crate::world::{Failure, World};

/// The loaded tables that are near their sink, which has passed the point that their loads show.
pub(super) fn near(progress: &CopyProgress, at: Checkpoint, near_messages: u64) -> Vec<TableName> {
    progress.those(|state| match state {
        CopyState::Loaded { lsn, claim } => {
            at.position.commit_lsn() >= *lsn && claim.stream_seq + near_messages >= at.stream_seq
        }
        _ => false,
    })
}

/// Reads what loaded tables have missed.
pub(super) struct CatchUp {
    reader: Reader,
    catching: Catching,
    /// With the consistent points of their loads, and how far they were at the start.
    tables: BTreeMap<TableName, (Lsn, Claim)>,
    reached: Token,
}

impl CatchUp {
    fn begin(world: &World, progress: &CopyProgress, tables: &[TableName]) -> Option<Self> {
        let loaded = tables.iter().filter_map(|table| {
            let CopyState::Loaded { lsn, claim } = progress.tables.get(table)? else {
                return None;
            };
            Some((table.clone(), (*lsn, *claim)))
        });
        let tables: BTreeMap<_, _> = loaded.collect();
        let first = tables.values().map(|(_, claim)| *claim);
        let first = first.min_by_key(|claim| claim.position)?;
        let from = Token {
            stream_seq: first.stream_seq,
            position: first.position,
        };
        Some(Self {
            reader: Reader::new(first.stream_seq, first.position),
            catching: Catching::new(world.replica.limits, from),
            tables,
            reached: from,
        })
    }

    /// The batch that applies a part, and moves the tables on.
    fn batch(&self, progress: &CopyProgress, at: Checkpoint, part: Part) -> Batch {
        let after = Claim {
            stream_seq: part.after.stream_seq,
            position: part.after.position,
        };
        let mut progress = progress.clone();
        for table in self.tables.keys() {
            if let Some(CopyState::Loaded { claim, .. }) = progress.tables.get_mut(table)
                && claim.position < after.position
            {
                *claim = after;
            }
        }
        let mut batch = beside(at, progress);
        batch.steps = part.steps;
        batch
    }
}

impl World {
    /// Takes a message, as far as it lies below the sink's own position.
    fn take_missed(
        &mut self,
        behind: &mut CatchUp,
        delivery: &Delivery,
        end: Position,
    ) -> Result<Option<Part>, Failure> {
        if let Body::Changes(payload) = &delivery.body {
            for event in events_above(payload, delivery.floor.0)? {
                let table = event.source.table_name();
                let Some((lsn, claim)) = behind.tables.get(&table) else {
                    continue;
                };
                let version = event.source.version;
                let position = Position::from(version);
                let missed = position > claim.position && position <= end;
                if missed && version.commit_lsn >= *lsn {
                    let layout = self.layout(&table, Some(&event.source.table_version))?;
                    let pushed = behind.catching.push(&layout, &event, payload);
                    pushed.map_err(|error| error.to_string())?;
                }
            }
        }
        behind.reached = Token {
            stream_seq: delivery.stream_seq,
            position: delivery.position,
        };
        if delivery.position > end {
            return Ok(None);
        }
        Ok(behind.catching.end_message(behind.reached))
    }

    /// The next batch of tables that are far behind.
    pub(super) fn catch_up(
        &mut self,
        behind: &mut Option<CatchUp>,
        progress: &CopyProgress,
        at: Checkpoint,
    ) -> Result<Option<Batch>, Failure> {
        if behind.is_none() {
            let is_loaded = |state: &CopyState| matches!(state, CopyState::Loaded { .. });
            let missed = |state: &CopyState| {
                is_loaded(state)
                    && state
                        .claim()
                        .is_some_and(|claim| claim.position < at.position)
            };
            let is_near = !near(progress, at, self.replica.near_messages).is_empty();
            if progress.those(missed).is_empty() || is_near {
                return Ok(None);
            }
            *behind = CatchUp::begin(self, progress, &progress.those(is_loaded));
        }
        let Some(catching) = behind else {
            return Ok(None);
        };
        for _ in 0..20 {
            if catching.reached.position >= at.position {
                let part = catching.catching.flush();
                let batch = part.map(|part| catching.batch(progress, at, part));
                *behind = None;
                return Ok(batch);
            }
            let Some(delivery) = catching.reader.next(&self.broker) else {
                return Ok(None);
            };
            if let Some(part) = self.take_missed(catching, &delivery, at.position)? {
                self.counts.caught_up += 1;
                return Ok(Some(catching.batch(progress, at, part)));
            }
        }
        Ok(None)
    }

    /// Applies the changes of near tables up to their sink's own position, where they rejoin. Returns how the tables
    /// stand then; `None` where the life has ended.
    pub(super) fn rejoin(
        &mut self,
        mut progress: CopyProgress,
        at: Checkpoint,
    ) -> Result<Option<CopyProgress>, Failure> {
        let near = near(&progress, at, self.replica.near_messages);
        let Some(mut behind) = CatchUp::begin(self, &progress, &near) else {
            return Ok(Some(progress));
        };
        let mut connecting = 0;
        while behind.reached.position < at.position {
            let Some(delivery) = behind.reader.next(&self.broker) else {
                connecting += 1;
                // The broker has lost what comes next, and gets it again.
                if connecting > 3 {
                    return Ok(None);
                }
                continue;
            };
            if let Some(part) = self.take_missed(&mut behind, &delivery, at.position)? {
                self.counts.caught_up += 1;
                let batch = behind.batch(&progress, at, part);
                if let End::Over = self.apply(&batch)? {
                    return Ok(None);
                }
                progress = batch.copy.unwrap_or(progress);
            }
        }
        for (table, (lsn, _)) in &behind.tables {
            let copied = CopyState::Copied { lsn: *lsn };
            progress.tables.insert(table.clone(), copied);
        }
        let mut batch = beside(at, progress.clone());
        batch.steps = behind.catching.finish();
        Ok(match self.apply(&batch)? {
            End::Applied => Some(progress),
            End::Over => None,
        })
    }
}
