//! Capture's side of the initial copy: requests, attempts under a snapshot, and the copy stream.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use millrace_event::work::{Copied, CopyStatus, Part};
use millrace_event::{
    Before, Change, Datum, LineEnd, Lsn, Op, TableName, Transaction, subject, write_change,
    write_line_end,
};
use rand::Rng;
use rand::rngs::SmallRng;

use crate::broker::{Broker, Mark, Message};
use crate::source::{EPOCH, Row, Source, State};
use crate::world::{Sabotage, World};

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) id: String,
    pub(crate) tables: Vec<TableName>,
}

/// The KV bucket of copies, the copy stream, and the attempt under way.
#[derive(Default)]
pub(crate) struct Copier {
    pub(crate) request: Option<Request>,
    pub(crate) status: Option<CopyStatus>,
    pub(crate) stream: Broker,
    attempt: Option<Attempt>,
    requests: u64,
}

struct Attempt {
    number: u64,
    steps: VecDeque<Step>,
}

enum Step {
    Rows(String, Bytes),
    End(Copied),
    Told(TableName),
}

impl Copier {
    /// A new name for a request.
    pub(crate) fn next_id(&mut self) -> String {
        self.requests += 1;
        format!("r{}", self.requests)
    }

    pub(crate) fn forget_attempt(&mut self) {
        self.attempt = None;
    }

    /// The copy stream loses its tail; returns how much.
    pub(crate) fn lose_tail(&mut self, rng: &mut SmallRng) -> u64 {
        let last = self.stream.last_seq();
        let kept = rng.random_range(self.stream.synced()..=last);
        self.stream.crash(kept);
        if rng.random_bool(0.5) {
            self.attempt = None;
        }
        last - kept
    }
}

impl World {
    /// Looks for a request, or goes on with an attempt.
    pub(crate) fn copier_turn(&mut self) {
        if self.life.is_none() {
            return;
        }
        if let Some(mut attempt) = self.copier.attempt.take() {
            for _ in 0..self.rng.random_range(1..4) {
                let Some(step) = attempt.steps.pop_front() else {
                    return;
                };
                self.copy_step(&mut attempt, step);
            }
            self.copier.attempt = Some(attempt);
            return;
        }
        if self.rng.random_bool(0.1) {
            self.copier.stream.sync(self.now);
        }
        let Some(request) = self.copier.request.clone() else {
            if self.copier.status.take().is_some() {
                self.copier.stream = Broker::default();
            }
            return;
        };
        let status = self.copier.status.clone();
        let status = status.filter(|status| status.request == request.id);
        let copied = status
            .as_ref()
            .map(|status| status.copied.clone())
            .unwrap_or_default();
        let mut remaining = request.tables.clone();
        remaining.retain(|table| !copied.contains(table));
        if remaining.is_empty() {
            return;
        }
        let attempt = status.map_or(0, |status| status.attempt) + 1;
        let (lsn, state) = self.source.snapshot();
        let claimed = if self.sabotage(Sabotage::CopyTooNew) {
            self.sabotaged = true;
            Lsn(lsn.0 + 4_000)
        } else {
            lsn
        };
        let rows = self.rng.random_range(1..4);
        let steps = steps(&self.source, &state, &remaining, claimed, rows);
        self.note(format!(
            "copy {}/{attempt} of {} tables at {lsn}",
            request.id,
            remaining.len()
        ));
        self.counts.copy_attempts += 1;
        self.copier.status = Some(CopyStatus {
            attempt,
            copied,
            ..CopyStatus::new(request.id)
        });
        self.copier.attempt = Some(Attempt { number: 0, steps });
    }

    fn copy_step(&mut self, attempt: &mut Attempt, step: Step) {
        let copier = &mut self.copier;
        let Some(status) = &mut copier.status else {
            return;
        };
        let (subject, payload) = match step {
            Step::Told(table) => {
                status.last_seq = copier.stream.last_seq();
                status.copied.push(table);
                return;
            }
            Step::Rows(subject, payload) => (subject, payload),
            Step::End(copied) => {
                let payload = serde_json::to_vec(&copied).expect("plain JSON");
                (subject::copied("shop", "replica"), payload.into())
            }
        };
        attempt.number += 1;
        let (request, number) = (status.request.clone(), attempt.number);
        let mark = Some(Mark {
            request,
            attempt: status.attempt,
            number,
        });
        copier.stream.append(
            Message {
                subject,
                payload,
                chunk: None,
                mark,
            },
            Duration::ZERO,
        );
    }
}

fn steps(
    source: &Source,
    state: &State,
    tables: &[TableName],
    lsn: Lsn,
    rows_a_message: usize,
) -> VecDeque<Step> {
    let mut steps = VecDeque::new();
    for name in tables {
        let at = source
            .specs
            .iter()
            .position(|spec| spec.name == *name)
            .expect("a table of ours");
        let rows: Vec<&Row> = state[at].values().map(|(_, row)| row).collect();
        let relation = source.specs[at].relation();
        let transaction = Transaction::new(EPOCH, lsn, 0, 0);
        for some in rows.chunks(rows_a_message) {
            let mut payload = Vec::new();
            for row in some {
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
                    lsn,
                    sent_at_us: 0,
                };
                write_change(&mut payload, &relation, &transaction, &change).expect("UTF-8");
                write_line_end(&mut payload, LineEnd::More);
            }
            steps.push_back(Step::Rows(
                subject::copy("shop", "replica", name),
                payload.into(),
            ));
        }
        let rows = rows.len() as u64;
        steps.push_back(Step::End(Copied {
            table: name.clone(),
            epoch: EPOCH,
            lsn,
            rows,
            part: Part::Load,
        }));
        steps.push_back(Step::Told(name.clone()));
    }
    steps
}
