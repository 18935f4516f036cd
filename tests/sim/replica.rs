//! The lives of a sink: what its loop does, turn by turn, around the real machines and the memory target.

mod applying;
mod beside;
mod following;
mod rejoin;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use futures_util::FutureExt;
use millrace_config::{Columns, OnDelete, OnRowError, OnSchemaChange, OnTruncate, Table};
use millrace_event::{ChangeEvent, TableName, Version, decode, decode_line};
use millrace_sink::batch::{Batch, Checkpoint, PositionRow};
use millrace_sink::memory::{MemorySink, MemoryTarget};
use millrace_sink::progress::{Chunks, CopyProgress, CopyState};
use millrace_sink::row::TableLayout;
use millrace_sink::sink::{Elected, Sink};
use millrace_sink::worker::{BatchLimits, TableRule, Worker};
use rand::Rng;

use self::following::Following;
use crate::check;
use crate::reader::Reader;
use crate::source::EPOCH;
use crate::world::{Failure, World};

/// The sink's name.
pub(crate) const NAME: &str = "replica";

/// A sink and its target.
pub(crate) struct Replica {
    pub(crate) target: MemoryTarget,
    pub(crate) limits: BatchLimits,
    sink: Option<MemorySink>,
    stage: Stage,
    /// The first expected event that was not delivered in this life.
    pub(crate) cursor: usize,
    /// The transactions that the target showed when it was looked at last.
    pub(crate) shown: usize,
    /// Whether all tables were compared with the source at once.
    pub(crate) is_shown: bool,
    /// Batches that were applied, for sabotage.
    applied: Vec<Batch>,
    /// Up to which version deletes of a table were forgotten.
    forgotten: BTreeMap<TableName, Version>,
    /// Tables whose rows did not all come with one load and the stream.
    pub(crate) mended: BTreeSet<TableName>,
    /// Tables that somebody else has changed, and the order that mends each.
    pub(crate) wrong: BTreeMap<TableName, String>,
    /// A table that is so many messages behind its sink, or fewer, rejoins while the sink waits.
    near_messages: u64,
    /// Names copies of a table, as the sink's clock does.
    clock_us: i64,
}

enum Stage {
    /// No life.
    Down,
    /// The stream is followed, and copies run beside it.
    Following(Box<Following>),
}

/// How applying a batch ended.
enum End {
    Applied,
    /// The life is over.
    Over,
}

impl Replica {
    pub(crate) fn new(rows: usize, near_messages: u64) -> Self {
        Self {
            target: MemoryTarget::new(),
            limits: BatchLimits {
                rows,
                bytes: 1_000_000,
            },
            sink: None,
            stage: Stage::Down,
            cursor: 0,
            shown: 0,
            is_shown: false,
            applied: Vec::new(),
            forgotten: BTreeMap::new(),
            mended: BTreeSet::new(),
            wrong: BTreeMap::new(),
            near_messages,
            clock_us: 0,
        }
    }

    pub(crate) fn position(&self) -> Option<PositionRow> {
        self.target.position(NAME)
    }

    pub(crate) fn disconnect(&mut self) {
        if let Stage::Following(following) = &mut self.stage {
            following.reader.disconnect();
        }
    }

    pub(crate) fn sink(&mut self) -> Option<&mut MemorySink> {
        self.sink.as_mut()
    }

    /// Whether the target has a transaction open, which would undo what somebody else does.
    pub(crate) fn is_open(&self) -> bool {
        match &self.stage {
            Stage::Down => false,
            Stage::Following(following) => following.is_open(),
        }
    }

    /// Whether a row of a table is incomplete.
    pub(crate) fn is_healing(&self, table: &TableName) -> bool {
        let letters = self.target.letters();
        letters
            .iter()
            .any(|letter| letter.open && letter.table == *table)
    }

    /// Whether all tables have all their rows, and those are right.
    pub(crate) fn is_whole(&self, copy: &CopyProgress) -> bool {
        let healing = |table| self.is_healing(table);
        copy.is_whole() && self.wrong.is_empty() && !copy.tables.keys().any(healing)
    }

    fn now_us(&mut self) -> i64 {
        self.clock_us += 1;
        self.clock_us
    }
}

/// The memory target never waits.
pub(crate) fn now<T>(future: impl Future<Output = T>) -> T {
    future
        .now_or_never()
        .expect("the memory target never waits")
}

impl World {
    /// One turn of the sink's loop.
    pub(crate) fn replica_turn(&mut self) -> Result<(), Failure> {
        match std::mem::replace(&mut self.replica.stage, Stage::Down) {
            Stage::Down => self.open_sink(),
            Stage::Following(following) => self.follow(following),
        }
    }

    pub(crate) fn kill_replica(&mut self) {
        self.note("sink killed");
        self.replica.stage = Stage::Down;
        self.replica.sink = None;
    }

    fn open_sink(&mut self) -> Result<(), Failure> {
        let target = self.replica.target.clone();
        let sink = self.replica.sink.get_or_insert_with(|| target.sink(NAME));
        let Elected::Yes(row) = now(sink.open()).map_err(|error| error.to_string())? else {
            return Err("nobody else holds the sink, and yet it is not elected".to_owned());
        };
        self.counts.sink_lives += 1;
        if let Ok(Elected::Yes(_)) = now(target.sink(NAME).open()) {
            return Err("two workers were elected".to_owned());
        }
        let PositionRow {
            checkpoint, copy, ..
        } = row;
        if copy.stream.is_empty() {
            return self.register(checkpoint, copy);
        }
        self.note(format!(
            "sink opened at {} {}",
            checkpoint.stream_seq, checkpoint.position
        ));
        let Some(copy) = self.rejoin(copy, checkpoint)? else {
            return Ok(());
        };
        let followed = copy.those(CopyState::is_followed);
        let rule = TableRule {
            deletes: true,
            truncates: true,
        };
        let rules = followed.iter().map(|name| (name.clone(), rule.clone()));
        let (limits, rules) = (self.replica.limits, rules.collect());
        let worker = Worker::new(limits, rules, checkpoint, copy.clone(), self.now);
        let reader = Reader::new(checkpoint.stream_seq, checkpoint.position);
        let seen = |event: &crate::transaction::Expected| checkpoint.position.0 >= event.version;
        self.replica.cursor = self.source.expected.partition_point(seen);
        let following = Following::new(worker, reader, followed, copy);
        self.replica.stage = Stage::Following(Box::new(following));
        Ok(())
    }

    /// A new sink begins behind the newest message. Some of its tables it may have had before: nobody followed their
    /// changes meanwhile, and their rows are still there.
    fn register(&mut self, from: Checkpoint, mut copy: CopyProgress) -> Result<(), Failure> {
        let Some(to) = self.newest() else {
            return Ok(());
        };
        copy.stream = "the only one".to_owned();
        let old = [0.0, 0.0, 0.5, 1.0][self.rng.random_range(0..4)];
        let specs = Arc::clone(&self.source.specs);
        for spec in specs.iter().filter(|spec| spec.configured) {
            let began_us = self.replica.now_us();
            let state = if self.rng.random_bool(old) {
                self.replica.mended.insert(spec.name.clone());
                CopyState::Chunks(Chunks::begin(to.position, None, began_us))
            } else {
                let claim = to.into();
                CopyState::Pending { claim, began_us }
            };
            copy.tables.insert(spec.name.clone(), state);
        }
        let old = copy.those(|state| matches!(state, CopyState::Chunks(_)));
        let mut batch = beside(from, copy);
        batch.to = to;
        if let End::Applied = self.apply(&batch)? {
            for table in old {
                for _ in 0..self.rng.random_range(0..6) {
                    self.spoil(&table, Version::new(EPOCH, to.position.commit_lsn(), 0));
                }
            }
        }
        Ok(())
    }

    /// Somebody else changes a row of the target's, up to a version.
    pub(crate) fn spoil(&mut self, table: &TableName, up_to: Version) {
        let at = self.source.table(table);
        let specs = Arc::clone(&self.source.specs);
        let spec = &specs[at];
        let states = &self.source.states;
        let state = &states[self.rng.random_range(0..states.len())][at];
        let version = if self.rng.random_bool(0.5) {
            let lsn = up_to.commit_lsn.0 - self.rng.random_range(0..5_000);
            Version::new(EPOCH, millrace_event::Lsn(lsn), 1).min(up_to)
        } else {
            up_to
        };
        let id = self.rng.random_range(0..12_u32);
        let known = state.iter().nth(id as usize);
        let (key, mut row) = match known {
            Some((key, (_, row))) => (key.clone(), row.clone()),
            None => {
                let row = vec![Some(id.to_string()); spec.columns.len()];
                (spec.key_of(&row), row)
            }
        };
        if self.rng.random_bool(0.5) {
            let last = spec.columns.len() - 1;
            let value = if spec.key.contains(&last) { 0 } else { last };
            row[value] = Some("spoilt".to_owned());
        }
        let row = (!self.rng.random_bool(0.3)).then(|| (version, check::cells(&row)));
        self.note(format!("spoilt {table} {key:?}: {row:?}"));
        self.replica.target.set(table, check::key(&key), row);
    }

    /// Where a new sink begins; a chunk is no place to begin.
    fn newest(&self) -> Option<Checkpoint> {
        let stream_seq = self.broker.last_seq();
        let stored = self
            .broker
            .get(stream_seq)
            .filter(|stored| stored.message.chunk.is_none())?;
        Some(Checkpoint {
            stream_seq,
            position: stored.position,
            source_ts_us: 0,
        })
    }

    fn layout(
        &mut self,
        table: &TableName,
        version: Option<&str>,
    ) -> Result<std::sync::Arc<TableLayout>, Failure> {
        let schema = self
            .schemas
            .iter()
            .find(|((name, of), _)| name == table && version.is_none_or(|version| version == of));
        let (_, schema) = schema.ok_or("an event names a shape that was never described")?;
        let settings = Table {
            name: table.clone(),
            sinks: vec![NAME.to_owned()],
            target: table.clone(),
            columns: Columns::default(),
            filter: None,
            key: None,
            adopt: false,
            on_delete: OnDelete::Delete,
            on_truncate: OnTruncate::Apply,
            on_schema_change: OnSchemaChange::Evolve,
            on_row_error: OnRowError::Halt,
        };
        let sink = self.replica.sink.as_mut().ok_or("no sink")?;
        let ensured =
            now(sink.ensure_table(schema, None, &settings)).map_err(|error| error.to_string())?;
        Ok(ensured.layout)
    }
}

/// A batch that stores how the tables stand, beside the stream.
fn beside(at: Checkpoint, copy: CopyProgress) -> Batch {
    Batch {
        from: at,
        to: at,
        copy: Some(copy),
        steps: Vec::new(),
        commit: true,
    }
}

/// The events of a payload above a version.
pub(crate) fn events_above(
    payload: &Bytes,
    floor: Version,
) -> Result<Vec<ChangeEvent<'_>>, Failure> {
    let mut events = decode(payload)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| error.to_string())?;
    events.retain(|event| event.source.version > floor);
    Ok(events)
}

/// The layouts of all tables, made without touching the sink's own target.
pub(crate) fn layouts(
    world: &mut World,
) -> Result<BTreeMap<TableName, std::sync::Arc<TableLayout>>, Failure> {
    let tables: Vec<_> = world
        .source
        .specs
        .iter()
        .filter(|spec| spec.configured)
        .map(|spec| spec.name.clone())
        .collect();
    tables
        .into_iter()
        .map(|table| Ok((table.clone(), world.layout(&table, None)?)))
        .collect()
}

/// One line of a message, alone.
pub(crate) fn line(bytes: &Bytes) -> Result<ChangeEvent<'_>, Failure> {
    decode_line(bytes).map_err(|error| error.to_string())
}
