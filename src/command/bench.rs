//! `millrace bench`: the measurements of the README.

use millrace_config::Exit;

use crate::arguments::BenchArguments;

/// Measures it.
pub(crate) async fn run(_arguments: BenchArguments) -> Exit {
    super::say("error: `bench` is not built yet");
    Exit::Internal
}
