//! The parts of a process: capture and sinks, each on a thread of its own.

use std::future::Future;
use std::sync::Arc;

use millrace_config::{Condition, Config, State};
use millrace_event::Position;
use tokio::task::{JoinError, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::admin::Board;
use crate::arguments::{Part, RunArguments};

/// The parts of this process, and what they tell.
pub(in crate::command) struct Parts {
    pub(in crate::command) config: Arc<Config>,
    pub(in crate::command) capture: Option<Arc<millrace_cdc::Status>>,
    pub(in crate::command) sinks: Vec<(String, Arc<millrace_sink::Status>)>,
    /// Those that ended because an operator must act.
    pub(super) failed: Vec<(Part, Condition)>,
}

/// The parts that run.
pub(super) struct Running {
    set: JoinSet<(Number, Ended)>,
    spawned: Vec<Spawned>,
    /// How many were ever started.
    count: u64,
}

/// Which start of a part: one that drains for long may end after its successor has begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Number(u64);

struct Spawned {
    number: Number,
    part: Part,
    stop: CancellationToken,
    /// Whether another start of the part, or none, has its place in the process.
    superseded: bool,
}

/// The end of a part.
pub(super) struct End {
    pub(super) part: Part,
    pub(super) ended: Ended,
    /// Whether its successor has its place already: then it says nothing about the part as it is now.
    pub(super) superseded: bool,
}

/// How a part ended.
#[derive(Debug)]
pub(super) enum Ended {
    /// It was told to.
    Stopped,
    /// An operator must act; it may have worked before.
    Failed { condition: Condition, begun: bool },
}

impl Running {
    pub(super) fn new() -> Self {
        Self {
            set: JoinSet::new(),
            spawned: Vec::new(),
            count: 0,
        }
    }

    /// Starts a part on a thread of its own with all its connections, so that a row on its way through it wakes no
    /// other thread: under load that costs more than the work itself.
    fn spawn<W>(&mut self, part: Part, works: impl FnOnce(CancellationToken) -> W)
    where
        W: Future<Output = Ended> + Send + 'static,
    {
        let (number, stop) = (Number(self.count), CancellationToken::new());
        self.count += 1;
        let works = works(stop.clone());
        self.spawned.push(Spawned {
            number,
            part,
            stop,
            superseded: false,
        });
        self.set.spawn_blocking(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            let runtime = runtime.expect("a thread and an epoll handle can be had");
            (number, runtime.block_on(works))
        });
    }

    /// Waits for the end of a part; none runs any more: `None`.
    pub(super) async fn next(&mut self) -> Option<Result<End, JoinError>> {
        Some(self.set.join_next().await?.map(|(number, ended)| {
            let mut spawned = self.spawned.iter();
            let at = spawned.position(|spawned| spawned.number == number);
            let spawned = self
                .spawned
                .swap_remove(at.expect("it is listed until it ends"));
            End {
                part: spawned.part,
                ended,
                superseded: spawned.superseded,
            }
        }))
    }

    /// What of these parts has not ended.
    pub(super) fn numbers(&self, which: impl Fn(&Part) -> bool) -> Vec<Number> {
        let concerned = self.spawned.iter().filter(|spawned| which(&spawned.part));
        concerned.map(|spawned| spawned.number).collect()
    }

    /// Whether any of these has not ended.
    pub(super) fn has_any(&self, numbers: &[Number]) -> bool {
        let mut spawned = self.spawned.iter();
        spawned.any(|spawned| numbers.contains(&spawned.number))
    }

    /// Lets these parts drain.
    pub(super) fn stop(&self, which: impl Fn(&Part) -> bool) {
        for spawned in self.spawned.iter().filter(|spawned| which(&spawned.part)) {
            spawned.stop.cancel();
        }
    }

    /// What of these parts still runs has lost its place in the process.
    pub(super) fn supersede(&mut self, which: impl Fn(&Part) -> bool) {
        for spawned in &mut self.spawned {
            spawned.superseded |= which(&spawned.part);
        }
    }
}

impl Parts {
    pub(super) fn new(config: Arc<Config>, arguments: &RunArguments) -> Self {
        let sinks = config.sinks.iter().map(|sink| sink.name.clone());
        let sinks = sinks.filter(|name| arguments.works_for(&Part::Sink(name.clone())));
        let sinks = sinks.map(|name| (name, Arc::default())).collect();
        let capture = arguments.works_for(&Part::Capture).then(Arc::default);
        Self {
            config,
            capture,
            sinks,
            failed: Vec::new(),
        }
    }

    /// What this process works for.
    pub(super) fn names(&self) -> Vec<Part> {
        let capture = self.capture.iter().map(|_| Part::Capture);
        let sinks = self.sinks.iter();
        let sinks = sinks.map(|(name, _)| Part::Sink(name.clone()));
        capture.chain(sinks).collect()
    }

    /// Starts these parts.
    pub(super) fn spawn(&self, running: &mut Running, which: impl Fn(&Part) -> bool) {
        if let Some(status) = self.capture.as_ref().filter(|_| which(&Part::Capture)) {
            let (config, status) = (Arc::clone(&self.config), Arc::clone(status));
            running.spawn(Part::Capture, |stop| async move {
                use millrace_cdc::Error;
                match Box::pin(millrace_cdc::run(&config, &status, &stop)).await {
                    Ok(()) => Ended::Stopped,
                    Err(
                        Error::Halt(condition)
                        | Error::Refused(condition)
                        | Error::Standby(condition),
                    ) => Ended::Failed {
                        condition,
                        begun: status.begun(),
                    },
                    Err(Error::Retry { .. }) => {
                        unreachable!("what passes is tried again, for ever")
                    }
                }
            });
        }
        for (name, status) in &self.sinks {
            let part = Part::Sink(name.clone());
            if !which(&part) {
                continue;
            }
            let (config, status) = (Arc::clone(&self.config), Arc::clone(status));
            let name = name.clone();
            running.spawn(part, |stop| async move {
                use millrace_sink::Error;
                let settings = config
                    .sink(&name)
                    .expect("parts are made of configured sinks");
                match millrace_sink::run(&config, settings, &status, &stop).await {
                    Ok(()) => Ended::Stopped,
                    Err(Error::Halt(condition) | Error::Refused(condition)) => {
                        let begun = status.snapshot().begun;
                        Ended::Failed { condition, begun }
                    }
                    Err(_) => {
                        unreachable!("what passes is tried again, for ever")
                    }
                }
            });
        }
    }

    /// Brings the board up to date.
    pub(super) fn show(&self, board: &Board) {
        let mut troubles = Vec::new();
        let failed = |part: &Part| {
            let mut failed = self.failed.iter();
            failed
                .find(|(failed, _)| failed == part)
                .map(|(_, condition)| condition.clone())
        };
        if let Some(status) = &self.capture {
            match status.state() {
                _ if failed(&Part::Capture).is_some() => {
                    board.halt_capture(failed(&Part::Capture).expect("just found"));
                }
                (State::Halted(_), Some(condition)) => board.halt_capture(condition),
                (State::Streaming, _) => {
                    troubles = status.copy_troubles();
                    match troubles.first() {
                        Some(trouble) => {
                            board.set_capture_with(State::Streaming, trouble.condition.clone());
                        }
                        None => board.set_capture(State::Streaming),
                    }
                }
                (state @ State::Retrying(_), Some(condition)) => {
                    board.set_capture_with(state, condition);
                }
                (state, _) => board.set_capture(state),
            }
            board.park_captured(status.parked());
        }
        for (name, status) in &self.sinks {
            let snapshot = status.snapshot();
            let part = Part::Sink(name.clone());
            let streams = snapshot.state == State::Streaming;
            match (snapshot.state, failed(&part).or(snapshot.condition)) {
                (_, Some(condition)) if failed(&part).is_some() => {
                    board.halt_sink(name, condition);
                }
                (State::Halted(_), Some(condition)) => board.halt_sink(name, condition),
                (state @ State::Retrying(_), Some(condition)) => {
                    board.set_sink_with(name, state, condition);
                }
                (state, _) => board.set_sink(name, state),
            }
            for (table, state, condition) in snapshot.tables {
                let trouble = troubles.iter().find(|trouble| {
                    trouble.sink == *name
                        && trouble
                            .table
                            .as_ref()
                            .is_none_or(|concerned| *concerned == table)
                });
                match (state, condition) {
                    (State::Streaming, Some(condition)) if streams => {
                        board.tell_table(name, &table, condition);
                    }
                    (State::Streaming, _) => board.set_table(name, &table, None),
                    (State::Parked(_), Some(condition)) => {
                        board.park_table(name, &table, condition)
                    }
                    (state, _) => match trouble {
                        Some(trouble) => {
                            board.retry_table(name, &table, trouble.condition.clone());
                        }
                        None => board.set_table(name, &table, Some(state)),
                    },
                }
            }
            if snapshot.checkpoint.position > Position::ZERO
                && snapshot.checkpoint.source_ts_us != 0
            {
                let checkpoint = snapshot.checkpoint;
                board.set_watermark(name, checkpoint.position, checkpoint.source_ts_us);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use millrace_config::Code;
    use tokio::sync::oneshot;

    use super::*;

    /// A part that ends so once it is told to, and not at its stop.
    fn stuck(running: &mut Running) -> oneshot::Sender<Ended> {
        let (end, ended) = oneshot::channel();
        running.spawn(Part::Capture, |_| async { ended.await.expect("told") });
        end
    }

    /// Longer than anything here takes.
    const LONG: std::time::Duration = std::time::Duration::from_secs(10);

    /// A part that ends at its stop, and in the end by itself: a test that fails must end too.
    fn willing(running: &mut Running) {
        running.spawn(Part::Capture, |stop| async move {
            drop(tokio::time::timeout(LONG, stop.cancelled()).await);
            Ended::Stopped
        });
    }

    #[tokio::test]
    async fn one_that_drains_for_long_takes_nothing_with_it_when_it_ends() {
        let mut running = Running::new();
        let end = stuck(&mut running);
        let first = running.numbers(|_| true);
        running.stop(|_| true);
        running.supersede(|_| true);
        willing(&mut running);
        assert_eq!(running.numbers(|_| true).len(), 2);
        let condition = Condition::new(Code::SlotLost, "gone", "drop");
        let failed = Ended::Failed {
            condition,
            begun: true,
        };
        end.send(failed).expect("it waits");
        let end = running.next().await.expect("one").expect("no panic");
        assert!(end.superseded, "its failure is none of its successor's");
        assert!(matches!(end.ended, Ended::Failed { .. }));
        assert!(!running.has_any(&first));

        // The successor is still known: a reload waits for it, and a stop reaches it.
        let second = running.numbers(|part| *part == Part::Capture);
        assert_eq!(second.len(), 1);
        assert!(running.has_any(&second));
        running.stop(|_| true);
        let end = tokio::time::timeout(LONG / 2, running.next()).await;
        let end = end
            .expect("it was stopped")
            .expect("one")
            .expect("no panic");
        assert!(!end.superseded);
        assert!(running.next().await.is_none());
    }
}
