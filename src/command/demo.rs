//! `millrace demo`: the whole line on throwaway servers.

use millrace_config::Exit;

use crate::arguments::DemoArguments;

/// Shows it.
pub(crate) async fn run(_arguments: DemoArguments) -> Exit {
    super::say("error: `demo` is not built yet");
    Exit::Internal
}
