//! The whole line as one deterministic model: what there is, and what happens next.

use std::collections::BTreeMap;
use std::time::Duration;

use millrace_cdc::assemble::MessageLimits;
use millrace_cdc::frontier::ConfirmPolicy;
use millrace_event::work::BackfillOrder;
use millrace_event::{Control, ControlKind, Position, TableName, TableSchema, subject};
use millrace_sink::progress::CopyState;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::broker::{Broker, Message, Pipe};
use crate::capture::Life;
use crate::copier::Copier;
use crate::replica::Replica;
use crate::source::{EPOCH, Source};

/// How often the model broker writes to disk.
pub(crate) const SYNC_INTERVAL: Duration = Duration::from_secs(20);
/// What capture waits beyond that before the slot may forget.
const CONFIRM_MARGIN: Duration = Duration::from_secs(5);
/// The server forgets a batch that is idle for so long.
pub(crate) const BATCH_IDLE: Duration = Duration::from_secs(10);
/// At rest, so many turns must be enough for everything to arrive.
const REST_TURNS_MAX: u32 = 3_000;

/// A fault that the product must never have: each proves that the checker can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sabotage {
    None,
    /// The stream does not hold a message that was acknowledged.
    DropMessage,
    /// Two neighbours in the stream change places.
    SwapMessages,
    /// The slot forgets what was published and not acknowledged.
    ConfirmEarly,
    /// The slot forgets what was acknowledged and not synced.
    ConfirmUnsynced,
    /// An old change is applied as if it were new.
    IgnoreGuard,
    /// A part of a transaction is committed in the target.
    CommitHalf,
    /// A copy's rows claim to be newer than their snapshot.
    CopyTooNew,
    /// A reader passes over a message.
    SkipMessage,
    /// A chunk has the reader's position before the snapshot as its version, whatever is in limbo.
    LowWatermark,
    /// A chunk has the end of the WAL as its version.
    WalAfter,
    /// Capture does not wait for the transactions whose commits it has not recorded.
    NoBarrier,
    /// Chunks are published whose version lies below the request's begin.
    NoBegin,
    /// Chunks are published and applied before the stream has come as far as their snapshot.
    NoReach,
    /// The first chunk that ends is taken for the last one.
    LastTooSoon,
    /// The sweep behind the last chunk removes what is older than the sink's position.
    SweepMore,
    /// Deletes are forgotten that a chunk to come may meet.
    ForgetDeletes,
    /// Nobody looks at the numbers of the copy stream's messages.
    NoNumbers,
}

/// Why a run is wrong.
pub(crate) type Failure = String;

/// Everything there is.
pub(crate) struct World {
    pub(crate) rng: SmallRng,
    pub(crate) now: Duration,
    pub(crate) log: Vec<String>,
    pub(crate) source: Source,
    pub(crate) broker: Broker,
    pub(crate) schemas: BTreeMap<(TableName, String), TableSchema>,
    pub(crate) confirm: ConfirmPolicy,
    pub(crate) limits: MessageLimits,
    pub(crate) life: Option<Life>,
    /// A publisher whose process is gone, and whose messages are still on their way.
    pub(crate) zombie: Option<Pipe>,
    /// The server forgets its batch then, and takes no more of it.
    pub(crate) zombie_until: Duration,
    pub(crate) publishers: u64,
    pub(crate) copier: Copier,
    pub(crate) replica: Replica,
    /// Off at rest.
    pub(crate) faults: bool,
    pub(crate) sabotage: Sabotage,
    /// Whether the sabotage has happened.
    pub(crate) sabotaged: bool,
    pub(crate) counts: Counts,
}

/// What happened in a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) lives: u64,
    pub(crate) zombies: u64,
    pub(crate) tails_lost: u64,
    pub(crate) source_crashes: u64,
    pub(crate) sink_lives: u64,
    pub(crate) deposed: u64,
    pub(crate) commits_checked: u64,
    pub(crate) copies_lost: u64,
    pub(crate) copy_attempts: u64,
    pub(crate) resumes_searched: u64,
    pub(crate) loads_cut: u64,
    pub(crate) caught_up: u64,
    pub(crate) chunks: u64,
    pub(crate) chunks_below: u64,
    pub(crate) chunks_limbo: u64,
    pub(crate) chunks_older: u64,
    pub(crate) chunks_rewritten: u64,
    pub(crate) chunks_waited: u64,
    pub(crate) copies_too_old: u64,
    pub(crate) gaps: u64,
    pub(crate) repairs: u64,
    pub(crate) rows_healed: u64,
}

impl Counts {
    pub(crate) fn add(&mut self, other: Self) {
        self.lives += other.lives;
        self.zombies += other.zombies;
        self.tails_lost += other.tails_lost;
        self.source_crashes += other.source_crashes;
        self.sink_lives += other.sink_lives;
        self.deposed += other.deposed;
        self.commits_checked += other.commits_checked;
        self.copies_lost += other.copies_lost;
        self.copy_attempts += other.copy_attempts;
        self.resumes_searched += other.resumes_searched;
        self.loads_cut += other.loads_cut;
        self.caught_up += other.caught_up;
        self.chunks += other.chunks;
        self.chunks_below += other.chunks_below;
        self.chunks_limbo += other.chunks_limbo;
        self.chunks_older += other.chunks_older;
        self.chunks_rewritten += other.chunks_rewritten;
        self.chunks_waited += other.chunks_waited;
        self.copies_too_old += other.copies_too_old;
        self.gaps += other.gaps;
        self.repairs += other.repairs;
        self.rows_healed += other.rows_healed;
    }
}

/// What a run was.
pub(crate) struct Outcome {
    pub(crate) log: Vec<String>,
    pub(crate) result: Result<(), Failure>,
    pub(crate) sabotaged: bool,
    pub(crate) counts: Counts,
}

/// Runs one seed.
pub(crate) fn run(seed: u64, sabotage: Sabotage) -> Outcome {
    let mut world = World::new(seed, sabotage);
    let result = world.live().and_then(|()| world.rest());
    if let Err(failure) = &result {
        world.log.push(format!("FAILED: {failure}"));
    }
    Outcome {
        log: world.log,
        result,
        sabotaged: world.sabotaged,
        counts: world.counts,
    }
}

impl World {
    fn new(seed: u64, sabotage: Sabotage) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let source = Source::new(&mut rng);
        let confirm = if rng.random_bool(0.4) {
            ConfirmPolicy::Acked
        } else {
            ConfirmPolicy::Synced(SYNC_INTERVAL + CONFIRM_MARGIN)
        };
        let limits = MessageLimits {
            events: [1, 1, 3, 50][rng.random_range(0..4)],
            bytes: [100_000, 100_000, 900, 500][rng.random_range(0..4)],
            row_bytes: 1_000_000,
        };
        let rows = [1, 3, 1_000][rng.random_range(0..3)];
        let near_messages = [3, 10, 5_000][rng.random_range(0..3)];
        let mut broker = Broker::default();
        broker.append(start(source.confirmed()), Duration::ZERO);
        broker.sync(Duration::ZERO);
        let mut world = Self {
            rng,
            now: Duration::ZERO,
            log: Vec::new(),
            source,
            broker,
            schemas: BTreeMap::new(),
            confirm,
            limits,
            life: None,
            zombie: None,
            zombie_until: Duration::ZERO,
            publishers: 0,
            copier: Copier::default(),
            replica: Replica::new(rows, near_messages),
            faults: true,
            sabotage,
            sabotaged: false,
            counts: Counts::default(),
        };
        for spec in world.source.specs.iter().filter(|spec| spec.configured) {
            let schema = spec.schema();
            world
                .schemas
                .insert((schema.name.clone(), schema.version.clone()), schema);
        }
        world.note(format!(
            "seed {seed}: {confirm:?}, {limits:?}, {rows} rows a batch"
        ));
        world
    }

    /// Writes a line of the log.
    pub(crate) fn note(&mut self, line: impl std::fmt::Display) {
        self.log
            .push(format!("{:>9.1} {line}", self.now.as_secs_f64()));
    }

    /// Whether something rare happens, while faults are on.
    pub(crate) fn fault(&mut self, probability: f64) -> bool {
        self.faults && self.rng.random_bool(probability)
    }

    /// Whether the sabotage happens here: once a run, not at the first occasion.
    pub(crate) fn sabotage(&mut self, sabotage: Sabotage) -> bool {
        self.sabotage == sabotage && !self.sabotaged && self.rng.random_bool(0.1)
    }

    /// Whether a rule is broken here, for the whole run.
    pub(crate) fn breaks(&mut self, sabotage: Sabotage) -> bool {
        self.sabotaged |= self.sabotage == sabotage;
        self.sabotage == sabotage
    }

    /// Everything at once, faults included.
    fn live(&mut self) -> Result<(), Failure> {
        let transactions = self.rng.random_range(25..50);
        while self.source.own < transactions {
            self.turn()?;
        }
        Ok(())
    }

    fn turn(&mut self) -> Result<(), Failure> {
        match self.rng.random_range(0..100) {
            0..10 => {
                self.source.commit(&mut self.rng);
                let line = match self.source.transactions.last() {
                    Some(last) => format!("committed {}", last.commit_lsn),
                    None => String::new(),
                };
                self.note(line);
            }
            10..13 => self.source.heartbeat(&mut self.rng),
            13..19 => {
                let seconds = [0.1, 1.0, 4.0, 15.0][self.rng.random_range(0..4)];
                self.pass(Duration::from_secs_f64(seconds))?;
            }
            19..53 => self.capture_turn()?,
            53..57 => self.zombie_turn(),
            57..68 => self.copier_turn(),
            68..70 => self.source.visible.open(),
            70..72 => {
                if let Some(xid) = self.source.visible.surface(&mut self.rng) {
                    self.note(format!("transaction {xid} is visible"));
                }
            }
            72..97 => self.replica_turn()?,
            _ => self.disaster()?,
        }
        Ok(())
    }

    fn pass(&mut self, time: Duration) -> Result<(), Failure> {
        self.now += time;
        if self.now >= self.zombie_until {
            self.zombie = None;
        }
        if self.rng.random_bool(0.9) {
            self.broker.on_time(self.now, SYNC_INTERVAL);
        }
        // A file that was due is never late by more than the margin.
        self.broker
            .on_time(self.now, SYNC_INTERVAL + CONFIRM_MARGIN / 2);
        self.capture_tick()
    }

    fn disaster(&mut self) -> Result<(), Failure> {
        match self.rng.random_range(0..13) {
            9..12 => self.order(),
            12 => {
                self.note("the broker lost the copy's request");
                self.copier.request = None;
            }
            0..3 => self.kill_life(),
            3 => {
                self.source.crash(&mut self.rng);
                self.counts.source_crashes += 1;
                let line = format!("source crashed, slot at {}", self.source.confirmed());
                self.note(line);
                self.kill_life();
            }
            4 => {
                let lost = self.copier.lose_tail(&mut self.rng);
                self.note(format!("broker lost {lost} messages of the copy stream"));
            }
            5..7 if self.confirm != ConfirmPolicy::Acked => self.lose_tail()?,
            _ => self.kill_replica(),
        }
        Ok(())
    }

    /// The operator orders a table to be read again, mostly because somebody else has changed its rows; or cancels that.
    fn order(&mut self) {
        let Some(row) = self.replica.position() else {
            return;
        };
        let tables = row
            .copy
            .those(|state| matches!(state, CopyState::Copied { .. }));
        let wrong = &self.replica.wrong;
        if let Some(order) = self.copier.orders.iter_mut().next()
            && !wrong.values().any(|id| *id == order.id)
        {
            order.cancelled = true;
            return;
        }
        if tables.is_empty() {
            return;
        }
        let table = tables[self.rng.random_range(0..tables.len())].clone();
        let order = BackfillOrder::new(self.copier.next_name(), table.clone());
        self.note(format!("ordered {table}: {}", order.id));
        let may_spoil = !self.replica.wrong.contains_key(&table) && !self.replica.is_open();
        if may_spoil && self.rng.random_bool(0.7) {
            for _ in 0..self.rng.random_range(1..4) {
                self.spoil(&table, row.checkpoint.position.0);
            }
            self.replica.wrong.insert(table, order.id.clone());
        }
        self.copier.orders.push(order);
    }

    fn lose_tail(&mut self) -> Result<(), Failure> {
        self.check_stream(false)?;
        let (synced, last) = (self.broker.synced(), self.broker.last_seq());
        let kept = self.rng.random_range(synced..=last);
        self.broker.crash(kept);
        self.counts.tails_lost += 1;
        self.note(format!("broker lost {} of {last} messages", last - kept));
        self.zombie = None;
        if let Some(life) = &mut self.life {
            life.cut_off();
        }
        self.replica.disconnect();
        self.check_stream(false)
    }

    /// Faults stop: everything must arrive, and then be equal.
    fn rest(&mut self) -> Result<(), Failure> {
        self.faults = false;
        self.zombie = None;
        self.source.visible.settle();
        self.note("at rest");
        let committed = self.source.transactions.len();
        for turn in 0..REST_TURNS_MAX {
            self.capture_turn()?;
            self.copier_turn();
            self.replica_turn()?;
            if turn % 10 == 0 {
                self.pass(Duration::from_secs(7))?;
                self.source.heartbeat(&mut self.rng);
            }
            if turn % 10 == 9 && self.has_arrived(committed) {
                return self.check_rest();
            }
        }
        Err(format!(
            "not everything arrived: slot {}, target {:?}",
            self.source.confirmed(),
            self.replica.position()
        ))
    }

    fn has_arrived(&self, committed: usize) -> bool {
        let last = &self.source.transactions[committed.saturating_sub(1)];
        let reached = Position::new(EPOCH, last.end_lsn, 0);
        let applied = self.replica.position();
        self.source.confirmed() >= last.end_lsn
            && applied.is_some_and(|row| {
                self.replica.is_whole(&row.copy) && row.checkpoint.position >= reached
            })
            && self.replica.is_shown
    }
}

fn start(confirmed: millrace_event::Lsn) -> Message {
    let kind = ControlKind::Start;
    let position = Position::new(EPOCH, confirmed, 0);
    let control = Control {
        kind,
        position,
        end_lsn: confirmed,
        ts_us: 0,
        origin: None,
    };
    Message {
        subject: subject::control("shop", kind),
        payload: serde_json::to_vec(&control).expect("plain JSON").into(),
        chunk: None,
        mark: None,
    }
}
