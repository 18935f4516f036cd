//! The product's limits: everything that can grow has one, and those that depend on each other say so here.

use std::time::Duration;

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

/// Bytes of WAL that the reader hands on in one batch.
pub const WAL_BATCH_BYTES_MAX: usize = MIB;

/// Bytes between the reader of the replication connection and the publisher; beyond, the reader waits.
pub const CAPTURE_QUEUE_BYTES_MAX: usize = 4 * MIB;

/// Bytes published and not yet acknowledged.
pub const PUBLISH_WINDOW_BYTES_MAX: usize = 16 * MIB;

/// Messages published and not yet acknowledged.
pub const PUBLISH_WINDOW_MESSAGES_MAX: u64 = 2_000;

/// Bytes that a NATS server queues for one stream before it refuses more: a fact of the server, not a choice.
pub const SERVER_STREAM_QUEUE_BYTES: usize = 128 * MIB;

/// Bytes of one row, as text.
pub const ROW_BYTES_MAX: usize = 64 * MIB;

/// The largest `stream.events_per_message`.
pub const EVENTS_PER_MESSAGE_MAX: u32 = 10_000;

/// The largest `stream.replicas`: what JetStream allows.
pub const REPLICAS_MAX: u8 = 5;

/// The largest `stream.partitions`.
pub const PARTITIONS_MAX: u16 = 256;

/// Bounds of `stream.sync_interval`.
pub const SYNC_INTERVAL_MIN: Duration = Duration::from_millis(100);
/// The longest `stream.sync_interval`.
pub const SYNC_INTERVAL_MAX: Duration = Duration::from_secs(3600);

/// What `confirm = "synced"` waits beyond the broker's sync interval: clocks and timers are not exact.
pub const CONFIRM_MARGIN: Duration = Duration::from_secs(30);

/// The longest prefix that `truncate:N` keeps, in characters.
pub const MASK_TRUNCATE_MAX: u32 = 1_000_000;

/// The shortest `source.heartbeat_interval`.
pub const HEARTBEAT_INTERVAL_MIN: Duration = Duration::from_millis(100);
/// The longest `source.heartbeat_interval`: the slot of an idle source advances with it.
pub const HEARTBEAT_INTERVAL_MAX: Duration = Duration::from_secs(3600);

/// The shortest `stream.retention.max_age`.
pub const RETENTION_AGE_MIN: Duration = Duration::from_secs(60);
/// The longest `stream.retention.max_age`: ten years of 365.25 days.
pub const RETENTION_AGE_MAX: Duration = Duration::from_secs(10 * 31_557_600);

/// The smallest `stream.retention.max_bytes`.
pub const RETENTION_BYTES_MIN: u64 = MIB as u64;
/// The largest `stream.retention.max_bytes`: 1 PiB.
pub const RETENTION_BYTES_MAX: u64 = 1 << 50;

/// The largest `batch.max_rows` of a sink.
pub const BATCH_ROWS_MAX: u32 = 100_000;

/// The smallest `batch.max_bytes` of a sink.
pub const BATCH_BYTES_MIN: u64 = 64 * KIB as u64;
/// The largest `batch.max_bytes` of a sink.
pub const BATCH_BYTES_MAX: u64 = 256 * MIB as u64;

/// From the first signal to the end of the process.
pub const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(20);

/// What `run --once` waits in all unless `--timeout` says otherwise.
pub const ONCE_TIMEOUT_DEFAULT: Duration = Duration::from_secs(60);

/// The wait after the first failed attempt.
pub const BACKOFF_FIRST: Duration = Duration::from_millis(200);

/// The longest wait between two attempts.
pub const BACKOFF_MAX: Duration = Duration::from_secs(30);

/// To connect to one Postgres address, TLS and login included.
pub const POSTGRES_CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long sent bytes may stay unacknowledged before the connection counts as dead.
pub const TCP_USER_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a connection may be silent before the kernel asks whether the other side is still there.
pub const TCP_KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
/// Between two such questions.
pub const TCP_KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// So many unanswered questions end the connection.
pub const TCP_KEEPALIVE_RETRIES: u32 = 3;

/// To connect to one NATS server, TLS and login included.
pub const NATS_CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How often a silent NATS connection is probed; two missing answers end it.
pub const NATS_PING_INTERVAL: Duration = Duration::from_secs(10);

const _: () = {
    assert!(WAL_BATCH_BYTES_MAX <= CAPTURE_QUEUE_BYTES_MAX);
    assert!(PUBLISH_WINDOW_BYTES_MAX * 4 <= SERVER_STREAM_QUEUE_BYTES);
    assert!(BATCH_BYTES_MAX >= ROW_BYTES_MAX as u64);
    assert!(BATCH_BYTES_MIN < BATCH_BYTES_MAX);
    assert!(RETENTION_BYTES_MIN < RETENTION_BYTES_MAX);
    assert!(BACKOFF_FIRST.as_millis() < BACKOFF_MAX.as_millis());
    assert!(SHUTDOWN_DEADLINE.as_secs() < ONCE_TIMEOUT_DEFAULT.as_secs());
    assert!(SYNC_INTERVAL_MIN.as_millis() < SYNC_INTERVAL_MAX.as_millis());
    assert!(HEARTBEAT_INTERVAL_MIN.as_millis() < HEARTBEAT_INTERVAL_MAX.as_millis());
    assert!(NATS_CONNECT_TIMEOUT.as_secs() < SHUTDOWN_DEADLINE.as_secs());
    // The kernel's own idea of a dead peer and ours agree.
    let probes = TCP_KEEPALIVE_INTERVAL.as_secs() * TCP_KEEPALIVE_RETRIES as u64;
    assert!(TCP_KEEPALIVE_IDLE.as_secs() + probes <= TCP_USER_TIMEOUT.as_secs());
};
