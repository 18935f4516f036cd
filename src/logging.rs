//! The log: lines on stderr, for people or for machines. stdout is for answers.

use std::io::{self, IsTerminal};

use millrace_config::{Log, LogFormat, LogLevel};
use tracing_subscriber::EnvFilter;

use crate::arguments::LogArguments;

/// What is logged before, or without, a configuration.
pub(crate) const DEFAULT: Log = Log {
    level: LogLevel::Info,
    format: LogFormat::Auto,
};

/// Starts the log; a second call changes nothing. The level is the flag's, else that of `RUST_LOG`, else the
/// configuration's.
pub(crate) fn start(arguments: LogArguments, log: Log) {
    let environment = std::env::var(EnvFilter::DEFAULT_ENV).ok();
    let directives = directives(arguments.log_level, environment.as_deref(), log.level);
    let terminal = io::stderr().is_terminal();
    let builder = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::builder().parse_lossy(directives))
        // A module's path is of no use to an operator, and its key, `target`, would meet the field of that name.
        .with_target(false)
        .with_writer(io::stderr);
    let started = if is_pretty(arguments.log_format.unwrap_or(log.format), terminal) {
        let colour = terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        builder.with_ansi(colour).try_init()
    } else {
        let json = builder.json().flatten_event(true);
        json.with_current_span(false)
            .with_span_list(false)
            .try_init()
    };
    // Only a second start can fail, and then there is a log already.
    drop(started);
}

/// Libraries speak up from warnings on; what they tell of their daily life is not the operator's.
fn directives(flag: Option<LogLevel>, environment: Option<&str>, configured: LogLevel) -> String {
    match (flag, environment.filter(|text| !text.trim().is_empty())) {
        (None, Some(environment)) => environment.to_owned(),
        (flag, _) => {
            let level = flag.unwrap_or(configured);
            let libraries = level.min(LogLevel::Warn).as_str();
            format!("{libraries},millrace={}", level.as_str())
        }
    }
}

fn is_pretty(format: LogFormat, terminal: bool) -> bool {
    match format {
        LogFormat::Auto => terminal,
        LogFormat::Pretty => true,
        LogFormat::Json => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flag_wins_then_the_environment_then_the_configuration() {
        let info = LogLevel::Info;
        assert_eq!(directives(None, None, info), "warn,millrace=info");
        assert_eq!(
            directives(None, Some(" "), LogLevel::Error),
            "error,millrace=error"
        );
        assert_eq!(directives(None, Some("debug"), info), "debug");
        let debug = Some(LogLevel::Debug);
        assert_eq!(directives(debug, Some("off"), info), "warn,millrace=debug");
    }

    #[test]
    fn auto_asks_the_terminal() {
        assert!(is_pretty(LogFormat::Auto, true) && !is_pretty(LogFormat::Auto, false));
        assert!(is_pretty(LogFormat::Pretty, false) && !is_pretty(LogFormat::Json, true));
    }
}
