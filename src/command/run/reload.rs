//! A changed configuration, taken over by a running process.

use std::sync::Arc;

use millrace_config::{Code, Config, limits};
use tokio::time::Instant;

use super::change::{self, Change};
use super::parts::{Parts, Running};
use crate::admin::{Asked, Board, Reloaded, forget_lag};
use crate::arguments::{Part, RunArguments};

/// A configuration that waits for the parts which it concerns to drain.
pub(super) struct Reload {
    config: Config,
    change: Change,
    /// Parts that must end first.
    awaited: Vec<Part>,
    deadline: Instant,
    asked: Option<Asked>,
}

impl Reload {
    /// Reads the configuration again, and lets the parts drain that it concerns. With mistakes, or when it is not
    /// for this process, it is told so and nothing changes.
    pub(super) fn begin(
        parts: &Parts,
        running: &Running,
        arguments: &RunArguments,
        asked: Option<Asked>,
    ) -> Option<Self> {
        let (config, change) = match read(parts, arguments) {
            Ok(read) => read,
            Err(reloaded) => {
                answer(asked, reloaded);
                return None;
            }
        };
        let awaited = running.parts().filter(|part| change.concerns(part));
        let awaited = awaited.cloned().collect();
        running.stop(|part| change.concerns(part));
        Some(Self {
            config,
            change,
            awaited,
            deadline: Instant::now() + limits::SHUTDOWN_DEADLINE,
            asked,
        })
    }

    /// Whether nothing is waited for any more.
    pub(super) fn is_drained(&self, running: &Running) -> bool {
        !self
            .awaited
            .iter()
            .any(|awaited| running.parts().any(|part| part == awaited))
    }

    /// When the wait ends.
    pub(super) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Ends the wait: a part that still drains keeps its successor standing by.
    pub(super) fn wait_no_more(&mut self) {
        self.awaited.clear();
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
            mut config,
            change,
            asked,
            ..
        } = self;
        // What only a restart changes stays what it is.
        (config.admin, config.log) = (parts.config.admin, parts.config.log);
        let ended = |part: &Part| parts.failed.iter().any(|(failed, _)| failed == part);
        let anew = |part: &Part| change.concerns(part) || ended(part);
        let mut next = Parts::new(Arc::new(config), &arguments.only);
        if !anew(&Part::Capture) {
            next.capture.clone_from(&parts.capture);
        }
        for (name, status) in &mut next.sinks {
            let before = parts.sinks.iter().find(|(before, _)| before == name);
            if let Some((_, before)) = before.filter(|_| !anew(&Part::Sink(name.clone()))) {
                *status = Arc::clone(before);
            }
        }
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
        tracing::info!(%changed, "configuration reloaded");
        if let Some(left) = &needs_restart {
            tracing::warn!("{left}");
        }
        *parts = next;
        answer(
            asked,
            Reloaded::Applied {
                changed,
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
        return Err(Reloaded::Refused { reason });
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
            Err(Reloaded::Refused { reason })
        }
    }
}

/// Answers whoever asked. One that has gone away need not know.
fn answer(asked: Option<Asked>, reloaded: Reloaded) {
    if let Some(asked) = asked {
        drop(asked.send(reloaded));
    }
}
