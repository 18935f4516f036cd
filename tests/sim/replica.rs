//! The lives of a sink: what its loop does, turn by turn, around the real machines and the memory target.

mod applying;

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;
use futures_util::FutureExt;
use millrace_config::{Columns, OnDelete, OnRowError, OnSchemaChange, OnTruncate, Table};
use millrace_event::work::{CopyRequest, CopyStatus, TableRequest, Wanted};
use millrace_event::{ChangeEvent, TableName, Version, decode, decode_line};
use millrace_sink::batch::{Batch, Checkpoint, PositionRow};
use millrace_sink::copying::{CopyMark, Copying, Input as CopyInput};
use millrace_sink::memory::{MemorySink, MemoryTarget};
use millrace_sink::progress::CopyState;
use millrace_sink::row::TableLayout;
use millrace_sink::sink::{Elected, Sink};
use millrace_sink::worker::{BatchLimits, Input, TableRule, Worker};
use rand::Rng;

use crate::copier::Request;
use crate::reader::{Body, Reader};
use crate::world::{Failure, Sabotage, World};

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
    pub(crate) is_shown: bool,
    /// Batches that were applied, for sabotage.
    applied: Vec<Batch>,
}

enum Stage {
    /// No life.
    Down,
    /// Opened; a copy is missing, and capture has not taken up the request yet.
    Asking(Request),
    /// Rows are copied.
    Copying(Request, Box<Copying>, u64),
    /// The stream is followed.
    Following(Box<Worker>, Reader, Option<Box<Batch>>),
}

/// How applying a batch ended.
enum End {
    Applied,
    /// The life is over.
    Over,
}

impl Replica {
    pub(crate) fn new(rows: usize) -> Self {
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
        }
    }

    pub(crate) fn position(&self) -> Option<PositionRow> {
        self.target.position(NAME)
    }

    pub(crate) fn disconnect(&mut self) {
        if let Stage::Following(_, reader, _) = &mut self.stage {
            reader.disconnect();
        }
    }

    pub(crate) fn sink(&mut self) -> Option<&mut MemorySink> {
        self.sink.as_mut()
    }

    /// Whether the target's tables have been compared with the source since the copies were complete.
    pub(crate) fn is_consistent(&self) -> bool {
        self.is_shown
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
            Stage::Asking(request) => self.ask(request),
            Stage::Copying(request, machine, read_seq) => self.copy(request, machine, read_seq),
            Stage::Following(worker, reader, flight) => self.follow(worker, reader, flight),
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
            checkpoint,
            mut copy,
            ..
        } = row;
        if copy.stream.is_empty() {
            let Some(to) = self.newest() else {
                return Ok(());
            };
            copy.stream = "the only one".to_owned();
            for spec in self.source.specs.iter().filter(|spec| spec.configured) {
                let claim = to.into();
                let pending = CopyState::Pending { claim, began_us: 0 };
                copy.tables.insert(spec.name.clone(), pending);
            }
            let batch = Batch {
                from: checkpoint,
                to,
                copy: Some(copy),
                steps: Vec::new(),
                commit: true,
            };
            self.apply(&batch)?;
            return Ok(());
        }
        self.note(format!(
            "sink opened at {} {}",
            checkpoint.stream_seq, checkpoint.position
        ));
        if !copy.is_complete() {
            let remaining = copy.tables.iter().filter(|(_, state)| !state.is_copied());
            let tables: Vec<TableName> = remaining.map(|(table, _)| table.clone()).collect();
            let known = self.copier.request.clone();
            let known =
                known.filter(|known| tables.iter().all(|table| known.tables.contains(table)));
            let request = known.unwrap_or_else(|| Request {
                id: self.copier.next_id(),
                tables,
            });
            self.copier.request = Some(request.clone());
            self.replica.stage = Stage::Asking(request);
            return Ok(());
        }
        self.copier.request = None;
        if !copy.is_whole() {
            // The sink has stayed where the loads' changes begin: nothing is to be caught up with.
            for state in copy.tables.values_mut() {
                if let CopyState::Loaded { lsn, claim } = state {
                    assert_eq!(claim.position, checkpoint.position, "the sink stayed");
                    *state = CopyState::Copied { lsn: *lsn };
                }
            }
            let batch = Batch {
                from: checkpoint,
                to: checkpoint,
                copy: Some(copy.clone()),
                steps: Vec::new(),
                commit: true,
            };
            if let End::Over = self.apply(&batch)? {
                return Ok(());
            }
        }
        let rule = TableRule {
            deletes: true,
            truncates: true,
        };
        let tables = self.source.specs.iter().filter(|spec| spec.configured);
        let rules = tables
            .map(|spec| (spec.name.clone(), rule.clone()))
            .collect();
        let worker = Worker::new(self.replica.limits, rules, checkpoint, copy, self.now);
        let reader = Reader::new(checkpoint.stream_seq, checkpoint.position);
        let seen = |event: &crate::transaction::Expected| checkpoint.position.0 >= event.version;
        self.replica.cursor = self.source.expected.partition_point(seen);
        self.replica.stage = Stage::Following(Box::new(worker), reader, None);
        Ok(())
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

    fn ask(&mut self, request: Request) -> Result<(), Failure> {
        let taken = self
            .copier
            .status
            .as_ref()
            .is_some_and(|status| status.request == request.id);
        if !taken {
            self.replica.stage = Stage::Asking(request);
            return Ok(());
        }
        let row = self.replica.position().unwrap_or_default();
        let wanted = request.tables.iter().map(|table| TableRequest {
            table: table.clone(),
            began_us: row
                .copy
                .tables
                .get(table)
                .and_then(CopyState::copy_began_us)
                .unwrap_or_default(),
            rows: Wanted::Load,
        });
        let wanted = CopyRequest {
            id: request.id.clone(),
            tables: wanted.collect(),
            binary: false,
        };
        let limits = self.replica.limits;
        let mut machine = Copying::new(wanted, limits, HashMap::new(), row.copy);
        for table in &request.tables {
            machine.set_layout(self.layout(table, None)?);
        }
        self.replica.stage = Stage::Copying(request, Box::new(machine), 0);
        Ok(())
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

    fn copy(
        &mut self,
        request: Request,
        mut machine: Box<Copying>,
        mut read_seq: u64,
    ) -> Result<(), Failure> {
        for _ in 0..self.rng.random_range(1..6) {
            let stored = self.copier.stream.get(read_seq + 1).cloned();
            let checkpoint = self.replica.position().unwrap_or_default().checkpoint;
            if let Some(batch) = machine.poll(checkpoint, stored.is_none())
                && let End::Over = self.apply(&batch)?
            {
                return Ok(());
            }
            let Some(stored) = stored else {
                let row = self.replica.position().unwrap_or_default();
                let status = self
                    .copier
                    .status
                    .as_ref()
                    .filter(|status| status.request == request.id);
                // The stream may end before what was told: the broker lost it.
                let end = self.copier.stream.last_seq();
                let told = |status: &CopyStatus| {
                    let told = |table| status.copied.contains(table);
                    request.tables.iter().all(told) && read_seq >= status.last_seq.min(end)
                };
                if row.copy.is_complete() || status.is_some_and(told) {
                    self.end_copy(row.copy.is_complete());
                    return Ok(());
                }
                break;
            };
            read_seq += 1;
            let mark = stored
                .message
                .mark
                .as_ref()
                .ok_or("a copy stream's message has a mark")?;
            let mark = CopyMark {
                request: &mark.request,
                attempt: mark.attempt,
                number: mark.number,
            };
            let payload = &stored.message.payload;
            let copied: Option<millrace_event::work::Copied> = serde_json::from_slice(payload).ok();
            let handled = match &copied {
                Some(copied) => {
                    if machine.misses(&copied.table, None) {
                        machine.set_layout(self.layout(&copied.table, None)?);
                    }
                    machine.handle(CopyInput::Copied { mark, copied })
                }
                None => {
                    let events = events_above(payload, Version::ZERO)?;
                    if let Some(first) = events.first() {
                        let (table, version) =
                            (first.source.table_name(), &first.source.table_version);
                        if machine.misses(&table, Some(version)) {
                            machine.set_layout(self.layout(&table, None)?);
                        }
                    }
                    machine.handle(CopyInput::Rows {
                        mark,
                        payload,
                        events: &events,
                    })
                }
            };
            if let Err(error) = handled {
                self.note(error);
                self.end_copy(false);
                return Ok(());
            }
        }
        self.replica.stage = Stage::Copying(request, machine, read_seq);
        Ok(())
    }

    fn end_copy(&mut self, complete: bool) {
        self.note(if complete {
            "copies complete"
        } else {
            "a part of the copy was lost"
        });
        self.counts.copies_lost += u64::from(!complete);
        self.copier.request = None;
        self.replica.stage = Stage::Down;
    }

    fn follow(
        &mut self,
        mut worker: Box<Worker>,
        mut reader: Reader,
        mut flight: Option<Box<Batch>>,
    ) -> Result<(), Failure> {
        if self.fault(0.04) {
            reader.disconnect();
        }
        if self.fault(0.04) {
            reader.rewind(
                reader
                    .stream_seq
                    .saturating_sub(self.rng.random_range(1..10)),
            );
        }
        if reader.stream_seq < self.broker.last_seq() && self.sabotage(Sabotage::SkipMessage) {
            reader.skip();
            self.sabotaged = true;
        }
        for _ in 0..self.rng.random_range(1..30) {
            if !worker.wants_delivery() {
                break;
            }
            let searches = reader.searches;
            let delivery = reader.next(&self.broker);
            self.counts.resumes_searched += reader.searches - searches;
            let Some(delivery) = delivery else {
                worker
                    .handle(Input::Drained)
                    .map_err(|error| error.to_string())?;
                break;
            };
            self.check_delivery(&delivery)?;
            let stream_seq = delivery.stream_seq;
            match &delivery.body {
                Body::Control(control) => worker.handle(Input::Control {
                    stream_seq,
                    control,
                }),
                Body::Changes(payload) => {
                    let events = events_above(payload, delivery.floor.0)?;
                    for event in &events {
                        if let Some(table) = worker.missing_layout(event) {
                            if let Some(batch) = flight.take() {
                                let End::Applied = self.apply(&batch)? else {
                                    return Ok(());
                                };
                                worker
                                    .handle(Input::Flushed)
                                    .map_err(|error| error.to_string())?;
                            }
                            worker.set_layout(
                                self.layout(&table, Some(&event.source.table_version))?,
                            );
                        }
                    }
                    worker.handle(Input::Changes {
                        stream_seq,
                        payload,
                        events: &events,
                    })
                }
            }
            .map_err(|error| error.to_string())?;
            flight = flight.or(worker.poll(self.now).map(Box::new));
        }
        flight = flight.or(worker.poll(self.now).map(Box::new));
        if (!self.faults || self.rng.random_bool(0.6))
            && let Some(batch) = flight.take()
        {
            let End::Applied = self.apply(&batch)? else {
                return Ok(());
            };
            worker
                .handle(Input::Flushed)
                .map_err(|error| error.to_string())?;
            flight = worker.poll(self.now).map(Box::new);
        }
        self.replica.stage = Stage::Following(worker, reader, flight);
        Ok(())
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
