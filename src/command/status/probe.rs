//! Looks at one place each: a server's answer, or why there is none.

use std::collections::BTreeMap;
use std::error::Error as StdError;
use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::Context;
use millrace_cdc::{Captured, source, stream};
use millrace_config::{Code, Condition, Config, Sink};
use millrace_event::subject;
use millrace_event::work::{self, BackfillOrder};
use millrace_sink::batch::PositionRow;
use millrace_sink::postgres::Connect;
use millrace_sink::sink::SinkError;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::report::{SlotReport, SourceReport, StreamReport};
use crate::admin::{Live, LivePart};
use crate::connection::{self, Side, chain};

/// How long one place may take to answer.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// How long what is stored beside the stream may take.
const BESIDE_MAX: Duration = Duration::from_secs(4);
/// How long the running process may take: it is on this machine, as a rule.
const LIVE_MAX: Duration = Duration::from_secs(2);
/// The longest answer of a running process that is read.
const LIVE_BYTES_MAX: u64 = 4 * 1024 * 1024;
/// What the servers' monitoring shows.
pub(super) const NAME: &str = "millrace status";

const LATE_REMEDY: &str = "check the network and the server's load";

/// Who answers at the admin address.
#[derive(Debug)]
pub(in crate::command) enum Found {
    /// A process of this source.
    Ours(Box<Live>),
    /// A process of another source, by its name.
    Other(String),
    /// Something else.
    Stranger,
    /// Nobody.
    Nobody(std::io::Error),
}

/// Asks who listens at the admin address.
pub(in crate::command) async fn find(config: &Config) -> Found {
    let asked = ask(config.admin.listen, Method::Get, "/status");
    let answer = timeout(LIVE_MAX, asked).await;
    let text = match answer.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into())) {
        Ok(text) => text,
        Err(error) => return Found::Nobody(error),
    };
    match serde_json::from_str::<Live>(&text) {
        Ok(live) if live.source.name == config.source.name => Found::Ours(Box::new(live)),
        Ok(live) => Found::Other(live.source.name),
        Err(_) => Found::Stranger,
    }
}

/// What the process at the admin address says, if one of this source answers there.
pub(super) async fn live(config: &Config) -> Option<Live> {
    match find(config).await {
        Found::Ours(live) => Some(*live),
        Found::Other(_) | Found::Stranger | Found::Nobody(_) => None,
    }
}

/// Where a process that listens on every address is found from here.
fn local(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, listen.port())
}

/// How the running process is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::command) enum Method {
    Get,
    Post,
}

/// Asks what listens at an address; returns the body of its answer.
pub(in crate::command) async fn ask(
    listen: SocketAddr,
    method: Method,
    path: &str,
) -> std::io::Result<String> {
    let address = local(listen);
    let mut socket = TcpStream::connect(address).await?;
    let method = match method {
        Method::Get => "GET",
        Method::Post => "POST",
    };
    // By HTTP/1.0 the answer ends with the connection, in one piece.
    let request =
        format!("{method} {path} HTTP/1.0\r\nHost: {address}\r\nContent-Length: 0\r\n\r\n");
    socket.write_all(request.as_bytes()).await?;
    let mut text = String::new();
    socket
        .take(LIVE_BYTES_MAX)
        .read_to_string(&mut text)
        .await?;
    match text.split_once("\r\n\r\n") {
        Some((_, body)) => Ok(body.to_owned()),
        None => Err(std::io::ErrorKind::UnexpectedEof.into()),
    }
}

/// The source, and its clock in microseconds since 1970.
pub(super) async fn source(config: &Config) -> (SourceReport, Option<i64>) {
    let name = config.source.name.clone();
    match in_time(Code::SourceUnreachable, read_source(config)).await {
        Ok((report, clock_us)) => (SourceReport { name, ..report }, Some(clock_us)),
        Err(condition) => {
            let part = LivePart::because("unreachable", &condition);
            (
                SourceReport {
                    name,
                    part,
                    ..SourceReport::default()
                },
                None,
            )
        }
    }
}

async fn read_source(config: &Config) -> Result<(SourceReport, i64), Condition> {
    let client = connection::postgres(&config.source.url, Side::Source, NAME).await?;
    let row = client
        .query_one(
            "SELECT current_setting('server_version_num')::int, current_database()::text, \
             (extract(epoch FROM clock_timestamp()) * 1000000)::bigint",
            &[],
        )
        .await
        .map_err(|error| Condition::new(Code::SourceUnreachable, chain(&error), LATE_REMEDY))?;
    // A precondition that does not hold is the state of a source that is there.
    let part = match source::inspect(&client).await {
        Ok(_) => LivePart::default(),
        Err(error) => LivePart::because("halted", &source_condition(&error)),
    };
    let slot = source::slot_name(&config.source.name);
    let found = source::find_slot(&client, &slot)
        .await
        .map_err(|error| source_condition(&error))?;
    let wal = source::wal_position(&client)
        .await
        .map_err(|error| source_condition(&error))?;
    let database: String = row.get(1);
    let lost = found
        .as_ref()
        .and_then(|found| source::slot_precondition(&slot, &database, found).err());
    let part = lost.map_or(part, |error| {
        LivePart::because("halted", &source_condition(&error))
    });
    let report = SourceReport {
        name: String::new(),
        part,
        reachable: true,
        version: Some(row.get(0)),
        database: Some(database),
        wal_lsn: Some(wal.to_string()),
        slot: found.map(|found| SlotReport {
            name: slot,
            active_pid: found.active_pid,
            wal_status: found.wal_status,
            confirmed_lsn: found.confirmed.to_string(),
            restart_lsn: found.restart.map(|lsn| lsn.to_string()),
            lag_bytes: wal.0.saturating_sub(found.confirmed.0),
            retained_bytes: found.retained_bytes,
        }),
    };
    Ok((report, row.get(2)))
}

/// An error of the source as a condition.
pub(in crate::command) fn source_condition(error: &millrace_cdc::Error) -> Condition {
    match error {
        millrace_cdc::Error::Halt(condition)
        | millrace_cdc::Error::Refused(condition)
        | millrace_cdc::Error::Standby(condition) => condition.clone(),
        other => Condition::new(Code::SourceUnreachable, chain(other), LATE_REMEDY),
    }
}

/// The stream.
pub(super) async fn stream(config: &Config) -> StreamReport {
    let name = subject::stream_name(&config.source.name);
    let answer = in_time(
        Code::StreamUnreachable,
        Box::pin(read_stream(config, &name)),
    );
    match answer.await {
        Ok(report) => StreamReport { name, ..report },
        Err(condition) => {
            let part = LivePart::because("unreachable", &condition);
            StreamReport {
                name,
                part,
                ..StreamReport::default()
            }
        }
    }
}

async fn read_stream(config: &Config, name: &str) -> Result<StreamReport, Condition> {
    let jetstream = connection::nats(&config.stream, NAME).await?;
    let found = stream::find_stream(&jetstream, name)
        .await
        .map_err(|error| stream_condition(&error))?;
    // What cannot be read is not known, and the stream is there all the same.
    let (captured, ordered) = tokio::join!(
        timeout(BESIDE_MAX, captured(config, &jetstream)),
        timeout(BESIDE_MAX, ordered(config, &jetstream))
    );
    let captured = captured.unwrap_or_else(|_| Err(late(Code::StreamUnreachable, BESIDE_MAX)));
    let ordered = ordered.unwrap_or_else(|_| Err(late(Code::StreamUnreachable, BESIDE_MAX)));
    let part = |state: &str| {
        let lists = ordered.as_ref().map(|ordered| ordered.unread.as_ref());
        let unread = captured.as_ref().err().or(lists.unwrap_or_else(Some));
        unread.map_or(LivePart::of(state), |unread| {
            LivePart::because(state, unread)
        })
    };
    let beside = StreamReport {
        part: part("new"),
        reachable: true,
        captured: captured.as_ref().ok().cloned(),
        ordered: ordered
            .as_ref()
            .map_or_else(|_| BTreeMap::new(), |ordered| ordered.lists.clone()),
        ..StreamReport::default()
    };
    let Some(found) = found else {
        return Ok(beside);
    };
    let tail = stream::tail(&jetstream, name)
        .await
        .map_err(|error| stream_condition(&error))?;
    Ok(StreamReport {
        part: part("available"),
        messages: Some(found.messages),
        bytes: Some(found.bytes),
        max_bytes: Some(found.max_bytes),
        first_seq: Some(found.first_seq),
        last_seq: Some(found.last_seq),
        position: tail.as_ref().map(|tail| tail.position.to_string()),
        end_lsn: tail
            .and_then(|tail| tail.end_lsn)
            .map(|lsn| lsn.to_string()),
        ..beside
    })
}

async fn captured(config: &Config, jetstream: &Context) -> Result<Vec<Captured>, Condition> {
    let captured = millrace_cdc::captured(jetstream, &config.source.name).await;
    captured.map_err(|error| match error {
        millrace_cdc::Error::Halt(condition) => condition,
        other => unread(&other),
    })
}

fn unread(error: &dyn StdError) -> Condition {
    Condition::new(Code::StreamUnreachable, chain(error), LATE_REMEDY)
}

/// The backfills that are ordered.
#[derive(Default)]
struct Ordered {
    /// Of each sink.
    lists: BTreeMap<String, Vec<BackfillOrder>>,
    /// Why a sink's is missing.
    unread: Option<Condition>,
}

async fn ordered(config: &Config, jetstream: &Context) -> Result<Ordered, Condition> {
    let bucket = subject::bucket_name(&config.source.name, work::COPIES);
    let none = |sink: &Sink| (sink.name.clone(), Vec::new());
    let found = stream::find_stream(jetstream, &format!("KV_{bucket}")).await;
    if found.map_err(|error| stream_condition(&error))?.is_none() {
        let lists = config.sinks.iter().map(none).collect();
        return Ok(Ordered {
            lists,
            unread: None,
        });
    }
    let copies = jetstream.get_key_value(bucket).await;
    let copies = copies.map_err(|error| unread(&error))?;
    let mut ordered = Ordered::default();
    for sink in &config.sinks {
        let key = work::orders_key(&sink.name);
        let list = copies.get(&key).await.map_err(|error| unread(&error))?;
        let list = list.map_or(Ok(Vec::new()), |list| {
            millrace_cdc::understood(&copies.name, &key, &list)
        });
        match list {
            Ok(list) => {
                ordered.lists.insert(sink.name.clone(), list);
            }
            Err(condition) => ordered.unread = Some(condition),
        }
    }
    Ok(ordered)
}

/// An error of the stream as a condition.
pub(in crate::command) fn stream_condition(error: &stream::StreamError) -> Condition {
    match error {
        stream::StreamError::Condition(condition) => condition.clone(),
        other => Condition::new(
            Code::StreamUnreachable,
            chain(other),
            "check that JetStream is on and permitted",
        ),
    }
}

/// What a sink's target shows.
#[derive(Debug)]
pub(in crate::command) struct SinkSeen {
    /// Its state as far as the target shows it.
    pub(in crate::command) part: LivePart,
    /// Its position row; none where it never ran.
    pub(in crate::command) row: Option<PositionRow>,
    /// Open dead letters by target table.
    pub(in crate::command) dead_letters: BTreeMap<String, u64>,
}

/// One sink's target.
pub(super) async fn sink(sink: &Sink) -> SinkSeen {
    target(sink).await.unwrap_or_else(|condition| SinkSeen {
        part: LivePart::because("unreachable", &condition),
        row: None,
        dead_letters: BTreeMap::new(),
    })
}

/// One sink's target, or why it does not show anything.
///
/// # Errors
/// It cannot be reached or read.
pub(in crate::command) async fn target(sink: &Sink) -> Result<SinkSeen, Condition> {
    in_time(Code::SinkUnreachable, read_sink(sink)).await
}

/// Whether a session of this database holds the lock that elects the sink's worker.
const ELECTED: &str = "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND granted \
    AND objsubid = 1 AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) \
    AND (classid::bigint << 32 | objid::bigint) = hashtextextended('millrace.sink.' || $1::text, 0))";

const DEAD_LETTERS: &str = "SELECT relation, count(*) FROM millrace.dead_letter \
    WHERE sink = $1 AND resolved_at IS NULL GROUP BY relation";

async fn read_sink(sink: &Sink) -> Result<SinkSeen, Condition> {
    let failed =
        |error: &dyn StdError| Condition::new(Code::SinkUnreachable, chain(error), LATE_REMEDY);
    let client = connection::postgres(&sink.url, Side::Target, NAME).await?;
    let row = millrace_sink::postgres::status(&connect(sink), &sink.name).await;
    let row = row.map_err(|error| error.condition().cloned().unwrap_or_else(|| failed(&error)))?;
    let mut seen = SinkSeen {
        part: LivePart::of("new"),
        row,
        dead_letters: BTreeMap::new(),
    };
    let Some(row) = &seen.row else {
        return Ok(seen);
    };
    let elected = client
        .query_one(ELECTED, &[&sink.name])
        .await
        .map_err(|error| failed(&error))?;
    let state = match (elected.get(0), row.copy.is_complete()) {
        (true, true) => "streaming",
        (true, false) => "snapshotting",
        (false, _) => "stopped",
    };
    seen.part = LivePart::of(state);
    for row in client
        .query(DEAD_LETTERS, &[&sink.name])
        .await
        .map_err(|error| failed(&error))?
    {
        seen.dead_letters
            .insert(row.get(0), u64::try_from(row.get::<_, i64>(1)).unwrap_or(0));
    }
    Ok(seen)
}

fn connect(sink: &Sink) -> Connect {
    let url = sink.url.clone();
    Arc::new(move || {
        let url = url.clone();
        Box::pin(async move {
            connection::postgres(&url, Side::Target, NAME)
                .await
                .map_err(|condition| {
                    let source = Box::new(condition.clone());
                    SinkError::Transient {
                        what: "connecting",
                        condition: Some(Box::new(condition)),
                        source,
                    }
                })
        })
    })
}

/// An answer, unless it takes too long.
///
/// # Errors
/// The answer's own, or that there was none in time.
pub(in crate::command) async fn in_time<T>(
    code: Code,
    answer: impl Future<Output = Result<T, Condition>>,
) -> Result<T, Condition> {
    let late = |_| Err(late(code, ANSWER_MAX));
    timeout(ANSWER_MAX, answer).await.unwrap_or_else(late)
}

fn late(code: Code, after: Duration) -> Condition {
    let message = format!("no answer within {} s", after.as_secs());
    Condition::new(code, message, LATE_REMEDY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_listens_everywhere_is_found_here() {
        for (listen, found) in [
            ("0.0.0.0:9400", "127.0.0.1:9400"),
            ("[::]:9400", "[::1]:9400"),
            ("10.0.0.7:1", "10.0.0.7:1"),
        ] {
            assert_eq!(
                local(listen.parse().expect("an address")).to_string(),
                found
            );
        }
    }
}
