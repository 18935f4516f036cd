//! The parts of a process: capture and sinks, each on a thread of its own.

use std::future::Future;
use std::sync::Arc;

use millrace_config::{Condition, Config, State};
use millrace_event::Position;
use tokio::task::{JoinError, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::admin::Board;
use crate::arguments::Part;

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
    set: JoinSet<(Part, Ended)>,
    stops: Vec<(Part, CancellationToken)>,
}

/// How a part ended.
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
            stops: Vec::new(),
        }
    }

    /// Waits for the end of a part; none runs any more: `None`.
    pub(super) async fn next(&mut self) -> Option<Result<(Part, Ended), JoinError>> {
        let ended = self.set.join_next().await?;
        if let Ok((part, _)) = &ended {
            self.stops.retain(|(running, _)| running != part);
        }
        Some(ended)
    }

    /// The parts that have not ended.
    pub(super) fn parts(&self) -> impl Iterator<Item = &Part> {
        self.stops.iter().map(|(part, _)| part)
    }

    /// Lets these parts drain.
    pub(super) fn stop(&self, which: impl Fn(&Part) -> bool) {
        for (part, stop) in &self.stops {
            if which(part) {
                stop.cancel();
            }
        }
    }
}

impl Parts {
    pub(super) fn new(config: Arc<Config>, only: &[Part]) -> Self {
        let wanted = |part: &Part| only.is_empty() || only.contains(part);
        let sinks = config.sinks.iter().map(|sink| sink.name.clone());
        let sinks = sinks.filter(|name| wanted(&Part::Sink(name.clone())));
        let sinks = sinks.map(|name| (name, Arc::default())).collect();
        let capture = wanted(&Part::Capture).then(Arc::default);
        Self {
            config,
            capture,
            sinks,
            failed: Vec::new(),
        }
    }

    /// Starts these parts.
    pub(super) fn spawn(&self, running: &mut Running, which: impl Fn(&Part) -> bool) {
        if let Some(status) = self.capture.as_ref().filter(|_| which(&Part::Capture)) {
            let (config, status) = (Arc::clone(&self.config), Arc::clone(status));
            let stop = CancellationToken::new();
            running.stops.push((Part::Capture, stop.clone()));
            on_its_own_thread(&mut running.set, Part::Capture, async move {
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
            let stop = CancellationToken::new();
            running.stops.push((part.clone(), stop.clone()));
            let name = name.clone();
            on_its_own_thread(&mut running.set, part, async move {
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
                (state, _) => board.set_capture(state),
            }
            board.park_captured(status.parked());
        }
        for (name, status) in &self.sinks {
            let snapshot = status.snapshot();
            let part = Part::Sink(name.clone());
            match (snapshot.state, failed(&part).or(snapshot.condition)) {
                (_, Some(condition)) if failed(&part).is_some() => {
                    board.halt_sink(name, condition);
                }
                (State::Halted(_), Some(condition)) => board.halt_sink(name, condition),
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

/// Runs a part on a thread of its own with all its connections, so that a row on its way through it wakes no
/// other thread: under load that costs more than the work itself.
fn on_its_own_thread(
    running: &mut JoinSet<(Part, Ended)>,
    part: Part,
    works: impl Future<Output = Ended> + Send + 'static,
) {
    running.spawn_blocking(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        let runtime = runtime.expect("a thread and an epoll handle can be had");
        (part, runtime.block_on(works))
    });
}
