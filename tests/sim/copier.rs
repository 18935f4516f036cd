//! Capture's side of copies: requests, loads under one snapshot, chunks each under one of its own, and the copy stream.

mod chunks;

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use millrace_event::work::{
    BackfillOrder, Copied, CopyApplied, CopyRequest, CopyStatus, Part, TableRequest, Wanted,
};
use millrace_event::{
    Before, Change, Datum, LineEnd, Lsn, Op, TableName, Transaction, subject, write_change,
    write_line_end,
};
use rand::Rng;
use rand::rngs::SmallRng;

pub(crate) use self::chunks::Reading;
use self::chunks::Turn;
use crate::broker::{Broker, Mark, Message};
use crate::source::{EPOCH, Row, TableSpec};
use crate::world::{Sabotage, World};

/// The KV bucket of copies, the copy stream, and what capture does about them.
#[derive(Default)]
pub(crate) struct Copier {
    pub(crate) request: Option<CopyRequest>,
    pub(crate) orders: Vec<BackfillOrder>,
    pub(crate) status: Option<CopyStatus>,
    pub(crate) applied: Option<CopyApplied>,
    pub(crate) stream: Broker,
    attempt: Option<Attempt>,
    /// What is known of commits. It ends with capture's life.
    pub(crate) reading: Option<Reading>,
    /// Attempts ever: their numbers rise, whatever the broker loses.
    attempts: u64,
    names: u64,
}

/// What capture is at.
enum Attempt {
    Load(Load),
    Chunks(Box<Turn>),
}

/// Tables under one snapshot.
struct Load {
    number: u64,
    steps: VecDeque<Step>,
}

enum Step {
    Rows(TableName, Bytes),
    End(Copied),
    Told(TableName),
}

impl Copier {
    /// A new name for a request or an order.
    pub(crate) fn next_name(&mut self) -> String {
        self.names += 1;
        format!("r{}", self.names)
    }

    /// Capture's life has ended.
    pub(crate) fn forget_attempt(&mut self) {
        (self.attempt, self.reading) = (None, None);
    }

    /// The copy stream loses its tail; returns how much.
    pub(crate) fn lose_tail(&mut self, rng: &mut SmallRng) -> u64 {
        let last = self.stream.last_seq();
        let kept = rng.random_range(self.stream.synced()..=last);
        self.stream.crash(kept);
        if rng.random_bool(0.5) {
            self.forget_attempt();
        }
        last - kept
    }

    fn still_wanted(&self) -> bool {
        let asked = self.request.as_ref().map(|request| &request.id);
        asked.is_some() && asked == self.status.as_ref().map(|status| &status.request)
    }
}

impl World {
    /// Looks for a request, or goes on with an attempt.
    pub(crate) fn copier_turn(&mut self) {
        if self.life.is_none() {
            return;
        }
        if self.rng.random_bool(0.1) {
            self.copier.stream.sync(self.now);
        }
        for _ in 0..self.rng.random_range(1..4) {
            match self.copier.attempt.take() {
                Some(Attempt::Load(load)) => self.load_step(load),
                Some(Attempt::Chunks(turn)) => {
                    let turn = self.chunk_step(turn);
                    self.copier.attempt = turn.map(Attempt::Chunks);
                }
                None => self.look(),
            }
        }
    }

    fn look(&mut self) {
        let copier = &mut self.copier;
        let Some(request) = copier.request.clone() else {
            if copier.status.take().is_some() {
                copier.stream = Broker::default();
                copier.applied = None;
            }
            return;
        };
        let status = copier.status.take();
        let status = status.filter(|status| status.request == request.id);
        let mut status = status.unwrap_or_else(|| CopyStatus::new(request.id.clone()));
        // Nothing runs now: what still says that it is loading was cut off.
        if let Some(table) = status.loading.take() {
            status.cut.push(table);
            self.counts.loads_cut += 1;
        }
        let left = request.tables.into_iter();
        let left = left.filter(|wanted| !status.copied.contains(&wanted.table));
        let left = left.filter(|wanted| !status.cut.contains(&wanted.table));
        let left: Vec<TableRequest> = left.collect();
        // Keys come before loads, and loads before chunks.
        let stage = |wanted: &TableRequest| match wanted.rows {
            Wanted::Keys { .. } => 0,
            Wanted::Load => 1,
            Wanted::Chunks { .. } => 2,
        };
        let Some(first) = left.iter().map(stage).min() else {
            self.copier.status = Some(status);
            return;
        };
        let due: Vec<_> = left
            .into_iter()
            .filter(|wanted| stage(wanted) == first)
            .collect();
        self.copier.attempts += 1;
        status.attempt = self.copier.attempts;
        let line = format!(
            "copy {}/{} of {} tables, {}",
            status.request,
            status.attempt,
            due.len(),
            ["keys", "whole", "in chunks"][first]
        );
        self.note(line);
        self.counts.copy_attempts += 1;
        self.copier.status = Some(status);
        let attempt = if first == 1 {
            self.copier.reading = None;
            Attempt::Load(self.begin_load(&due))
        } else {
            Attempt::Chunks(Box::new(self.begin_chunks(due)))
        };
        self.copier.attempt = Some(attempt);
    }

    fn begin_load(&mut self, tables: &[TableRequest]) -> Load {
        let (lsn, state) = self.source.snapshot();
        let claimed = if self.breaks(Sabotage::CopyTooNew) {
            Lsn(lsn.0 + 4_000)
        } else {
            lsn
        };
        let rows_a_message = self.rng.random_range(1..4);
        let mut steps = VecDeque::new();
        for TableRequest { table: name, .. } in tables {
            let at = self.source.table(name);
            let spec = &self.source.specs[at];
            let rows: Vec<&Row> = state[at].values().map(|(_, row)| row).collect();
            for some in rows.chunks(rows_a_message) {
                steps.push_back(Step::Rows(name.clone(), payload(spec, claimed, some)));
            }
            let rows = rows.len() as u64;
            steps.push_back(Step::End(Copied {
                table: name.clone(),
                epoch: EPOCH,
                lsn: claimed,
                rows,
                part: Part::Load,
            }));
            steps.push_back(Step::Told(name.clone()));
        }
        Load { number: 0, steps }
    }

    fn load_step(&mut self, mut load: Load) {
        let (Some(step), Some(status)) = (load.steps.pop_front(), &mut self.copier.status) else {
            return;
        };
        match step {
            Step::Told(table) => {
                status.last_seq = self.copier.stream.last_seq();
                status.loading = None;
                status.copied.push(table);
            }
            Step::Rows(table, payload) => {
                let subject = subject::copy("shop", "replica", &table);
                status.loading = Some(table);
                self.publish_copy(&mut load.number, subject, payload, None);
            }
            Step::End(copied) => self.publish_end(&mut load.number, &copied, None),
        }
        self.copier.attempt = Some(Attempt::Load(load));
    }

    fn publish_end(&mut self, number: &mut u64, copied: &Copied, reach: Option<Lsn>) {
        let payload = serde_json::to_vec(copied).expect("plain JSON");
        let subject = subject::copied("shop", "replica");
        self.publish_copy(number, subject, payload.into(), reach);
    }

    /// Puts a message on the copy stream; `number` is that of the attempt's last one.
    fn publish_copy(
        &mut self,
        number: &mut u64,
        subject: String,
        payload: Bytes,
        reach: Option<Lsn>,
    ) {
        let Some(status) = &self.copier.status else {
            return;
        };
        *number += 1;
        let mark = Mark {
            request: status.request.clone(),
            attempt: status.attempt,
            number: *number,
            reach,
        };
        let message = Message {
            subject,
            payload,
            chunk: None,
            mark: Some(mark),
        };
        self.copier.stream.append(message, Duration::ZERO);
    }
}

/// Rows as one message of a copy.
fn payload(spec: &TableSpec, version: Lsn, rows: &[&Row]) -> Bytes {
    let relation = spec.relation();
    let transaction = Transaction::new(EPOCH, version, 0, 0);
    let mut payload = Vec::new();
    for row in rows {
        if !payload.is_empty() {
            payload.push(b'\n');
        }
        let datum = |value: &'_ Option<String>| value.clone();
        let values: Vec<Option<String>> = row.iter().map(datum).collect();
        let data: Vec<Datum<'_>> = values
            .iter()
            .map(|value| {
                value
                    .as_ref()
                    .map_or(Datum::Null, |text| Datum::Text(text.as_bytes()))
            })
            .collect();
        let change = Change {
            op: Op::Read,
            before: Before::None,
            after: Some(&data),
            key: Some(&data),
            seq: 0,
            lsn: version,
            sent_at_us: 0,
        };
        write_change(&mut payload, &relation, &transaction, &change).expect("UTF-8");
        write_line_end(&mut payload, LineEnd::More);
    }
    payload.into()
}
