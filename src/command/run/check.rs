//! What the servers say to a changed configuration, before anything is stopped for it.

use std::sync::Arc;

use futures_util::future::{BoxFuture, join_all};
use millrace_cdc::stream::StreamError;
use millrace_config::{Code, Condition, Config};
use millrace_connect::nats::NatsError;

use super::change::Change;
use crate::arguments::Part;
use crate::command::status::{in_time, source_condition};
use crate::connection::{self, Side};

/// What the servers' monitoring shows.
const NAME: &str = "millrace check";

/// What came of it: what could not be looked at, which is no reason to refuse; or why a part would halt.
pub(super) type Checked = Result<Vec<Condition>, Condition>;

/// What is asked.
#[derive(Debug, Default, PartialEq, Eq)]
struct Asks {
    /// The source about its tables, and the stream about what was captured.
    capture: bool,
    /// The stream about the login alone.
    stream: bool,
    /// The targets of these sinks about the login.
    sinks: Vec<String>,
}

/// Asks for the parts that the change concerns, of those that this process has. Each server has a time limit.
pub(super) fn check(
    old: &Arc<Config>,
    config: &Arc<Config>,
    change: &Change,
    here: impl Fn(&Part) -> bool,
) -> BoxFuture<'static, Checked> {
    let asks = asks(old, config, change, here);
    let (old, config) = (Arc::clone(old), Arc::clone(config));
    Box::pin(async move { ask(&old, &config, &asks).await })
}

/// A sink whose own settings are as they were has its target already.
fn asks(old: &Config, new: &Config, change: &Change, here: impl Fn(&Part) -> bool) -> Asks {
    let concerned = |part: &Part| change.concerns(part) && here(part);
    let sinks = new.sinks.iter().map(|sink| &sink.name);
    let sinks: Vec<_> = sinks
        .filter(|name| concerned(&Part::Sink((*name).clone())))
        .cloned()
        .collect();
    Asks {
        capture: concerned(&Part::Capture),
        stream: !sinks.is_empty() && old.stream != new.stream,
        sinks: sinks
            .into_iter()
            .filter(|name| old.sink(name) != new.sink(name))
            .collect(),
    }
}

async fn ask(old: &Config, config: &Config, asks: &Asks) -> Checked {
    let capture = async {
        let answer = in_time(Code::SourceUnreachable, async {
            let checked = Box::pin(millrace_cdc::check(old, config)).await;
            checked.map_err(|error| condition(&error))
        });
        if asks.capture { answer.await } else { Ok(()) }
    };
    let stream = async {
        let answer = in_time(Code::StreamUnreachable, async {
            connection::nats(&config.stream, NAME).await.map(drop)
        });
        if asks.stream { answer.await } else { Ok(()) }
    };
    let sinks = asks.sinks.iter().filter_map(|name| config.sink(name));
    let sinks = sinks.map(|sink| {
        in_time(Code::SinkUnreachable, async {
            let connected = connection::postgres(&sink.url, Side::Target, NAME).await;
            connected.map(drop).map_err(|condition| Condition {
                message: format!("sink {}: {}", sink.name, condition.message),
                ..condition
            })
        })
    });
    let (capture, stream, sinks) = tokio::join!(capture, stream, join_all(sinks));
    let answers = [capture, stream].into_iter().chain(sinks);
    judge(answers)
}

/// Capture asks two servers: what passes is the fault of one of them.
fn condition(error: &millrace_cdc::Error) -> Condition {
    let condition = source_condition(error);
    match error {
        millrace_cdc::Error::Retry {
            source: Some(source),
            ..
        } if source.is::<NatsError>() || source.is::<StreamError>() => Condition {
            code: Code::StreamUnreachable,
            ..condition
        },
        _ => condition,
    }
}

/// The first that keeps a part from working; without one what is out of reach, which passes.
fn judge(answers: impl IntoIterator<Item = Result<(), Condition>>) -> Checked {
    let mut unseen = Vec::new();
    for condition in answers.into_iter().filter_map(Result::err) {
        match condition.code {
            Code::SourceUnreachable | Code::StreamUnreachable | Code::SinkUnreachable => {
                unseen.push(condition);
            }
            _ => return Err(condition),
        }
    }
    Ok(unseen)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_out_of_reach_is_no_reason_to_refuse() {
        let said = |code| Err(Condition::new(code, "said", "do"));
        let away = judge([
            said(Code::SourceUnreachable),
            Ok(()),
            said(Code::SinkUnreachable),
        ]);
        assert_eq!(away.expect("it may pass").len(), 2);
        let wrong = judge([said(Code::SourceUnreachable), said(Code::TargetAuth)]);
        assert_eq!(wrong.expect_err("it stays").code, Code::TargetAuth);
    }
}
