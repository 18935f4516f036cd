//! What the machine wants done, carried to the world, and what comes back of it.

use std::sync::Arc;
use std::time::Duration;

use async_nats::{HeaderMap, Subject};
use millrace_config::Code;
use millrace_event::{Control, ControlKind, Lsn, Position, Relation, header};

use super::Line;
use crate::assemble::Outgoing;
use crate::capture::{Input, Named, Output};
use crate::frontier::Boundary;
use crate::life::Stream;
use crate::{Error, named, publish, schemas, source, stream};

/// How long a table that somebody holds is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Patience {
    /// A while: events of this schema come next.
    Waits,
    /// Not at all: nothing that is published waits for it.
    LooksOnce,
}

/// What became of a schema that is not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Described {
    /// It is kept, or nobody can describe it.
    Done,
    /// It is to be tried again.
    Later,
}

/// What an acknowledged boundary says about progress.
pub(super) struct Mark {
    covered: Lsn,
    heartbeat: Option<(Position, i64)>,
}

impl Line<'_> {
    /// Does everything that is due before the next message may be published.
    pub(super) async fn perform(&mut self) -> Result<(), Error> {
        while let Some(output) = self.capture.poll() {
            self.pending.push_back(output);
        }
        while let Some(output) = self.pending.pop_front() {
            match output {
                Output::Publish(_) => {
                    self.pending.push_front(output);
                    return Ok(());
                }
                Output::Named(named) => self.named(&named).await?,
                Output::Describe(relation) => self.describe(&relation, Patience::Waits).await?,
                Output::DescribeIfLost(relation) => self.describe_if_lost(relation).await?,
                Output::LeftOut(error, lsn) => {
                    self.left_out.note(&self.stream.state, &error, lsn).await?;
                }
                Output::Confirm(lsn) => {
                    self.handle.confirm(lsn);
                    self.status.set_confirmed(lsn);
                }
                Output::Verify(boundary) => {
                    self.verify(boundary).await?;
                    self.input(Input::Verified(boundary))?;
                    while let Some(output) = self.capture.poll() {
                        self.pending.push_back(output);
                    }
                }
            }
        }
        Ok(())
    }

    pub(super) fn next_outgoing(&mut self) -> Option<publish::Outgoing> {
        let Some(Output::Publish(outgoing)) = self.pending.front() else {
            return None;
        };
        let known = self.subjects.len();
        let new = self.capture.subjects().iter().skip(known);
        self.subjects
            .extend(new.map(|subject| Subject::from(subject.as_str())));
        let subject = self
            .subjects
            .get(outgoing.subject.0 as usize)
            .expect("just brought up to date");
        let mut headers = outgoing.chunk.map(|chunk| {
            let mut headers = HeaderMap::new();
            headers.insert(header::POSITION, outgoing.position.to_string());
            let Self { publisher, .. } = self;
            headers.insert(
                header::CHUNK,
                format!("{}/{}/{publisher}", chunk.index, chunk.count),
            );
            headers
        });
        if self.published == 0 {
            // A reader that meets it behind messages that the broker lost knows what they were.
            headers
                .get_or_insert_default()
                .insert(header::AFTER, self.after.to_string());
        }
        let payload = outgoing.payload.clone();
        Some(publish::Outgoing {
            subject: subject.clone(),
            payload,
            headers,
        })
    }

    /// Takes note that the front of what is pending was sent.
    pub(super) fn sent(&mut self) {
        let Some(Output::Publish(outgoing)) = self.pending.pop_front() else {
            unreachable!("only a publish is sent")
        };
        self.published += 1;
        if let Some(mark) = mark_of(&outgoing) {
            self.heartbeats.push_back((self.published, mark));
        }
    }

    pub(super) fn acked(&mut self, acked: publish::Acked) -> Result<(), Error> {
        let changes = self.capture.changes();
        let before = self.published - self.capture.in_flight().min(self.published);
        self.status.add(
            changes - self.changes_seen,
            acked.count.saturating_sub(before),
        );
        self.changes_seen = changes;
        while let Some((number, mark)) = self.heartbeats.front() {
            if *number > acked.count {
                break;
            }
            self.status.set_covered(mark.covered);
            if let Some((position, ts_us)) = mark.heartbeat {
                self.status.set_heartbeat(position, ts_us);
            }
            self.heartbeats.pop_front();
        }
        self.input(Input::Acked { count: acked.count })
    }

    /// Has tables read again whose rows were changed under another name.
    async fn named(&self, named: &Named) -> Result<(), Error> {
        let Some(table) = self.tables_by_oid.get(&named.oid) else {
            return Ok(());
        };
        if *table == named.name {
            return Ok(());
        }
        named::order(self.config, self.source, self.stream, table, named).await
    }

    /// Keeps the schema that events name.
    async fn describe(&self, relation: &Relation, patience: Patience) -> Result<(), Error> {
        let client = &self.source.client;
        let mut tables = self.source.tables.iter();
        let table = tables
            .find(|table| table.name == *relation.name())
            .expect("only configured tables are published");
        let columns = relation.columns();
        let names: Vec<_> = columns.iter().map(|column| column.name()).collect();
        let shapes: Vec<_> = columns.iter().map(|column| column.shape()).collect();
        // What is excluded is not announced: only a lock tells that no column has come under another's name.
        let is_same = table.settings.columns.exclude.is_empty()
            && source::is_as_announced(client, table, &shapes).await?;
        if !is_same && patience == Patience::LooksOnce {
            source::settled(client, &table.name, Duration::ZERO).await?;
        }
        source::check_names(client, table, &names, is_same).await?;
        if !is_same && patience == Patience::Waits {
            source::settled(client, &table.name, source::SETTLING_MAX).await?;
        }
        let key: Vec<String> = relation
            .key()
            .iter()
            .map(|index| columns[*index].name().to_owned())
            .collect();
        let schema = source::describe_selected(client, table, &shapes, &key).await?;
        assert_eq!(
            schema.version,
            relation.version(),
            "one shape has one fingerprint"
        );
        let now = source::describe_now(client, table).await?;
        schemas::keep(&self.stream.schemas, table, &schema, now.as_ref()).await
    }

    /// Keeps the schema that events in the stream name, where it is not kept: a sink that meets them waits for it.
    /// Where it cannot be described now, nothing else waits for that.
    async fn describe_if_lost(&mut self, relation: Arc<Relation>) -> Result<(), Error> {
        let (name, version) = (relation.name(), relation.version());
        if schemas::has(&self.stream.schemas, name, version).await? {
            return Ok(());
        }
        tracing::warn!(
            table = %name, version,
            "a table's schema that the stream names is not kept: it is described again"
        );
        if self.describe_again(&relation).await == Described::Later {
            self.undescribed.push(relation);
        }
        Ok(())
    }

    /// Tries again what could not be described, every few seconds.
    pub(super) async fn describe_undescribed(&mut self) {
        for relation in self.undescribed.due(self.began.elapsed()) {
            if self.describe_again(&relation).await == Described::Later {
                self.undescribed.push(relation);
            }
        }
    }

    async fn describe_again(&self, relation: &Relation) -> Described {
        let (name, version) = (relation.name(), relation.version());
        match self.describe(relation, Patience::LooksOnce).await {
            Ok(()) => Described::Done,
            // It was published as the table was configured then.
            Err(Error::Halt(condition)) => {
                tracing::warn!(
                    table = %name, version, code = condition.code.as_str(), remedy = %condition.remedy,
                    "{}: an older schema is not described again", condition.message
                );
                Described::Done
            }
            Err(error) => {
                tracing::warn!(
                    table = %name, version, reason = %error.chain(),
                    "an older schema cannot be described yet"
                );
                Described::Later
            }
        }
    }

    /// Looks whether the stream still holds what is about to be forgotten by the slot.
    async fn verify(&self, boundary: Boundary) -> Result<(), Error> {
        let Stream {
            jetstream, name, ..
        } = self.stream;
        let stored = stream::position_at(jetstream, name, boundary.stream_seq).await?;
        if stored == Some(boundary.position) {
            return Ok(());
        }
        tracing::warn!(
            code = Code::StreamTailLost.as_str(),
            stream_seq = boundary.stream_seq,
            expected = %boundary.position,
            "the stream lost its unsynced tail; reading it from the slot again"
        );
        Err(Error::retry_because("the stream lost its unsynced tail"))
    }
}

fn mark_of(outgoing: &Outgoing) -> Option<Mark> {
    let covered = outgoing.boundary?;
    // Control messages stand apart from rows by their number in the transaction.
    let seq = outgoing.position.0.seq;
    let control = matches!(seq, 0 | u32::MAX)
        .then(|| serde_json::from_slice::<Control>(&outgoing.payload).ok())
        .flatten();
    let heartbeat = control
        .filter(|control| control.kind == ControlKind::Heartbeat)
        .map(|control| (control.position, control.ts_us));
    Some(Mark { covered, heartbeat })
}
