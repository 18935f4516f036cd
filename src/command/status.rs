//! `millrace status`: the source, the stream and the targets as they are, and what a running process adds.

mod judgement;
mod probe;
mod publication;
mod report;

use std::collections::BTreeMap;

use futures_util::future::join_all;
use millrace_config::{Config, Exit};
use millrace_connect::clock::now_us;

use crate::arguments::{Output, StatusArguments};
pub(super) use probe::{
    Found, Method, SinkSeen, ask, find, in_time, source_condition, stream_condition, target,
};
pub(super) use report::trimmed;
use report::{Report, SinkReport};

/// Looks at everything at once and prints it. What is out of reach is shown as such.
pub(crate) async fn status(config: &Config, arguments: StatusArguments) -> Exit {
    let report = Box::pin(look(config)).await;
    match arguments.output {
        Output::Table => super::answer(&report.render()),
        Output::Json => match serde_json::to_string_pretty(&report) {
            Ok(text) => super::answer(&format!("{text}\n")),
            Err(error) => {
                super::say(&format!(
                    "error: the status cannot be written as JSON: {error}"
                ));
                return Exit::Internal;
            }
        },
    }
    let findings = if arguments.check {
        report.findings(config.source.heartbeat_interval)
    } else {
        Vec::new()
    };
    for finding in &findings {
        super::say(finding);
    }
    if findings.is_empty() {
        Exit::Ok
    } else {
        Exit::Finding
    }
}

async fn look(config: &Config) -> Report {
    let sinks = join_all(config.sinks.iter().map(probe::sink));
    let (live, (source, clock_us), stream, sinks) = tokio::join!(
        probe::live(config),
        probe::source(config),
        probe::stream(config),
        sinks
    );
    // The source's clock wrote the times that lags are counted from; ours stands in for it.
    let clock_us = clock_us.unwrap_or_else(now_us);
    let seen: BTreeMap<_, _> = config
        .sinks
        .iter()
        .map(|sink| sink.name.as_str())
        .zip(sinks.iter())
        .collect();
    let sinks: Vec<SinkReport> = seen
        .iter()
        .map(|(name, seen)| SinkReport::new(name, seen, live.as_ref(), stream.last_seq, clock_us))
        .collect();
    let capture = judgement::capture(live.as_ref(), &source, &stream);
    // A capture that runs looks by itself, and tells.
    let tells = live
        .as_ref()
        .is_some_and(|live| live.source.capture.is_some());
    let missing = match &stream.captured {
        Some(captured) if source.reachable && !tells => {
            publication::missing(config, captured).await
        }
        _ => Ok(publication::Missing::new()),
    };
    let tables = judgement::tables(config, live.as_ref(), &seen, &sinks, &stream, &capture);
    let tables = judgement::without_missing(tables, stream.captured.as_deref(), missing);
    let overall = judgement::overall(live.as_ref(), &capture, &stream.part, &sinks);
    Report {
        overall,
        running: live.is_some(),
        source: source.with(capture),
        stream,
        sinks,
        tables,
    }
}
