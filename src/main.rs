//! Millrace: every committed row change of a Postgres database, in the databases of other services.
//!
//! Two phases: the command line, the configuration and the log come before the runtime is started, so that
//! whatever is wrong with them is said at once and in plain words.

mod admin;
mod arguments;
mod command;
mod connection;
mod logging;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use clap::Parser;
use millrace_config::Exit;

use crate::arguments::Arguments;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // A panic has printed itself; without this its exit code would be none of ours.
    let exit = catch_unwind(AssertUnwindSafe(|| command::execute(arguments)));
    exit.unwrap_or(Exit::Internal).into()
}
