//! The settings as the program uses them: parsed, completed with defaults and validated.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use millrace_event::TableName;

use crate::{Place, Secret, limits};

/// Everything that the configuration directory says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The directory the settings were read from.
    pub dir: PathBuf,
    /// The database that is captured.
    pub source: Source,
    /// The JetStream stream between capture and sinks.
    pub stream: Stream,
    /// The databases that receive the changes, by name in ascending order. Empty when only others read the
    /// stream.
    pub sinks: Vec<Sink>,
    /// The captured tables, by name in ascending order. Never empty.
    pub tables: Vec<Table>,
    /// The HTTP endpoint of the process.
    pub admin: Admin,
    /// The log.
    pub log: Log,
}

impl Config {
    /// The sink of that name.
    #[must_use]
    pub fn sink(&self, name: &str) -> Option<&Sink> {
        self.sinks.iter().find(|sink| sink.name == name)
    }

    /// The tables that a sink receives.
    pub fn tables_of<'a>(&'a self, sink: &'a str) -> impl Iterator<Item = &'a Table> + 'a {
        self.tables
            .iter()
            .filter(move |table| table.sinks.iter().any(|name| name == sink))
    }
}

/// `[source]`: the captured database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// The name in every subject, stream, slot and publication: `[a-z][a-z0-9_]{0,30}`.
    pub name: String,
    /// A Postgres connection URL.
    pub url: Secret,
    /// Whether the slot and the publication may be created and changed.
    pub create: Create,
    /// How often a heartbeat is written to the WAL.
    pub heartbeat_interval: Duration,
    /// Which changes are decoded, by where they were first made.
    pub origin: Origin,
    /// The key of `hash` masks. Set where a table has one.
    pub mask_salt: Option<Secret>,
}

/// Whether missing objects may be created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Create {
    /// `auto`: what is missing is created.
    Auto,
    /// `never`: what is missing is an error that says how to create it.
    Never,
}

/// Which changes of the source are decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// `any`: every change.
    Any,
    /// `none`: only changes made on the source itself, not those it received by replication (Postgres 16 and
    /// later).
    None,
}

/// `[stream]`: the JetStream stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stream {
    /// The NATS servers to try. Never empty.
    pub servers: Vec<ServerUrl>,
    /// Copies of the stream in the NATS cluster, 1 to 5.
    pub replicas: u8,
    /// When the slot may forget a change.
    pub confirm: Confirm,
    /// How often the broker flushes its files, as it is configured there.
    pub sync_interval: SyncInterval,
    /// Into how many partitions the keys are spread.
    pub partitions: u16,
    /// At most so many consecutive changes of one subject share a message; 1 is one change a message.
    pub events_per_message: u32,
    /// How much the stream keeps.
    pub retention: Retention,
    /// How to log in, beyond a user and password in a server's URL.
    pub auth: Auth,
    /// PEM file with the authorities to trust instead of the system's.
    pub tls_ca: Option<PathBuf>,
    /// PEM file with the client's certificate; set together with `tls_key`.
    pub tls_cert: Option<PathBuf>,
    /// PEM file with the client's private key; set together with `tls_cert`.
    pub tls_key: Option<PathBuf>,
}

impl Stream {
    /// How long after its acknowledgement a message is surely on the broker's disk, as far as the slot keeps it
    /// until then: none where an acknowledgement is all that is waited for.
    #[must_use]
    pub fn kept_until_synced(&self) -> Option<Duration> {
        match (self.confirm, self.sync_interval) {
            (Confirm::Synced, SyncInterval::Every(interval)) => {
                Some(interval + limits::CONFIRM_MARGIN)
            }
            _ => None,
        }
    }
}

/// The address of a NATS server, which may hold a user and a password: printed without them.
#[derive(Clone, PartialEq, Eq)]
pub struct ServerUrl(pub(crate) String);

impl ServerUrl {
    /// The URL with its user and password.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ServerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (scheme, rest) = self.0.split_once("://").unwrap_or(("nats", &self.0));
        let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        // A password may hold an unescaped '/': cut at the last '@' of the whole text, never at the first.
        let host = match rest.rfind('@') {
            Some(at) => rest[at + 1..]
                .split(['/', '?', '#'])
                .next()
                .unwrap_or_default(),
            None => &rest[..end],
        };
        write!(f, "{scheme}://{host}")
    }
}

impl fmt::Debug for ServerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// When a change may be confirmed to the slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Confirm {
    /// `acked`: JetStream acknowledged it, perhaps from memory.
    Acked,
    /// `synced`: the broker has flushed it to disk since.
    Synced,
    /// `applied`: every required sink has committed it.
    Applied,
}

/// How often the broker flushes a stream's files (its own `sync_interval`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyncInterval {
    /// `always`: before each acknowledgement.
    Always,
    /// At this interval.
    Every(Duration),
}

/// `retention`: how much the stream keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// Older messages may be removed, once every required sink has them.
    pub max_age: Duration,
    /// The stream's size limit in bytes; near it capture stops reading.
    pub max_bytes: u64,
}

/// How to log in to NATS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Auth {
    /// Nothing, or the user and password in a server's URL.
    None,
    /// `creds`: the content of a credentials file (a JWT and its seed).
    Creds(Secret),
    /// `nkey`: the seed of an nkey.
    Nkey(Secret),
    /// `token`: a token.
    Token(Secret),
}

/// `[sinks.<name>]`: a database that receives changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sink {
    /// The name: `[a-z][a-z0-9_]{0,30}`.
    pub name: String,
    /// The kind of database.
    pub r#type: SinkType,
    /// Its connection URL.
    pub url: Secret,
    /// Whether target tables and columns may be created.
    pub create: Create,
    /// Where a row's version is kept.
    pub guard: Guard,
    /// How batches are formed and applied.
    pub mode: Mode,
    /// Whether the stream keeps what this sink has not applied yet.
    pub required: bool,
    /// The limits of one batch.
    pub batch: Batch,
}

/// The kind of database of a sink.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SinkType {
    /// `postgres`.
    Postgres,
}

/// Where a row's version is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guard {
    /// `column`: in a column of the target table.
    Column,
    /// `sidecar`: in a table beside it.
    Sidecar,
}

/// How batches are applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// `consistent`: whole source transactions in commit order.
    Consistent,
    /// `parallel`: many workers, each with its share of the keys.
    Parallel,
}

/// `batch`: when a batch is closed although more changes wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Rows.
    pub max_rows: u32,
    /// Bytes of event payload.
    pub max_bytes: u64,
}

/// One captured table: its own file over `[defaults]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// The table in the source.
    pub name: TableName,
    /// The sinks that receive it, resolved: each exists.
    pub sinks: Vec<String>,
    /// The table in the targets.
    pub target: TableName,
    /// Columns that are left out, renamed or masked.
    pub columns: Columns,
    /// `where`: only rows for which it holds are captured; none: all.
    pub filter: Option<Filter>,
    /// The columns that identify a row; none: the primary key.
    pub key: Option<Vec<String>>,
    /// Whether a target table may already hold rows of its own.
    pub adopt: bool,
    /// What a delete does.
    pub on_delete: OnDelete,
    /// What a truncate does.
    pub on_truncate: OnTruncate,
    /// What a new or changed column does.
    pub on_schema_change: OnSchemaChange,
    /// What becomes of a row that the target refuses.
    pub on_row_error: OnRowError,
}

/// `columns`: which columns travel, in which form, and under which names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Columns {
    /// Source columns that are left out.
    pub exclude: Vec<String>,
    /// Source column and its name in the target.
    pub rename: Vec<(String, String)>,
    /// Source column and what travels in place of its values. None of them is left out.
    pub mask: Vec<(String, Mask)>,
    /// Those of the columns above that `[defaults]` names: a table need not have them.
    pub from_defaults: Vec<String>,
}

/// What travels in place of a column's values. NULL stays NULL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mask {
    /// `hash`: the HMAC-SHA-256 of the value's text under `source.mask_salt`, in hexadecimal digits.
    Hash,
    /// `redact`: the text `***`; NULL for a type that is no text.
    Redact,
    /// `truncate:N`: the text's first N characters.
    Truncate(u32),
}

impl fmt::Display for Mask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hash => f.write_str("hash"),
            Self::Redact => f.write_str("redact"),
            Self::Truncate(characters) => write!(f, "truncate:{characters}"),
        }
    }
}

/// `where`: a condition on a table's rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// The condition as SQL, over the source's columns.
    pub sql: String,
    /// Where it is written.
    pub place: Place,
}

/// `on_delete`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OnDelete {
    /// `delete`: the row is deleted.
    Delete,
    /// `soft:<column>`: the column is set to the time of the delete.
    Soft(String),
    /// `ignore`: the row stays.
    Ignore,
}

/// `on_truncate`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnTruncate {
    /// `apply`: the target's rows are removed.
    Apply,
    /// `ignore`: they stay.
    Ignore,
    /// `park`: the table is parked.
    Park,
}

/// `on_schema_change`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnSchemaChange {
    /// `evolve`: a new column is added to the target.
    Evolve,
    /// `park`: the table is parked.
    Park,
    /// `ignore`: a new column is left out.
    Ignore,
}

/// `on_row_error`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnRowError {
    /// `dead_letter`: the event is set aside with its reason.
    DeadLetter,
    /// `halt`: the sink halts.
    Halt,
}

/// `[admin]`: the HTTP endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Admin {
    /// Where it listens; port 0 takes a free one.
    pub listen: SocketAddr,
}

/// `[log]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Log {
    /// The least important level that is written.
    pub level: LogLevel,
    /// The form of a line.
    pub format: LogFormat,
}

/// `log.level`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LogLevel {
    /// `error`.
    Error,
    /// `warn`.
    Warn,
    /// `info`.
    Info,
    /// `debug`.
    Debug,
    /// `trace`.
    Trace,
}

impl LogLevel {
    /// The level as it is written.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

/// `log.format`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// `auto`: pretty on a terminal, else JSON.
    Auto,
    /// `pretty`: for people.
    Pretty,
    /// `json`: one object a line.
    Json,
}
