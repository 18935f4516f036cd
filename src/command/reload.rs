//! `millrace reload`: asks the running process to take over what has changed in the configuration.

use std::time::Duration;

use millrace_config::{Config, Exit, limits};
use tokio::time::timeout;

use super::status::{Method, ask};
use crate::admin::Reloaded;

/// How long the process may take: its parts drain first, and a reload that runs already comes before.
const ANSWER_MAX: Duration = limits::SHUTDOWN_DEADLINE.saturating_mul(3);

/// Prints what has changed, or why nothing has. The mistakes of a configuration that is wrong were printed when it
/// was loaded here; the process may see others, because its environment is its own.
pub(crate) async fn reload(config: &Config) -> Exit {
    let listen = config.admin.listen;
    let answer = match timeout(ANSWER_MAX, ask(listen, Method::Post, "/reload")).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) => {
            super::say(&format!(
                "error: no process answers at admin.listen = {listen}: {error}\n\
                 remedy: start `millrace run` in this configuration, or send SIGHUP to the process if it listens elsewhere"
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
        Ok(Reloaded::Applied {
            changed,
            needs_restart,
        }) => {
            super::answer(&format!("configuration reloaded: {changed}\n"));
            if let Some(left) = needs_restart {
                super::say(&format!("warning: {left}"));
            }
            Exit::Ok
        }
        Ok(Reloaded::Invalid { errors }) => {
            super::say(&format!(
                "{errors}\nerror: the process goes on with its old configuration"
            ));
            Exit::Config
        }
        Ok(Reloaded::Refused { reason }) => {
            super::say(&format!("error: {reason}"));
            Exit::Config
        }
        Err(_) => {
            super::say(&format!(
                "error: what answers at admin.listen = {listen} is no millrace that reloads"
            ));
            Exit::Environment
        }
    }
}
