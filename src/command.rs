//! One file per verb, and what they have in common.

mod attempts;
mod backfill;
mod bench;
mod demo;
mod drop;
mod explain;
mod init_sql;
mod once;
mod reload;
mod run;
mod status;
mod validate;

use std::future::Future;
use std::io::Write;
use std::path::Path;

use millrace_config::{Code, Config, ConfigErrors, Exit};

use crate::arguments::{Arguments, Command, Part, RunArguments};
use crate::logging;

/// Does what the command line says.
pub(crate) fn execute(arguments: Arguments) -> Exit {
    let Arguments {
        config,
        log,
        command,
    } = arguments;
    let configured = |act: &mut dyn FnMut(Config) -> Exit| match load(&config) {
        Ok(config) => {
            logging::start(log, config.log);
            act(config)
        }
        Err(errors) => refuse(&errors),
    };
    match command {
        Command::Run(arguments) => {
            configured(&mut |config| match unknown_sink(&config, &arguments) {
                Some(message) => usage(&message),
                None => block_on(run::run(config, arguments.clone())),
            })
        }
        Command::Validate => configured(&mut |config| validate::validate(&config)),
        Command::Status(arguments) => {
            configured(&mut |config| block_on(status::status(&config, arguments)))
        }
        Command::Backfill(arguments) => {
            configured(&mut |config| block_on(backfill::backfill(&config, arguments.verb.clone())))
        }
        Command::Reload => configured(&mut |config| block_on(reload::reload(&config))),
        Command::Drop(arguments) => {
            configured(&mut |config| block_on(drop::drop(&config, arguments)))
        }
        Command::InitSql(arguments) => {
            configured(&mut |config| init_sql::init_sql(&config, arguments))
        }
        Command::Explain { code } => explain::explain(code.as_deref()),
        Command::Demo(arguments) => {
            logging::start(log, logging::DEFAULT);
            block_on(demo::run(arguments))
        }
        Command::Bench(arguments) => {
            logging::start(log, logging::DEFAULT);
            block_on(bench::run(arguments))
        }
        Command::BenchBackfill(arguments) => {
            logging::start(log, logging::DEFAULT);
            block_on(bench::run_backfill(arguments))
        }
    }
}

fn load(dir: &Path) -> Result<Config, ConfigErrors> {
    Config::load(dir, &|name| std::env::var(name).ok())
}

/// Prints every mistake of the configuration.
fn refuse(errors: &ConfigErrors) -> Exit {
    let count = errors.as_slice().len();
    let plural = if count == 1 { "" } else { "s" };
    say(&format!(
        "{errors}\nerror: {}: {count} error{plural}; see `millrace explain {}`",
        Code::ConfigInvalid.title(),
        Code::ConfigInvalid
    ));
    Exit::Config
}

/// A sink that `--only` names and the configuration does not have.
fn unknown_sink(config: &Config, arguments: &RunArguments) -> Option<String> {
    arguments.only.iter().find_map(|part| match part {
        Part::Sink(name) if config.sink(name).is_none() => {
            let known: Vec<_> = config.sinks.iter().map(|sink| sink.name.as_str()).collect();
            let known = if known.is_empty() {
                "none".to_owned()
            } else {
                known.join(", ")
            };
            Some(format!("there is no sink {name:?}; configured: {known}"))
        }
        Part::Sink(_) | Part::Capture => None,
    })
}

/// Says what is wrong with the command line.
fn usage(message: &str) -> Exit {
    say(&format!("error: {message}"));
    Exit::Usage
}

fn block_on(verb: impl Future<Output = Exit>) -> Exit {
    match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => {
            let exit = runtime.block_on(verb);
            // A part that did not end in time is left behind.
            runtime.shutdown_background();
            exit
        }
        Err(error) => {
            say(&format!("error: the runtime cannot be started: {error}"));
            Exit::Environment
        }
    }
}

/// Writes an answer to stdout. A reader that went away (`| head`) is none of our concern.
fn answer(text: &str) {
    let mut stdout = std::io::stdout().lock();
    let _ = stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush());
}

/// Writes a line for people to stderr.
fn say(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}
