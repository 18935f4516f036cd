//! `millrace run`: capture and sinks, until a signal.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use millrace_config::{Condition, Config, Exit, State, limits};
use millrace_event::Position;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::once;
use super::say;
use crate::admin::{self, Board};
use crate::arguments::{Part, RunArguments};

/// How often the parts' states are shown on the board, and a goal is looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// A signal this soon after the first is the same one, sent twice.
const SAME_SIGNAL: Duration = Duration::from_millis(500);

/// The exit code of a process that a second signal ended: 128 and the signal's number.
const SIGNALLED: i32 = 128;

/// The parts of this process, and what they tell.
pub(super) struct Parts {
    pub(super) config: Arc<Config>,
    pub(super) capture: Option<Arc<millrace_cdc::Status>>,
    pub(super) sinks: Vec<(String, Arc<millrace_sink::Status>)>,
}

/// How a part ended.
enum Ended {
    /// It was told to.
    Stopped,
    /// An operator must act; it may have worked before.
    Failed { condition: Condition, begun: bool },
}

/// Runs the parts that were asked for.
pub(crate) async fn run(config: Config, arguments: RunArguments) -> Exit {
    let metrics = match admin::install() {
        Ok(metrics) => metrics,
        Err(error) => {
            say(&format!("error: metrics cannot be set up: {error}"));
            return Exit::Internal;
        }
    };
    let parts = Parts::new(Arc::new(config), &arguments.only);
    let board = Arc::new(Board::new(
        parts.config.source.name.clone(),
        parts.capture.is_some(),
        parts.sinks.iter().map(|(name, _)| name.clone()),
    ));
    let stop = CancellationToken::new();
    let listener = match admin::bind(parts.config.admin.listen).await {
        Ok(listener) => listener,
        Err(error) => {
            say(&format!(
                "error: admin.listen = {}: {error}",
                parts.config.admin.listen
            ));
            return Exit::Environment;
        }
    };
    // The endpoint outlives the parts: it shows how they drain.
    let served = CancellationToken::new();
    if let Some(listener) = listener {
        let (board, metrics, served) = (Arc::clone(&board), metrics.clone(), served.clone());
        tokio::spawn(admin::serve(listener, board, metrics, served));
    }
    tokio::spawn(admin::upkeep(metrics, served.clone()));
    let exit = supervise(&parts, &arguments, &board, &stop).await;
    served.cancel();
    exit
}

/// Runs the parts until a signal, the goal of `--once`, or a failure that needs an operator.
async fn supervise(
    parts: &Parts,
    arguments: &RunArguments,
    board: &Board,
    stop: &CancellationToken,
) -> Exit {
    let mut signals = match Signals::new() {
        Ok(signals) => signals,
        Err(error) => {
            say(&format!("error: signals cannot be received: {error}"));
            return Exit::Environment;
        }
    };
    let began = tokio::time::Instant::now();
    let deadline = began + arguments.timeout;
    let goal = match arguments.once {
        false => None,
        true => match tokio::time::timeout_at(deadline, once::goal(parts)).await {
            Ok(Ok(goal)) => Some(goal),
            Ok(Err(failed)) => return fail(&failed),
            Err(_) => return timed_out(),
        },
    };
    let mut running = parts.spawn(stop);
    let mut looks = tokio::time::interval(LOOK_INTERVAL);
    looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let exit = loop {
        tokio::select! {
            biased;
            _ = signals.next() => break Exit::Ok,
            Some(ended) = running.join_next() => match ended {
                Ok(Ended::Stopped) => {}
                Ok(Ended::Failed { condition, begun }) => {
                    // Once it has worked the process lives on to say why it does no more.
                    if !begun || goal.is_some() || arguments.exit_on_halt {
                        fail(&condition);
                        break if begun { Exit::Halted } else { Exit::Environment };
                    }
                    tracing::error!(
                        code = condition.code.as_str(), remedy = %condition.remedy,
                        "halted: {}", condition.message
                    );
                }
                Err(panic) => {
                    tracing::error!(error = %panic, "a part of the process broke");
                    break Exit::Internal;
                }
            },
            () = tokio::time::sleep_until(deadline), if goal.is_some() => break timed_out(),
            _ = looks.tick() => {
                parts.show(board);
                if goal.as_ref().is_some_and(|goal| goal.is_reached(parts)) {
                    if once::is_incomplete(parts) {
                        say("a table is parked; see `millrace status`");
                        break Exit::Finding;
                    }
                    break Exit::Ok;
                }
            }
        }
    };
    stop.cancel();
    let reached = goal.filter(|goal| exit == Exit::Ok && goal.is_reached(parts));
    let exit = drain(&mut running, &mut signals, exit).await;
    if let Some(goal) = reached.filter(|_| exit == Exit::Ok) {
        super::answer(&format!(
            "{}\n",
            once::summary(&goal, parts, began.elapsed())
        ));
    }
    exit
}

/// Waits until every part has ended, for as long as a stop may take; a second signal cuts it short.
async fn drain(running: &mut JoinSet<Ended>, signals: &mut Signals, exit: Exit) -> Exit {
    let drained = async {
        let mut exit = exit;
        while let Some(ended) = running.join_next().await {
            if let Err(error) = ended {
                tracing::error!(%error, "a part of the process broke");
                exit = Exit::Internal;
            }
        }
        exit
    };
    let repeated = async {
        // Some senders signal the process and its group: one wish, two signals.
        let began = tokio::time::Instant::now();
        loop {
            let number = signals.next().await;
            if began.elapsed() >= SAME_SIGNAL {
                return number;
            }
        }
    };
    tokio::select! {
        biased;
        exit = drained => exit,
        number = repeated => {
            say("second signal: ending at once; what was under way is done again at the next start");
            std::process::exit(SIGNALLED + number);
        }
        () = tokio::time::sleep(limits::SHUTDOWN_DEADLINE) => {
            tracing::warn!("draining took too long; what was under way is done again at the next start");
            exit
        }
    }
}

impl Parts {
    fn new(config: Arc<Config>, only: &[Part]) -> Self {
        let wanted = |part: &Part| only.is_empty() || only.contains(part);
        let sinks = config
            .sinks
            .iter()
            .filter(|sink| wanted(&Part::Sink(sink.name.clone())))
            .map(|sink| (sink.name.clone(), Arc::default()))
            .collect();
        let capture = wanted(&Part::Capture).then(Arc::default);
        Self {
            config,
            capture,
            sinks,
        }
    }

    fn spawn(&self, stop: &CancellationToken) -> JoinSet<Ended> {
        let mut running = JoinSet::new();
        if let Some(status) = &self.capture {
            let (config, status, stop) =
                (Arc::clone(&self.config), Arc::clone(status), stop.clone());
            on_its_own_thread(&mut running, async move {
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
            let (config, status, stop) =
                (Arc::clone(&self.config), Arc::clone(status), stop.clone());
            let name = name.clone();
            on_its_own_thread(&mut running, async move {
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
        running
    }

    /// Brings the board up to date.
    fn show(&self, board: &Board) {
        let mut troubles = Vec::new();
        if let Some(status) = &self.capture {
            match status.state() {
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
        }
        for (name, status) in &self.sinks {
            let snapshot = status.snapshot();
            match (snapshot.state, snapshot.condition) {
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

fn fail(condition: &Condition) -> Exit {
    say(&format!("error: {condition}\nremedy: {}", condition.remedy));
    Exit::Environment
}

fn timed_out() -> Exit {
    say("error: --once did not reach its goal within --timeout");
    Exit::Environment
}

/// Runs a part on a thread of its own with all its connections, so that a row on its way through it wakes no
/// other thread: under load that costs more than the work itself.
fn on_its_own_thread(
    running: &mut JoinSet<Ended>,
    part: impl Future<Output = Ended> + Send + 'static,
) {
    running.spawn_blocking(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        runtime
            .expect("a thread and an epoll handle can be had")
            .block_on(part)
    });
}

/// The signals that end the process.
struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// Waits for one; returns its number.
    async fn next(&mut self) -> i32 {
        tokio::select! {
            _ = self.terminate.recv() => SignalKind::terminate().as_raw_value(),
            _ = self.interrupt.recv() => SignalKind::interrupt().as_raw_value(),
        }
    }
}
