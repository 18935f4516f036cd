//! Reads `millrace.toml`.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use super::tables::{self, Keys};
use crate::limits;
use crate::reader::{self, Section};
use crate::settings::{
    Admin, Auth, Batch, Confirm, Create, Guard, Log, LogFormat, LogLevel, Mode, Origin, Retention,
    ServerUrl, Sink, SinkType, Source, Stream, SyncInterval,
};

const MIB: u64 = 1024 * 1024;
const DAY: Duration = Duration::from_secs(86_400);

/// The longest name of a source or a sink.
const NAME_CHARS_MAX: usize = 31;

/// The main file without what the tables need.
pub(super) struct Sections {
    pub(super) source: Source,
    pub(super) stream: Stream,
    pub(super) sinks: Vec<Sink>,
    pub(super) admin: Admin,
    pub(super) log: Log,
}

/// Reads the main file: its settings (none where one without a default is absent or wrong), the names of its
/// sinks, and the defaults of the tables.
pub(super) fn read(root: &Section<'_>) -> (Option<Sections>, Vec<String>, Keys) {
    let source = source(root.section("source"));
    let stream = stream(root.section("stream"));
    let (names, sinks) = sinks(&root.section("sinks"));
    let defaults = root.section("defaults");
    let keys = tables::keys(&defaults);
    defaults.finish();
    let admin = admin(root.section("admin"));
    let log = log(root.section("log"));
    let sections = match (source, stream, sinks) {
        (Some(source), Some(stream), Some(sinks)) => Some(Sections {
            source,
            stream,
            sinks,
            admin,
            log,
        }),
        _ => None,
    };
    (sections, names, keys)
}

const CREATE: &[(&str, Create)] = &[("auto", Create::Auto), ("never", Create::Never)];

fn source(section: Section<'_>) -> Option<Source> {
    let name = section.parsed("name", name);
    section.missing("name", "\"shop\"");
    let url = section.secret("url");
    section.missing("url", "{ env = \"SOURCE_URL\" }");
    let create = section.choice("create", CREATE).unwrap_or(Create::Auto);
    let heartbeat_interval = section
        .duration(
            "heartbeat_interval",
            limits::HEARTBEAT_INTERVAL_MIN..=limits::HEARTBEAT_INTERVAL_MAX,
        )
        .unwrap_or(Duration::from_secs(5));
    let origins = [("any", Origin::Any), ("none", Origin::None)];
    let origin = section.choice("origin", &origins).unwrap_or(Origin::Any);
    let mask_salt = section.secret("mask_salt");
    section.finish();
    Some(Source {
        name: name?,
        url: url?,
        create,
        heartbeat_interval,
        origin,
        mask_salt,
    })
}

/// A name that fits into subjects, slot names and SQL names as it is.
fn name(text: &str) -> Result<String, String> {
    let valid = text.len() <= NAME_CHARS_MAX
        && text.starts_with(|first: char| first.is_ascii_lowercase())
        && text
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
    valid.then(|| text.to_owned()).ok_or_else(|| {
        format!("must be 1 to {NAME_CHARS_MAX} characters a-z, 0-9 and _, a letter first: {text:?}")
    })
}

fn stream(section: Section<'_>) -> Option<Stream> {
    let servers = servers(&section);
    section.missing("servers", "[\"nats://127.0.0.1:4222\"]");
    let replicas = section.integer("replicas", 1..=u64::from(limits::REPLICAS_MAX));
    let confirms = [
        ("acked", Confirm::Acked),
        ("synced", Confirm::Synced),
        ("applied", Confirm::Applied),
    ];
    let confirm = section
        .choice("confirm", &confirms)
        .unwrap_or(Confirm::Synced);
    let sync_interval = section
        .parsed("sync_interval", sync_interval)
        .unwrap_or(SyncInterval::Every(Duration::from_secs(120)));
    let partitions = section.integer("partitions", 1..=u64::from(limits::PARTITIONS_MAX));
    let events_per_message = section.integer(
        "events_per_message",
        1..=u64::from(limits::EVENTS_PER_MESSAGE_MAX),
    );
    let retention = retention(section.section("retention"));
    let auth = auth(&section);
    let tls_ca = section.path("tls_ca");
    let (tls_cert, tls_key) = (section.path("tls_cert"), section.path("tls_key"));
    for (one, other) in [("tls_cert", "tls_key"), ("tls_key", "tls_cert")] {
        if section.has(one) {
            section.missing(other, "\"client.pem\"");
        }
    }
    section.finish();
    Some(Stream {
        servers: servers?,
        replicas: replicas.and_then(|n| u8::try_from(n).ok()).unwrap_or(1),
        confirm,
        sync_interval,
        partitions: partitions.and_then(|n| u16::try_from(n).ok()).unwrap_or(1),
        events_per_message: events_per_message
            .and_then(|n| u32::try_from(n).ok())
            .unwrap_or(1),
        retention,
        auth,
        tls_ca,
        tls_cert,
        tls_key,
    })
}

fn servers(section: &Section<'_>) -> Option<Vec<ServerUrl>> {
    let items = section.list("servers")?;
    for (text, place) in &items {
        let (scheme, rest) = text.split_once("://").unwrap_or(("nats", text));
        if !matches!(scheme, "nats" | "tls") || rest.is_empty() {
            // The text may hold a password: it is not repeated.
            let message = "\"servers\" has an entry that is not like \"nats://host:4222\" or \
                           \"tls://host:4222\"";
            section.context.error(place.clone(), message);
        }
    }
    Some(items.into_iter().map(|(text, _)| ServerUrl(text)).collect())
}

fn sync_interval(text: &str) -> Result<SyncInterval, String> {
    if text == "always" {
        return Ok(SyncInterval::Always);
    }
    let bounds = limits::SYNC_INTERVAL_MIN..=limits::SYNC_INTERVAL_MAX;
    reader::duration(text, &bounds)
        .map(SyncInterval::Every)
        .map_err(|reason| format!("{reason} (or \"always\")"))
}

fn retention(section: Section<'_>) -> Retention {
    let age = section.duration(
        "max_age",
        limits::RETENTION_AGE_MIN..=limits::RETENTION_AGE_MAX,
    );
    let bytes = section.size(
        "max_bytes",
        limits::RETENTION_BYTES_MIN..=limits::RETENTION_BYTES_MAX,
    );
    section.finish();
    Retention {
        max_age: age.unwrap_or(7 * DAY),
        max_bytes: bytes.unwrap_or(10 * 1024 * MIB),
    }
}

fn auth(section: &Section<'_>) -> Auth {
    let creds = section.secret("creds").map(Auth::Creds);
    let nkey = section.secret("nkey").map(Auth::Nkey);
    let token = section.secret("token").map(Auth::Token);
    let mut ways = [creds, nkey, token].into_iter().flatten();
    let first = ways.next().unwrap_or(Auth::None);
    if ways.next().is_some() {
        let message = "set only one of \"creds\", \"nkey\" and \"token\"";
        section.context.error(section.place.clone(), message);
    }
    first
}

/// The names of all sinks, and the sinks; none of the latter where one lacks a setting.
fn sinks(root: &Section<'_>) -> (Vec<String>, Option<Vec<Sink>>) {
    let mut names = Vec::new();
    let mut sinks = Some(Vec::new());
    for (key, place, section) in root.named_sections() {
        if let Err(reason) = name(&key) {
            root.context.error(place, format!("a sink's name {reason}"));
        }
        names.push(key.clone());
        match (sink(key, section), &mut sinks) {
            (Some(sink), Some(sinks)) => sinks.push(sink),
            _ => sinks = None,
        }
    }
    (names, sinks)
}

fn sink(name: String, section: Section<'_>) -> Option<Sink> {
    let kind = section.choice("type", &[("postgres", SinkType::Postgres)]);
    section.missing("type", "\"postgres\"");
    let url = section.secret("url");
    section.missing("url", "{ file = \"warehouse_url\" }");
    let create = section.choice("create", CREATE).unwrap_or(Create::Auto);
    let guards = [("column", Guard::Column), ("sidecar", Guard::Sidecar)];
    let guard = section.choice("guard", &guards).unwrap_or(Guard::Column);
    let modes = [
        ("consistent", Mode::Consistent),
        ("parallel", Mode::Parallel),
    ];
    let mode = section.choice("mode", &modes).unwrap_or(Mode::Consistent);
    let required = section.boolean("required").unwrap_or(true);
    let batch = batch(section.section("batch"));
    section.finish();
    Some(Sink {
        name,
        r#type: kind?,
        url: url?,
        create,
        guard,
        mode,
        required,
        batch,
    })
}

fn batch(section: Section<'_>) -> Batch {
    let rows = section.integer("max_rows", 1..=u64::from(limits::BATCH_ROWS_MAX));
    let bytes = section.size(
        "max_bytes",
        limits::BATCH_BYTES_MIN..=limits::BATCH_BYTES_MAX,
    );
    section.finish();
    Batch {
        max_rows: rows
            .and_then(|rows| u32::try_from(rows).ok())
            .unwrap_or(5000),
        max_bytes: bytes.unwrap_or(8 * MIB),
    }
}

fn admin(section: Section<'_>) -> Admin {
    let listen = section.parsed("listen", |text| {
        text.parse::<SocketAddr>().map_err(|_| {
            format!("is not an IP address and port, such as \"127.0.0.1:9400\": {text:?}")
        })
    });
    section.finish();
    Admin {
        listen: listen.unwrap_or(SocketAddr::from((Ipv4Addr::LOCALHOST, 9400))),
    }
}

fn log(section: Section<'_>) -> Log {
    let levels = [
        LogLevel::Error,
        LogLevel::Warn,
        LogLevel::Info,
        LogLevel::Debug,
        LogLevel::Trace,
    ]
    .map(|level| (level.as_str(), level));
    let formats = [
        ("auto", LogFormat::Auto),
        ("pretty", LogFormat::Pretty),
        ("json", LogFormat::Json),
    ];
    let level = section.choice("level", &levels).unwrap_or(LogLevel::Info);
    let format = section
        .choice("format", &formats)
        .unwrap_or(LogFormat::Auto);
    section.finish();
    Log { level, format }
}
