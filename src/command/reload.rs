//! `millrace reload`: asks the running process to take over what has changed in the configuration.

use std::time::Duration;

use millrace_config::{Config, Exit, limits};
use tokio::time::timeout;

use super::status::{Found, Method, ask, find};
use crate::admin::Reloaded;

/// How long the process may take: it asks the servers, its parts drain, and a reload that runs already comes before.
const ANSWER_MAX: Duration = limits::SHUTDOWN_DEADLINE.saturating_mul(4);

/// Prints what has changed, or why nothing has. The mistakes of a configuration that is wrong were printed when it
/// was loaded here; the process may see others, because its environment is its own.
pub(crate) async fn reload(config: &Config) -> Exit {
    let listen = config.admin.listen;
    // Several pipelines may share the default address, which one of them has: it must not be another one.
    match find(config).await {
        Found::Ours(_) => {}
        Found::Other(name) => {
            super::say(&format!(
                "error: the process at admin.listen = {listen} works for source {name:?}, not for {:?}: nothing was reloaded\n\
                 remedy: give each pipeline an admin.listen of its own, or send SIGHUP to the process of this one; \
                 where source.name was changed that is another pipeline, which needs a process of its own",
                config.source.name
            ));
            return Exit::Environment;
        }
        Found::Stranger => return stranger(config),
        Found::Nobody(error) => {
            super::say(&format!(
                "error: no process answers at admin.listen = {listen}: {error}\n\
                 remedy: start `millrace run` in this configuration, or send SIGHUP to the process if it listens elsewhere"
            ));
            return Exit::Environment;
        }
    }
    let answer = match timeout(ANSWER_MAX, ask(listen, Method::Post, "/reload")).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) => {
            super::say(&format!(
                "error: the process at admin.listen = {listen} gave no answer: {error}; its log tells what it does"
            ));
            return Exit::Environment;
        }
        Err(_) => {
            super::say(&format!(
                "error: the process at admin.listen = {listen} did not answer within {} s; its log tells what it does",
                ANSWER_MAX.as_secs()
            ));
            return Exit::Environment;
        }
    };
    match serde_json::from_str(&answer) {
        Ok(reloaded) => tell(reloaded),
        Err(_) => stranger(config),
    }
}

fn stranger(config: &Config) -> Exit {
    super::say(&format!(
        "error: what answers at admin.listen = {} is no millrace that reloads",
        config.admin.listen
    ));
    Exit::Environment
}

/// Prints what the process answers.
fn tell(reloaded: Reloaded) -> Exit {
    match reloaded {
        Reloaded::Applied {
            changed,
            parts,
            elsewhere,
            unchecked,
            needs_restart,
        } => {
            let anew = match parts.is_empty() {
                true => String::new(),
                false => format!(" (concerned: {})", parts.join(", ")),
            };
            super::answer(&format!("configuration reloaded: {changed}{anew}\n"));
            let unchecked = unchecked.iter();
            let mut warnings: Vec<_> = unchecked
                .map(|reason| format!("taken over without being checked there: {reason}"))
                .collect();
            warnings.extend(needs_restart);
            if !elsewhere.is_empty() {
                warnings.push(format!(
                    "this process does not run {}: send SIGHUP to the process that does",
                    elsewhere.join(", ")
                ));
            }
            for warning in warnings {
                super::say(&format!("warning: {warning}"));
            }
            Exit::Ok
        }
        Reloaded::Invalid { errors } => {
            super::say(&format!(
                "{errors}\nerror: the process goes on with its old configuration"
            ));
            Exit::Config
        }
        Reloaded::Refused {
            reason,
            code,
            remedy,
        } => {
            let code = code.map_or(String::new(), |code| format!("{code}: "));
            super::say(&format!("error: {code}{reason}"));
            if let Some(remedy) = remedy {
                super::say(&format!(
                    "remedy: {remedy}\nthe process goes on with its old configuration"
                ));
            }
            Exit::Config
        }
        Reloaded::Forbidden { reason } => {
            super::say(&format!("error: the process does not take this: {reason}"));
            Exit::Environment
        }
        Reloaded::Ending => {
            super::say("error: the process ends: nothing was reloaded");
            Exit::Environment
        }
    }
}
