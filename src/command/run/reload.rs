//! A changed configuration, taken over by a running process.

use std::collections::BTreeSet;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use millrace_config::{Code, Config, limits};
use tokio::time::Instant;

use super::change::{self, Change};
use super::check::{Checked, check};
use super::parts::{Number, Parts, Running};
use crate::admin::{Asked, Board, Reloaded, forget_lag};
use crate::arguments::{Part, RunArguments};

/// A configuration that is about to be taken over.
pub(super) struct Reload {
    config: Arc<Config>,
    change: Change,
    stage: Stage,
    /// What could not be looked at.
    unchecked: Vec<String>,
    asked: Option<Asked>,
}

/// How far it is.
enum Stage {
    /// The servers are asked whether they take it, and everything works on: entered first. Left to `Draining`, or the
    /// configuration is given up.
    Checking(BoxFuture<'static, Checked>),
    /// The parts that it concerns drain. Left for good when they have, or when that takes too long.
    Draining {
        /// What must end first.
        awaited: Vec<Number>,
        /// When the wait ends.
        deadline: Instant,
    },
}

impl Reload {
    /// Reads the configuration again. With mistakes, or when it is not for this process, it is told so and nothing
    /// changes.
    pub(super) fn begin(
        parts: &Parts,
        arguments: &RunArguments,
        asked: Option<Asked>,
    ) -> Option<Self> {
        let (mut config, change) = match read(parts, arguments) {
            Ok(read) => read,
            Err(reloaded) => {
                answer(asked, reloaded);
                return None;
            }
        };
        // What only a restart changes stays what it is.
        (config.admin, config.log) = (parts.config.admin, parts.config.log);
        let config = Arc::new(config);
        let checks = check(&parts.config, &config, &change, |part| {
            arguments.works_for(part)
        });
        Some(Self {
            stage: Stage::Checking(checks),
            config,
            change,
            unchecked: Vec::new(),
            asked,
        })
    }

    /// Waits for what the servers say to it. Nothing is asked: never ends.
    pub(super) async fn checked(reload: &mut Option<Self>) -> Checked {
        match reload.as_mut().map(|reload| &mut reload.stage) {
            Some(Stage::Checking(checks)) => checks.await,
            Some(Stage::Draining { .. }) | None => std::future::pending().await,
        }
    }

    /// Lets the parts drain that it concerns, unless one of them would halt with it: then it is told so and nothing
    /// changes.
    pub(super) fn drain(self, checked: Checked, running: &Running) -> Option<Self> {
        let unseen = match checked {
            Ok(unseen) => unseen,
            Err(condition) => {
                tracing::error!(
                    code = condition.code.as_str(), remedy = %condition.remedy,
                    "configuration not reloaded; going on with the old one: {}", condition.message
                );
                let refused = Reloaded::Refused {
                    reason: condition.message,
                    code: Some(condition.code.to_string()),
                    remedy: Some(condition.remedy),
                };
                answer(self.asked, refused);
                return None;
            }
        };
        for condition in &unseen {
            tracing::warn!(
                code = condition.code.as_str(),
                "taken over without being checked there: {}",
                condition.message
            );
        }
        let concerned = |part: &Part| self.change.concerns(part);
        let awaited = running.numbers(concerned);
        running.stop(concerned);
        Some(Self {
            stage: Stage::Draining {
                awaited,
                deadline: Instant::now() + limits::SHUTDOWN_DEADLINE,
            },
            unchecked: unseen.iter().map(ToString::to_string).collect(),
            ..self
        })
    }

    /// Whether nothing is waited for any more.
    pub(super) fn is_drained(&self, running: &Running) -> bool {
        match &self.stage {
            Stage::Checking(_) => false,
            Stage::Draining { awaited, .. } => !running.has_any(awaited),
        }
    }

    /// When the wait for what drains ends.
    pub(super) fn deadline(&self) -> Option<Instant> {
        match self.stage {
            Stage::Checking(_) => None,
            Stage::Draining { deadline, .. } => Some(deadline),
        }
    }

    /// Ends the wait: a part that still drains keeps its successor standing by.
    pub(super) fn wait_no_more(&mut self) {
        if let Stage::Draining { awaited, .. } = &mut self.stage {
            awaited.clear();
        }
    }

    /// Starts what has drained, what is new, and what an operator had to act for, by the new configuration.
    pub(super) fn finish(
        self,
        parts: &mut Parts,
        running: &mut Running,
        arguments: &RunArguments,
        board: &Board,
    ) {
        let Self {
            config,
            change,
            unchecked,
            asked,
            ..
        } = self;
        let ended = |part: &Part| parts.failed.iter().any(|(failed, _)| failed == part);
        let anew = |part: &Part| change.concerns(part) || ended(part);
        let mut next = Parts::new(config, arguments);
        if !anew(&Part::Capture) {
            next.capture.clone_from(&parts.capture);
        }
        for (name, status) in &mut next.sinks {
            let before = parts.sinks.iter().find(|(before, _)| before == name);
            if let Some((_, before)) = before.filter(|_| !anew(&Part::Sink(name.clone()))) {
                *status = Arc::clone(before);
            }
        }
        running.supersede(anew);
        next.spawn(running, anew);
        for (name, _) in &parts.sinks {
            if !next.sinks.iter().any(|(kept, _)| kept == name) {
                forget_lag(name);
            }
        }
        let tables = |name: &str| {
            let tables = next.config.tables_of(name);
            tables.map(|table| table.name.clone()).collect()
        };
        let kept: Vec<_> = next
            .sinks
            .iter()
            .map(|(name, _)| (name.clone(), tables(name)))
            .collect();
        board.keep_only(&kept);
        let (changed, needs_restart) = (change.summary(), change.needs_restart());
        let mut concerned = parts.names();
        concerned.extend(next.names());
        concerned.retain(|part| anew(part));
        let concerned = told(concerned);
        let mut elsewhere = Part::all(&next.config);
        elsewhere.retain(|part| !next.names().contains(part));
        let elsewhere = told(elsewhere);
        tracing::info!(%changed, parts = %concerned.join(", "), "configuration reloaded");
        if let Some(left) = &needs_restart {
            tracing::warn!("{left}");
        }
        *parts = next;
        answer(
            asked,
            Reloaded::Applied {
                changed,
                parts: concerned,
                elsewhere,
                unchecked,
                needs_restart,
            },
        );
    }
}

/// Reads the folder, and finds out what has changed.
fn read(parts: &Parts, arguments: &RunArguments) -> Result<(Config, Change), Reloaded> {
    if arguments.once {
        let reason = "`run --once` ends by itself and reads no configuration again".to_owned();
        tracing::warn!("configuration not reloaded: {reason}");
        return Err(refused(reason));
    }
    let config = crate::command::load(&parts.config.dir).map_err(|errors| {
        for error in errors.as_slice() {
            tracing::error!(
                code = Code::ConfigInvalid.as_str(),
                "configuration: {error}"
            );
        }
        let count = errors.as_slice().len();
        tracing::error!(
            errors = count,
            "configuration not reloaded; going on with the old one"
        );
        let errors = errors.to_string();
        Reloaded::Invalid { errors }
    })?;
    let change = match crate::command::unknown_sink(&config, arguments) {
        Some(reason) => Err(format!("{reason}; --only needs it")),
        None => change::compare(&parts.config, &config),
    };
    match change {
        Ok(change) => Ok((config, change)),
        Err(reason) => {
            tracing::error!("configuration not reloaded: {reason}");
            Err(refused(reason))
        }
    }
}

/// Parts as they are told, each once.
fn told(parts: Vec<Part>) -> Vec<String> {
    let parts: BTreeSet<_> = parts.iter().map(ToString::to_string).collect();
    parts.into_iter().collect()
}

fn refused(reason: String) -> Reloaded {
    Reloaded::Refused {
        reason,
        code: None,
        remedy: None,
    }
}

/// Answers whoever asked. One that has gone away need not know.
fn answer(asked: Option<Asked>, reloaded: Reloaded) {
    if let Some(asked) = asked {
        drop(asked.send(reloaded));
    }
}
