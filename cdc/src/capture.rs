//! The capture machine: from WAL frames to messages, and from their acknowledgements to what the slot may
//! forget. It knows no network and no clock.

mod changes;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use millrace_event::{
    Control, ControlKind, EncodeError, Lsn, Op, Position, Relation, TableName, Transaction, subject,
};

use crate::assemble::{Assembler, MessageLimits, Outgoing, RowTooLarge};
use crate::commits::{self, CommitLog, Committed};
use crate::frontier::{Boundary, ConfirmPolicy, Frontier};
use crate::pgoutput::{self, Message, PgoutputError};
use crate::relation::{RelationError, Relations};
use crate::selection::Selection;
use crate::tuple::MaskedTexts;

/// The prefix of the logical messages that are heartbeats.
pub const HEARTBEAT_PREFIX: &str = "millrace.heartbeat";

/// How often the WAL's progress is published while nothing else is.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(10);

/// What the machine is made for.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The source's name.
    pub source: String,
    /// The source's database.
    pub db: String,
    /// The epoch of every position it publishes.
    pub epoch: u32,
    /// The tables it publishes, with their key columns.
    pub tables: HashMap<TableName, Vec<String>>,
    /// What is done about columns of some of them.
    pub selections: HashMap<TableName, Arc<Selection>>,
    /// How messages are packed.
    pub limits: MessageLimits,
    /// When the slot may forget.
    pub confirm: ConfirmPolicy,
}

/// Where the stream ends and the slot stands when the machine begins.
#[derive(Clone, Copy, Debug)]
pub struct Resume {
    /// The stream's last sequence.
    pub last_seq: u64,
    /// Everything at or below this position is in the stream.
    pub tail: Position,
    /// The newest boundary in the stream, and how long ago it was stored.
    pub boundary: Option<(Boundary, Duration)>,
    /// What the slot has already forgotten.
    pub confirmed: Lsn,
}

/// What happens to the machine.
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// A pgoutput message came at `start` of the WAL; the source sent it at `sent_at_us` of its clock.
    Data {
        /// Where the change stands in the WAL.
        start: Lsn,
        /// Microseconds since 1970.
        sent_at_us: i64,
        /// The message.
        payload: &'a [u8],
    },
    /// Everything below `wal_end` was decoded and sent.
    Keepalive {
        /// The end of the decoded WAL.
        wal_end: Lsn,
        /// Microseconds since 1970.
        sent_at_us: i64,
    },
    /// Nothing more is waiting: publish what is complete.
    EndOfBatch,
    /// JetStream stored the first `count` messages of this life.
    Acked {
        /// Cumulative.
        count: u64,
    },
    /// The boundary that was asked for is still in the stream.
    Verified(Boundary),
    /// Time passed.
    Tick,
}

/// What the machine wants done, in this order.
#[derive(Clone, Debug)]
pub enum Output {
    /// A relation has changes under this name. If that is not the name of the table that it is, they are missing
    /// there: have the table read again before anything after this is published.
    Named(Named),
    /// Keep the table's schema before anything after this is published.
    Describe(Arc<Relation>),
    /// The stream has changes that name this schema: keep it again where the broker has lost it.
    DescribeIfLost(Arc<Relation>),
    /// Remember, before anything after this is published, that a change with this commit LSN was left out: the
    /// table's rows must be read again.
    LeftOut(RelationError, Lsn),
    /// Publish this.
    Publish(Outgoing),
    /// Look whether the stream still holds this, and answer with [`Input::Verified`].
    Verify(Boundary),
    /// The slot may forget everything up to here.
    Confirm(Lsn),
}

/// What a transaction calls a relation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    /// The relation's OID.
    pub oid: u32,
    /// Its name then.
    pub name: TableName,
    /// The transaction's commit LSN.
    pub commit_lsn: Lsn,
}

/// The machine cannot go on: the WAL says what it must not, or what cannot be published.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// Bytes that are not pgoutput.
    #[error("replication message cannot be read")]
    Pgoutput(#[from] PgoutputError),
    /// A value that cannot be written.
    #[error("row cannot be published")]
    Encode(#[from] EncodeError),
    /// A row that is too large.
    #[error(transparent)]
    RowTooLarge(#[from] RowTooLarge),
    /// Messages in an order that the protocol rules out.
    #[error("replication protocol violated: {0}")]
    Protocol(&'static str),
}

/// The transaction that is being read.
#[derive(Debug)]
enum State {
    /// Between transactions: at the start, and after each commit. After a crash the source begins here again.
    Idle,
    /// From `Begin` to `Commit`. Lost in a crash; the source sends the whole transaction again.
    InTransaction(Open),
}

#[derive(Debug)]
struct Open {
    transaction: Transaction,
    commit_lsn: Lsn,
    committed_at_us: i64,
    seq: u32,
    xid: u32,
    heartbeat: Heartbeat,
}

/// Whether the transaction that is being read wrote a heartbeat.
#[derive(Debug, PartialEq, Eq)]
enum Heartbeat {
    Absent,
    /// With the mark that somebody waits for, if it carries one.
    Written(Option<u64>),
}

/// Decodes WAL into messages.
///
/// After every [`Capture::handle`], drain [`Capture::poll`] until it returns `None`; only then wait.
#[derive(Debug)]
pub struct Capture {
    settings: Settings,
    relations: Relations,
    state: State,
    assembler: Assembler,
    masked: MaskedTexts,
    frontier: Frontier,
    outputs: VecDeque<Output>,
    /// Everything at or below is in the stream already.
    skip_to: Position,
    last_commit_lsn: Lsn,
    /// How far the messages published so far represent the WAL.
    represented: Lsn,
    published_at: Duration,
    reported: Lsn,
    changes: u64,
    commit_log: CommitLog,
}

impl Capture {
    /// Begins behind what the stream already holds.
    #[must_use]
    pub fn new(settings: Settings, resume: Resume, now: Duration) -> Self {
        assert!(
            settings.epoch >= resume.tail.epoch(),
            "an epoch never falls"
        );
        let relations = Relations::new(
            settings.source.clone(),
            settings.db.clone(),
            settings.tables.clone(),
            settings.selections.clone(),
        );
        let mut frontier = Frontier::new(settings.confirm, resume.last_seq, resume.confirmed);
        let mut represented = resume.confirmed;
        if let Some((boundary, held)) = resume.boundary {
            represented = represented.max(boundary.end_lsn);
            frontier.found(boundary, held, now);
        }
        Self {
            assembler: Assembler::new(settings.limits),
            masked: MaskedTexts::default(),
            settings,
            relations,
            state: State::Idle,
            reported: frontier.confirmed(),
            frontier,
            outputs: VecDeque::new(),
            skip_to: resume.tail,
            last_commit_lsn: Lsn::ZERO,
            represented,
            published_at: now,
            changes: 0,
            commit_log: CommitLog::default(),
        }
    }

    /// Takes one input.
    ///
    /// # Errors
    /// The WAL cannot be published; the machine must not be used any more.
    pub fn handle(&mut self, input: Input<'_>, now: Duration) -> Result<(), CaptureError> {
        match input {
            Input::Data {
                start,
                sent_at_us,
                payload,
            } => {
                self.on_message(pgoutput::parse(payload)?, start, sent_at_us)?;
            }
            Input::Keepalive {
                wal_end,
                sent_at_us,
            } => self.on_keepalive(wal_end, sent_at_us, now),
            Input::EndOfBatch => self.release(now)?,
            Input::Acked { count } => self.frontier.on_acked(count, now),
            Input::Verified(boundary) => self.frontier.on_verified(boundary),
            Input::Tick => {}
        }
        if matches!(
            input,
            Input::Acked { .. } | Input::Verified(_) | Input::Tick
        ) {
            self.report(now);
        }
        Ok(())
    }

    /// The next thing to do, if there is one.
    pub fn poll(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// The subject that an [`Outgoing`] names.
    #[must_use]
    pub fn subjects(&self) -> &[String] {
        self.relations.subjects()
    }

    /// What the slot may forget so far.
    #[must_use]
    pub fn confirmed(&self) -> Lsn {
        self.frontier.confirmed()
    }

    /// How many messages were published and not acknowledged.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        self.frontier.in_flight()
    }

    /// How many changes were read, skipped ones included.
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// Takes the changes published since the last time, by table and operation.
    pub fn take_counts(&mut self) -> Vec<(TableName, Op, u64)> {
        self.relations.take_counts()
    }

    /// Notes which transactions are read to their end, or no longer.
    pub fn record_commits(&mut self, recording: bool) {
        self.commit_log.record(recording);
    }

    /// How far the WAL was read: every transaction whose commit record lies below was read to its end. And which
    /// of them were noted since the last time.
    pub fn take_commits(&mut self) -> (Lsn, Vec<Committed>) {
        self.commit_log.take()
    }

    fn report(&mut self, now: Duration) {
        if let Some(boundary) = self.frontier.due(now) {
            let asked = |output: &Output| matches!(output, Output::Verify(_));
            if !self.outputs.iter().any(asked) {
                self.outputs.push_back(Output::Verify(boundary));
            }
        }
        let confirmed = self.frontier.confirmed();
        assert!(
            confirmed >= self.reported,
            "what was confirmed stays confirmed"
        );
        if confirmed > self.reported {
            self.reported = confirmed;
            self.outputs.push_back(Output::Confirm(confirmed));
        }
    }

    fn release(&mut self, now: Duration) -> Result<(), CaptureError> {
        let (outputs, frontier) = (&mut self.outputs, &mut self.frontier);
        let (represented, published_at) = (&mut self.represented, &mut self.published_at);
        self.assembler.take(|outgoing| {
            frontier.on_published(outgoing.position, outgoing.boundary);
            *represented = outgoing.boundary.unwrap_or(*represented).max(*represented);
            *published_at = now;
            outputs.push_back(Output::Publish(outgoing));
        })?;
        Ok(())
    }

    fn on_message(
        &mut self,
        message: Message<'_>,
        start: Lsn,
        sent_at_us: i64,
    ) -> Result<(), CaptureError> {
        match message {
            Message::Begin(begin) => self.on_begin(&begin),
            Message::Commit(commit) => self.on_commit(&commit),
            Message::Relation(relation) => {
                self.named(&relation);
                self.relations.announce(&relation);
                Ok(())
            }
            Message::Insert(insert) => {
                let row = (None, Some(insert.new));
                self.on_row(Op::Create, insert.relid, row, start, sent_at_us)
            }
            Message::Update(update) => {
                let row = (update.old, Some(update.new));
                self.on_row(Op::Update, update.relid, row, start, sent_at_us)
            }
            Message::Delete(delete) => {
                let row = (Some(delete.old), None);
                self.on_row(Op::Delete, delete.relid, row, start, sent_at_us)
            }
            Message::Truncate(truncate) => self.on_truncate(&truncate, start, sent_at_us),
            Message::Message(message) => {
                if let (true, HEARTBEAT_PREFIX, State::InTransaction(open)) =
                    (message.transactional, message.prefix, &mut self.state)
                {
                    open.heartbeat = Heartbeat::Written(commits::mark_of(message.content));
                }
                Ok(())
            }
            Message::Type(_) | Message::Origin(_) => Ok(()),
        }
    }

    fn named(&mut self, relation: &pgoutput::Relation<'_>) {
        let State::InTransaction(open) = &self.state else {
            return;
        };
        // Also of what the stream has: the broker may have lost what an earlier life ordered.
        self.outputs.push_back(Output::Named(Named {
            oid: relation.relid,
            name: TableName::new(relation.schema, relation.table),
            commit_lsn: open.commit_lsn,
        }));
    }

    fn on_begin(&mut self, begin: &pgoutput::Begin) -> Result<(), CaptureError> {
        if matches!(self.state, State::InTransaction(_)) {
            return Err(CaptureError::Protocol(
                "a transaction begins inside another",
            ));
        }
        if begin.final_lsn <= self.last_commit_lsn {
            return Err(CaptureError::Protocol(
                "transactions come out of commit order",
            ));
        }
        self.last_commit_lsn = begin.final_lsn;
        let Settings { epoch, .. } = self.settings;
        self.state = State::InTransaction(Open {
            transaction: Transaction::new(epoch, begin.final_lsn, begin.xid, begin.commit_ts_us),
            commit_lsn: begin.final_lsn,
            committed_at_us: begin.commit_ts_us,
            seq: 0,
            xid: begin.xid,
            heartbeat: Heartbeat::Absent,
        });
        Ok(())
    }

    fn on_commit(&mut self, commit: &pgoutput::Commit) -> Result<(), CaptureError> {
        let State::InTransaction(open) = std::mem::replace(&mut self.state, State::Idle) else {
            return Err(CaptureError::Protocol("a commit without its begin"));
        };
        if open.commit_lsn != commit.commit_lsn || commit.end_lsn <= commit.commit_lsn {
            return Err(CaptureError::Protocol("a commit does not match its begin"));
        }
        self.assembler.commit(commit.end_lsn);
        let mark = match open.heartbeat {
            Heartbeat::Written(mark) => mark,
            Heartbeat::Absent => None,
        };
        let committed = Committed {
            xid: open.xid,
            commit_lsn: open.commit_lsn,
            mark,
        };
        self.commit_log.committed(committed, commit.end_lsn);
        if open.heartbeat != Heartbeat::Absent {
            // Above every change of its transaction, whatever the application wrote beside it.
            let position = Position::new(self.settings.epoch, open.commit_lsn, u32::MAX);
            self.control(
                ControlKind::Heartbeat,
                position,
                commit.end_lsn,
                open.committed_at_us,
            );
        }
        Ok(())
    }

    /// Publishes the WAL's progress, so that what is confirmed is always represented in the stream.
    fn on_keepalive(&mut self, wal_end: Lsn, sent_at_us: i64, now: Duration) {
        if !matches!(self.state, State::Idle) {
            return;
        }
        self.commit_log.read_to(wal_end);
        let quiet = now.saturating_sub(self.published_at) >= PROGRESS_INTERVAL;
        if quiet && wal_end > self.represented {
            let position = Position::new(self.settings.epoch, wal_end, 0);
            self.control(ControlKind::Progress, position, wal_end, sent_at_us);
        }
    }

    fn control(&mut self, kind: ControlKind, position: Position, end_lsn: Lsn, ts_us: i64) {
        if position <= self.skip_to {
            return;
        }
        let subject = self
            .relations
            .subject(subject::control(&self.settings.source, kind));
        let control = Control {
            kind,
            position,
            end_lsn,
            ts_us,
            origin: None,
        };
        let payload = serde_json::to_vec(&control).expect("a control message is plain JSON");
        self.assembler.message(subject, position, end_lsn, &payload);
    }
}
