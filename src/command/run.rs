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
use tokio_util::sync::CancellationToken;

pub(super) use self::parts::Parts;
use self::parts::{End, Ended, Running};
use self::reload::Reload;
use super::once;
use super::say;
use crate::admin::{self, Asked, Board};
use crate::arguments::RunArguments;

/// How often the parts' states are shown on the board, and a goal is looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

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
    let (asks, mut asked) = mpsc::channel(RELOADS_MAX);
    if let Some(listener) = listener {
        let (board, metrics, served) = (Arc::clone(&board), metrics.clone(), served.clone());
        tokio::spawn(admin::serve(listener, board, metrics, asks, served));
    }
    tokio::spawn(admin::upkeep(metrics, served.clone()));
    let exit = supervise(&mut parts, &arguments, &board, &mut asked).await;
    served.cancel();
    exit
}

/// Runs the parts until a signal, the goal of `--once`, or a failure that needs an operator.
async fn supervise(
    parts: &mut Parts,
    arguments: &RunArguments,
    board: &Board,
    asked: &mut mpsc::Receiver<Asked>,
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
        true => tokio::select! {
            biased;
            // Nothing runs yet that would have to drain.
            () = signals.end() => return Exit::Ok,
            goal = tokio::time::timeout_at(deadline, once::goal(parts)) => match goal {
                Ok(Ok(goal)) => Some(goal),
                Ok(Err(failed)) => return fail(&failed),
                Err(_) => return timed_out(),
            },
        },
    };
    let mut running = Running::new();
    parts.spawn(&mut running, |_| true);
    let mut reload: Option<Reload> = None;
    let (mut wanted, mut reloaded) = (false, false);
    let mut looks = tokio::time::interval(LOOK_INTERVAL);
    looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let exit = loop {
        if let Some(drained) = reload.take_if(|reload| reload.is_drained(&running)) {
            drained.finish(parts, &mut running, arguments, board);
            reloaded = true;
        }
        // However often it was wanted meanwhile, the folder is read once more.
        if reload.is_none() && std::mem::take(&mut wanted) {
            reload = Reload::begin(parts, arguments, None);
            continue;
        }
        let idle = reload.is_none();
        let reload_until = reload.as_ref().and_then(Reload::deadline);
        let drains = reload_until.is_some();
        tokio::select! {
            biased;
            asked = signals.next() => match asked {
                Asks::End(_) => break Exit::Ok,
                Asks::Reload => wanted = true,
            },
            Some(ended) = running.next() => match ended {
                Ok(End { ended: Ended::Stopped, .. }) => {}
                Ok(End { part, ended: Ended::Failed { condition, .. }, superseded: true }) => tracing::warn!(
                    %part, code = condition.code.as_str(),
                    "what drained beside its successor has failed: {}", condition.message
                ),
                Ok(End { part, ended: Ended::Failed { condition, begun }, .. }) => {
                    parts.failed.push((part, condition.clone()));
                    // Once it has worked the process lives on to say why it does no more.
                    let begun = begun || reloaded || drains;
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
            checked = Reload::checked(&mut reload) => {
                reload = reload.take().and_then(|reload| reload.drain(checked, &running));
            }
            () = tokio::time::sleep_until(reload_until.unwrap_or(deadline)), if drains => {
                tracing::warn!("draining took too long; the parts that begin anew take over when it ends");
                reload.iter_mut().for_each(Reload::wait_no_more);
            }
            Some(asked) = asked.recv(), if idle => {
                reload = Reload::begin(parts, arguments, Some(asked));
            }
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
    running.stop(|_| true);
    // Whoever asks for a reload now is told that the process ends.
    drop(reload);
    asked.close();
    while asked.try_recv().is_ok() {}
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
        let began = tokio::time::Instant::now();
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
