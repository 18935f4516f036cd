//! `millrace run`: capture and sinks, until a signal.

mod change;
mod check;
mod parts;
mod reload;

use std::sync::Arc;
use std::time::Duration;

use millrace_config::{Condition, Config, Exit, limits};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinError;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub(super) use self::parts::Parts;
use self::parts::{End, Ended, Running};
use self::reload::Reload;
use super::once::{self, Goal};
use super::say;
use crate::admin::{self, Asked, Board};
use crate::arguments::RunArguments;

/// How often the parts' states are shown on the board.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// The same where the run ends once a goal is reached: somebody waits for it.
const GOAL_INTERVAL: Duration = Duration::from_millis(10);

/// A signal this soon after the first is the same one, sent twice.
const SAME_SIGNAL: Duration = Duration::from_millis(500);

/// How many may ask for a reload at once; more wait.
const RELOADS_MAX: usize = 4;

/// The exit code of a process that a second signal ended: 128 and the signal's number.
const SIGNALLED: i32 = 128;

/// Runs the parts that were asked for.
pub(crate) async fn run(config: Config, arguments: RunArguments) -> Exit {
    let metrics = match admin::install() {
        Ok(metrics) => metrics,
        Err(error) => {
            say(&format!("error: metrics cannot be set up: {error}"));
            return Exit::Internal;
        }
    };
    let mut parts = Parts::new(Arc::new(config), &arguments);
    let board = Arc::new(Board::new(
        parts.config.source.name.clone(),
        parts.capture.is_some(),
        parts.sinks.iter().map(|(name, _)| name.clone()),
    ));
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
    let (reloads, mut asked_reloads) = mpsc::channel(RELOADS_MAX);
    if let Some(listener) = listener {
        let (board, metrics, served) = (Arc::clone(&board), metrics.clone(), served.clone());
        tokio::spawn(admin::serve(listener, board, metrics, reloads, served));
    }
    tokio::spawn(admin::upkeep(metrics, served.clone()));
    let exit = supervise(&mut parts, &arguments, &board, &mut asked_reloads).await;
    served.cancel();
    exit
}

/// Runs the parts until a signal, the goal of `--once`, or a failure that needs an operator.
async fn supervise(
    parts: &mut Parts,
    arguments: &RunArguments,
    board: &Board,
    asked_reloads: &mut mpsc::Receiver<Asked>,
) -> Exit {
    let mut signals = match Signals::new() {
        Ok(signals) => signals,
        Err(error) => {
            say(&format!("error: signals cannot be received: {error}"));
            return Exit::Environment;
        }
    };
    let began = Instant::now();
    let deadline = began + arguments.timeout;
    let goal = match arguments.once {
        false => None,
        true => match goal(parts, &mut signals, deadline).await {
            Ok(goal) => Some(goal),
            Err(exit) => return exit,
        },
    };
    let mut running = Running::new();
    parts.spawn(&mut running, |_| true);
    let mut supervision = Supervision {
        parts,
        arguments,
        board,
        running,
        goal,
        reload: None,
        reload_wanted: false,
        reloaded: false,
    };
    let exit = supervision
        .until_exit(&mut signals, asked_reloads, deadline)
        .await;
    supervision.running.stop(|_| true);
    // Whoever asks for a reload now is told that the process ends.
    drop(supervision.reload.take());
    asked_reloads.close();
    while asked_reloads.try_recv().is_ok() {}
    let Supervision {
        parts,
        mut running,
        goal,
        ..
    } = supervision;
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

/// Finds the goal of `--once`, or how the process ends without one.
async fn goal(parts: &Parts, signals: &mut Signals, deadline: Instant) -> Result<Goal, Exit> {
    tokio::select! {
        biased;
        // Nothing runs yet that would have to drain.
        () = signals.end() => Err(Exit::Ok),
        goal = tokio::time::timeout_at(deadline, once::goal(parts)) => match goal {
            Ok(Ok(goal)) => Ok(goal),
            Ok(Err(failed)) => Err(fail(&failed)),
            Err(_) => Err(timed_out()),
        },
    }
}

/// The parts while they run.
struct Supervision<'s> {
    parts: &'s mut Parts,
    arguments: &'s RunArguments,
    board: &'s Board,
    running: Running,
    /// With `--once`.
    goal: Option<Goal>,
    /// A changed configuration that is being taken over.
    reload: Option<Reload>,
    /// Whether a signal asked for a reload that has not begun.
    reload_wanted: bool,
    /// Whether a changed configuration was ever taken over.
    reloaded: bool,
}

impl Supervision<'_> {
    /// Runs until there is a reason to end; nothing was told to stop then.
    async fn until_exit(
        &mut self,
        signals: &mut Signals,
        asked_reloads: &mut mpsc::Receiver<Asked>,
        deadline: Instant,
    ) -> Exit {
        let mut looks = tokio::time::interval(match self.goal {
            Some(_) => GOAL_INTERVAL,
            None => LOOK_INTERVAL,
        });
        looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            self.advance_reload();
            let idle = self.reload.is_none();
            let drain_until = self.reload.as_ref().and_then(Reload::deadline);
            tokio::select! {
                biased;
                signal = signals.next() => match signal {
                    Asks::End(_) => return Exit::Ok,
                    Asks::Reload => self.reload_wanted = true,
                },
                Some(ended) = self.running.next() => {
                    if let Some(exit) = self.part_ended(ended) {
                        return exit;
                    }
                }
                () = tokio::time::sleep_until(deadline), if self.goal.is_some() => {
                    return timed_out();
                }
                checked = Reload::checked(&mut self.reload) => {
                    let reload = self.reload.take();
                    self.reload = reload.and_then(|reload| reload.drain(checked, &self.running));
                }
                () = tokio::time::sleep_until(drain_until.unwrap_or(deadline)), if drain_until.is_some() => {
                    tracing::warn!("draining took too long; the parts that begin anew take over when it ends");
                    self.reload.iter_mut().for_each(Reload::wait_no_more);
                }
                Some(asked) = asked_reloads.recv(), if idle => {
                    self.reload = Reload::begin(self.parts, self.arguments, Some(asked));
                }
                _ = looks.tick() => {
                    self.parts.show(self.board);
                    if let Some(exit) = self.goal_reached() {
                        return exit;
                    }
                }
            }
        }
    }

    /// Takes over what has drained, and begins the next reload where one is wanted.
    fn advance_reload(&mut self) {
        loop {
            let running = &self.running;
            if let Some(drained) = self.reload.take_if(|reload| reload.is_drained(running)) {
                drained.finish(self.parts, &mut self.running, self.arguments, self.board);
                self.reloaded = true;
            }
            // However often it was wanted meanwhile, the folder is read once more.
            if self.reload.is_some() || !std::mem::take(&mut self.reload_wanted) {
                return;
            }
            self.reload = Reload::begin(self.parts, self.arguments, None);
        }
    }

    /// A part has ended: how the process does, if it does.
    fn part_ended(&mut self, ended: Result<End, JoinError>) -> Option<Exit> {
        let End {
            part,
            ended,
            superseded,
        } = match ended {
            Ok(end) => end,
            Err(panic) => {
                tracing::error!(error = %panic, "a part of the process broke");
                return Some(Exit::Internal);
            }
        };
        let Ended::Failed { condition, begun } = ended else {
            return None;
        };
        if superseded {
            tracing::warn!(
                %part, code = condition.code.as_str(),
                "what drained beside its successor has failed: {}", condition.message
            );
            return None;
        }
        self.parts.failed.push((part, condition.clone()));
        // Once it has worked the process lives on to say why it does no more.
        let drains = self.reload.as_ref().and_then(Reload::deadline).is_some();
        let begun = begun || self.reloaded || drains;
        if !begun || self.goal.is_some() || self.arguments.exit_on_halt {
            fail(&condition);
            return Some(match begun {
                true => Exit::Halted,
                false => Exit::Environment,
            });
        }
        tracing::error!(
            code = condition.code.as_str(), remedy = %condition.remedy,
            "halted: {}", condition.message
        );
        None
    }

    /// How the process ends once it has done what `--once` asks for.
    fn goal_reached(&self) -> Option<Exit> {
        self.goal.filter(|goal| goal.is_reached(self.parts))?;
        if once::is_incomplete(self.parts) {
            say("a table is parked; see `millrace status`");
            return Some(Exit::Finding);
        }
        Some(Exit::Ok)
    }
}

/// Waits until every part has ended, for as long as a stop may take; a second signal cuts it short.
async fn drain(running: &mut Running, signals: &mut Signals, exit: Exit) -> Exit {
    let drained = async {
        let mut exit = exit;
        while let Some(ended) = running.next().await {
            if let Err(error) = ended {
                tracing::error!(%error, "a part of the process broke");
                exit = Exit::Internal;
            }
        }
        exit
    };
    let repeated = async {
        // Some senders signal the process and its group: one wish, two signals.
        let began = Instant::now();
        loop {
            if let Asks::End(number) = signals.next().await
                && began.elapsed() >= SAME_SIGNAL
            {
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

fn fail(condition: &Condition) -> Exit {
    say(&format!("error: {condition}\nremedy: {}", condition.remedy));
    Exit::Environment
}

fn timed_out() -> Exit {
    say("error: --once did not reach its goal within --timeout");
    Exit::Environment
}

/// What a signal asks for.
enum Asks {
    /// The end of the process; the signal's number.
    End(i32),
    /// That the configuration is read again.
    Reload,
}

/// The signals that the process takes.
struct Signals {
    hangup: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            hangup: signal(SignalKind::hangup())?,
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// Waits for one that asks for the end of the process.
    async fn end(&mut self) {
        while let Asks::Reload = self.next().await {}
    }

    /// Waits for one.
    async fn next(&mut self) -> Asks {
        tokio::select! {
            _ = self.terminate.recv() => Asks::End(SignalKind::terminate().as_raw_value()),
            _ = self.interrupt.recv() => Asks::End(SignalKind::interrupt().as_raw_value()),
            _ = self.hangup.recv() => Asks::Reload,
        }
    }
}
