//! The parts of a request that are read in chunks, as `millrace_cdc`'s copier reads them, around the real rule.

use std::collections::VecDeque;

use bytes::Bytes;
use millrace_cdc::Committed;
use millrace_cdc::rule::{self, Recent, Snapshot, Wait};
use millrace_event::work::{Copied, Part, TableRequest, Wanted};
use millrace_event::{Lsn, subject};
use rand::Rng;

use super::payload;
use crate::source::{EPOCH, Row};
use crate::world::{Sabotage, World};

/// What is known of commits, for one request after another.
pub(crate) struct Reading {
    request: String,
    recent: Recent,
    /// The mark that is looked out for, and its commit LSN once it came.
    mark: (u64, Option<Lsn>),
    /// Where the request began; zero before.
    begun: Lsn,
}

impl Reading {
    /// The reader of the WAL tells how far it is, and who committed.
    pub(crate) fn tell(&mut self, position: Lsn, commits: &[Committed]) {
        for committed in commits {
            self.recent.committed(committed.xid, committed.commit_lsn);
            if committed.mark == Some(self.mark.0) {
                self.mark.1 = Some(committed.commit_lsn);
            }
        }
        self.recent.read_to(position);
    }
}

/// One turn at a request's chunks.
pub(super) struct Turn {
    tables: VecDeque<TableRequest>,
    /// The number of the last message.
    number: u64,
    /// Rows of a chunk.
    limit: usize,
    /// Behind which key the next chunk begins.
    after: Option<Vec<String>>,
    /// The file that the newest chunk was read from.
    file: Option<u32>,
    at: At,
}

/// What comes next. Each may be long after the one before.
enum At {
    /// The request's mark.
    Begin,
    /// The reader has seen that, or the barrier's.
    Marked,
    /// The first chunk of a table.
    Table,
    /// The reader's position before the snapshot.
    Position,
    /// The snapshot.
    Snapshot(Lsn),
    /// The mark behind the rows.
    Mark(Chunk),
    /// The reader has seen that.
    Reach(Chunk),
    /// The chunk's messages and its end.
    Publish(Chunk, Option<Lsn>),
}

struct Chunk {
    messages: VecDeque<Bytes>,
    rows: u64,
    last_key: Option<Vec<String>>,
    is_last: bool,
}

impl World {
    pub(super) fn begin_chunks(&mut self, tables: Vec<TableRequest>) -> Turn {
        let status = self.copier.status.as_ref();
        let request = status.map(|status| status.request.clone());
        let request = request.unwrap_or_default();
        // Sometimes so few commits are remembered that the barrier must be taken anew.
        let commits_max = [3, rule::COMMITS_MAX][usize::from(self.rng.random_bool(0.8))];
        let told = self.life.as_ref().map_or(Lsn::ZERO, |life| life.told);
        let reading = self.copier.reading.get_or_insert_with(|| Reading {
            request: String::new(),
            recent: Recent::new(told, commits_max),
            mark: (0, None),
            begun: Lsn::ZERO,
        });
        if reading.request != request {
            (reading.request, reading.begun) = (request, Lsn::ZERO);
        }
        let is_begun = reading.begun > Lsn::ZERO;
        Turn {
            tables: tables.into(),
            number: 0,
            limit: self.rng.random_range(1..5),
            after: None,
            file: None,
            at: if is_begun { At::Table } else { At::Begin },
        }
    }

    /// The next step; `None` where the turn has ended.
    pub(super) fn chunk_step(&mut self, mut turn: Box<Turn>) -> Option<Box<Turn>> {
        turn.at = match std::mem::replace(&mut turn.at, At::Table) {
            At::Begin => {
                let lacks = self.copier.reading.as_ref()?.recent.lacks_barrier();
                match lacks {
                    true => self.take_barrier(),
                    false => _ = self.leave_mark(),
                }
                At::Marked
            }
            At::Marked => {
                let still_wanted = self.copier.still_wanted();
                let reading = self.copier.reading.as_mut()?;
                match reading.mark.1 {
                    Some(lsn) => {
                        if reading.begun == Lsn::ZERO {
                            reading.begun = lsn;
                            At::Table
                        } else {
                            At::Position
                        }
                    }
                    None if still_wanted => At::Marked,
                    None => return None,
                }
            }
            At::Table => {
                let wanted = turn.tables.front()?;
                let applied = self.copier.applied.as_ref().filter(|applied| {
                    let status = self.copier.status.as_ref();
                    status.is_some_and(|status| status.request == applied.request)
                });
                let mut found = applied.iter().flat_map(|applied| &applied.after);
                let found = found.find(|(table, _)| *table == wanted.table);
                turn.after = match (&wanted.rows, found) {
                    (Wanted::Chunks { .. }, Some((_, after))) => Some(after.clone()),
                    (Wanted::Chunks { after, .. }, None) => after.clone(),
                    _ => None,
                };
                turn.file = None;
                At::Position
            }
            At::Position if !self.copier.still_wanted() => return None,
            At::Position => At::Snapshot(self.copier.reading.as_ref()?.recent.position()),
            At::Snapshot(m) => self.read_chunk(&mut turn, m)?,
            At::Mark(chunk) => {
                self.leave_mark();
                At::Reach(chunk)
            }
            At::Reach(chunk) if self.breaks(Sabotage::NoReach) => At::Publish(chunk, None),
            At::Reach(chunk) => match self.copier.reading.as_ref()?.mark.1 {
                Some(reach) => At::Publish(chunk, Some(reach)),
                None if self.copier.still_wanted() => At::Reach(chunk),
                None => return None,
            },
            At::Publish(chunk, reach) => self.publish_chunk(&mut turn, chunk, reach)?,
        };
        Some(turn)
    }

    /// Leaves a mark in the WAL; returns its transaction's id.
    fn leave_mark(&mut self) -> u64 {
        let mark = self.rng.random();
        if let Some(reading) = &mut self.copier.reading {
            reading.mark = (mark, None);
        }
        self.source.mark(mark, &mut self.rng)
    }

    fn take_barrier(&mut self) {
        if let Some(reading) = &mut self.copier.reading {
            reading.recent.take_barrier();
        }
        let xid = self.leave_mark();
        let xid = if self.breaks(Sabotage::NoBarrier) {
            0
        } else {
            xid
        };
        if let Some(reading) = &mut self.copier.reading {
            reading.recent.barrier_taken(xid);
        }
    }

    /// Takes a snapshot and reads the rows, if the rule gives them a version.
    fn read_chunk(&mut self, turn: &mut Turn, m: Lsn) -> Option<At> {
        let wanted = turn.tables.front()?.clone();
        let table = self.source.table(&wanted.table);
        // Who empties it holds it.
        let Some(file) = self.source.visible.file(table) else {
            return Some(At::Position);
        };
        let (text, state) = self.source.visible.snapshot();
        let snapshot: Snapshot = text.parse().expect("as Postgres prints it");
        let (low, behind) = (self.sabotage, self.source.wal_end);
        let reading = self.copier.reading.as_mut()?;
        let begun = match low {
            Sabotage::NoBegin => Lsn::ZERO,
            _ => reading.begun,
        };
        let judged = rule::version(m, &snapshot, &reading.recent, begun);
        reading.recent.shown(&snapshot);
        let rewritten = turn.file.is_some_and(|before| before != file);
        turn.file = Some(file);
        let version = match judged {
            Ok(_) if rewritten => {
                self.counts.chunks_rewritten += 1;
                return Some(At::Position);
            }
            Ok(version) => {
                self.counts.chunks_below += u64::from(version < m);
                version
            }
            Err(Wait::Barrier) => {
                self.take_barrier();
                return Some(At::Marked);
            }
            Err(Wait::Older) => {
                self.counts.chunks_older += 1;
                return Some(At::Position);
            }
            Err(Wait::Limbo) if self.breaks(Sabotage::LowWatermark) => m,
            Err(Wait::Limbo) => {
                self.counts.chunks_limbo += 1;
                return Some(At::Position);
            }
        };
        let is_weak = self.sabotage == Sabotage::NoBegin
            && self
                .copier
                .reading
                .as_ref()
                .is_some_and(|reading| version < reading.begun);
        self.sabotaged |= is_weak;
        let version = match low {
            Sabotage::LowWatermark if self.breaks(low) => m,
            Sabotage::WalAfter if self.breaks(low) => behind,
            _ => version,
        };
        let rows: Vec<(&Vec<String>, &Row)> = match &wanted.rows {
            Wanted::Keys { keys } => keys
                .iter()
                .filter_map(|key| Some((key, &state[table].get(key)?.1)))
                .collect(),
            _ => {
                let behind =
                    |key: &&Vec<String>| turn.after.as_ref().is_none_or(|after| *key > after);
                let keys = state[table].keys().filter(behind).take(turn.limit);
                keys.map(|key| (key, &state[table][key].1)).collect()
            }
        };
        let rows_a_message = self.rng.random_range(1..4);
        let spec = &self.source.specs[table];
        let messages = rows.chunks(rows_a_message).map(|rows| {
            let rows: Vec<_> = rows.iter().map(|(_, row)| *row).collect();
            payload(spec, version, &rows)
        });
        let chunk = Chunk {
            messages: messages.collect(),
            rows: rows.len() as u64,
            last_key: rows.last().map(|(key, _)| (*key).clone()),
            is_last: rows.len() < turn.limit,
        };
        let line = format!(
            "chunk of {} at {version}: {} rows, m {m}, snapshot {text}",
            wanted.table, chunk.rows
        );
        self.note(line);
        self.counts.chunks += 1;
        Some(At::Mark(chunk))
    }

    /// The next message of a chunk, or its end.
    fn publish_chunk(
        &mut self,
        turn: &mut Turn,
        mut chunk: Chunk,
        reach: Option<Lsn>,
    ) -> Option<At> {
        let wanted = turn.tables.front()?.clone();
        if let Some(payload) = chunk.messages.pop_front() {
            let subject = subject::copy("shop", "replica", &wanted.table);
            self.publish_copy(&mut turn.number, subject, payload, reach);
            return Some(At::Publish(chunk, reach));
        }
        let is_keys = matches!(wanted.rows, Wanted::Keys { .. });
        let after = chunk.last_key.clone();
        let last = chunk.is_last || self.breaks(Sabotage::LastTooSoon);
        let part = match is_keys {
            true => Part::Keys,
            false => Part::Chunk { after, last },
        };
        let copied = Copied {
            table: wanted.table.clone(),
            epoch: EPOCH,
            lsn: self.copier.reading.as_ref()?.begun,
            rows: chunk.rows,
            part,
        };
        self.publish_end(&mut turn.number, &copied, reach);
        if is_keys || last {
            let last_seq = self.copier.stream.last_seq();
            let status = self.copier.status.as_mut()?;
            status.last_seq = last_seq;
            status.copied.push(wanted.table);
            turn.tables.pop_front();
            return Some(At::Table);
        }
        turn.after = chunk.last_key.or(turn.after.take());
        Some(At::Position)
    }
}
