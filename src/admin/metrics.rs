//! The metrics of the process as Prometheus reads them.

use std::time::Duration;

use metrics::{Unit, describe_gauge, gauge};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use millrace_config::State;
use millrace_connect::clock::now_us;
use tokio_util::sync::CancellationToken;

use super::Board;
use crate::arguments::VERSION;

/// How often histograms are emptied into their buckets; without it their samples pile up.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

/// Buckets of durations, in seconds.
const SECONDS: &[f64] = &[
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
    60.0, 300.0,
];
/// Buckets of numbers of rows or changes.
const ROWS: &[f64] = &[1.0, 10.0, 100.0, 1_000.0, 5_000.0, 10_000.0, 100_000.0];
/// Buckets of sizes.
const BYTES: &[f64] = &[
    1_024.0,
    16_384.0,
    131_072.0,
    1_048_576.0,
    8_388_608.0,
    67_108_864.0,
];

const LAG: &str = "millrace_replication_lag_seconds";
const STATE: &str = "millrace_pipeline_state";
const BUILD: &str = "millrace_build_info";

/// Makes the process' metrics readable; to be called once, before any is used.
///
/// # Errors
/// Another recorder was installed before.
pub(crate) fn install() -> Result<PrometheusHandle, BuildError> {
    let handle = builder()?.install_recorder()?;
    describe_gauge!(
        LAG,
        Unit::Seconds,
        "Age of the newest source change before which a sink has everything"
    );
    describe_gauge!(
        STATE,
        "1 for the state that the pipeline is in, 0 for the others"
    );
    describe_gauge!(BUILD, "1, with the release as a label");
    Ok(handle)
}

fn builder() -> Result<PrometheusBuilder, BuildError> {
    let suffix = |text: &str| Matcher::Suffix(text.to_owned());
    PrometheusBuilder::new()
        .set_buckets_for_metric(suffix("_seconds"), SECONDS)?
        .set_buckets_for_metric(suffix("_rows"), ROWS)?
        .set_buckets_for_metric(suffix("_changes"), ROWS)?
        .set_buckets_for_metric(suffix("_bytes"), BYTES)
}

/// Brings what depends on the clock or the board up to date: to be called for each scrape.
pub(super) fn refresh(board: &Board) {
    let current = board.state().name();
    for state in State::NAMES {
        gauge!(STATE, "state" => state).set(if state == current { 1.0 } else { 0.0 });
    }
    gauge!(BUILD, "version" => VERSION.as_str()).set(1.0);
    for (sink, lag) in board.lags(now_us()) {
        gauge!(LAG, "sink" => sink).set(lag);
    }
}

/// A sink is gone: its lag is no number any more, which no alert fires on.
pub(crate) fn forget_lag(sink: &str) {
    gauge!(LAG, "sink" => sink.to_owned()).set(f64::NAN);
}

/// Keeps the memory of histograms flat, until it is told to stop.
pub(crate) async fn upkeep(handle: PrometheusHandle, stop: CancellationToken) {
    let mut interval = tokio::time::interval(UPKEEP_INTERVAL);
    while stop.run_until_cancelled(interval.tick()).await.is_some() {
        handle.run_upkeep();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scrape_shows_one_state_and_the_lag_of_each_sink() {
        let recorder = builder().expect("buckets").build_recorder();
        let handle = recorder.handle();
        let board = Board::new("shop", true, ["wh".to_owned()]);
        board.set_watermark("wh", millrace_event::Position::ZERO, now_us() - 2_000_000);
        metrics::with_local_recorder(&recorder, || {
            refresh(&board);
            metrics::histogram!("millrace_apply_latency_seconds").record(0.1);
        });
        let text = handle.render();
        assert!(
            text.contains("millrace_pipeline_state{state=\"starting\"} 1"),
            "{text}"
        );
        assert!(
            text.contains("millrace_pipeline_state{state=\"halted\"} 0"),
            "{text}"
        );
        assert!(
            text.contains("millrace_replication_lag_seconds{sink=\"wh\"} 2"),
            "{text}"
        );
        assert!(text.contains("millrace_build_info{version="), "{text}");
        assert!(
            text.contains("millrace_apply_latency_seconds_bucket{le=\"0.1\"} 1"),
            "{text}"
        );
    }
}
