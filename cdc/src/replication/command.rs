//! The replication commands' texts and the meaning of their answers. Pure.

use std::time::Duration;

use millrace_event::{Lsn, quote_identifier};

/// The answer to IDENTIFY_SYSTEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SystemIdentity {
    /// The cluster's identifier, as a decimal text.
    pub system_id: String,
    /// The current timeline.
    pub timeline: u32,
    /// How far the server's WAL is flushed.
    pub flushed: Lsn,
    /// The database that the connection is bound to.
    pub database: Option<String>,
}

/// How long a slot lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotKind {
    /// Until it is dropped.
    Permanent,
    /// Until its connection ends.
    Temporary,
}

/// What becomes of the snapshot that a new slot starts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Snapshot {
    /// Other sessions may import it until this connection runs its next command.
    Export,
    /// Nobody needs it.
    None,
}

/// The answer to CREATE_REPLICATION_SLOT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreatedSlot {
    /// Every transaction whose commit record is at or above it is streamed; the exported snapshot sees all
    /// others.
    pub consistent_point: Lsn,
    /// For `SET TRANSACTION SNAPSHOT`, if the snapshot was exported.
    pub snapshot_name: Option<String>,
}

/// What to stream.
#[derive(Clone, Copy, Debug)]
pub struct StartOptions<'a> {
    /// The slot.
    pub slot: &'a str,
    /// Where to start. Postgres moves a start below the slot's confirmed LSN up to it without a word;
    /// zero means exactly there. Starting at an LSN does not confirm it.
    pub start: Lsn,
    /// The publications' names, unquoted.
    pub publications: &'a [&'a str],
    /// Also deliver `pg_logical_emit_message`.
    pub messages: bool,
    /// Leave out what other replication wrote. Postgres 16 and later.
    pub origin_none: bool,
}

/// A row of text values.
pub(super) type Row = Vec<Option<String>>;

pub(super) fn create_slot(name: &str, kind: SlotKind, snapshot: Snapshot) -> String {
    // This older form of the syntax is understood by every version that has pgoutput.
    let name = quote_identifier(name);
    let temporary = match kind {
        SlotKind::Permanent => "",
        SlotKind::Temporary => " TEMPORARY",
    };
    let snapshot = match snapshot {
        Snapshot::Export => "EXPORT_SNAPSHOT",
        Snapshot::None => "NOEXPORT_SNAPSHOT",
    };
    format!("CREATE_REPLICATION_SLOT {name}{temporary} LOGICAL pgoutput {snapshot}")
}

pub(super) fn drop_slot(name: &str, wait: bool) -> String {
    format!(
        "DROP_REPLICATION_SLOT {}{}",
        quote_identifier(name),
        if wait { " WAIT" } else { "" }
    )
}

pub(super) fn start(options: &StartOptions<'_>) -> String {
    let names: Vec<_> = options
        .publications
        .iter()
        .map(|name| quote_identifier(name))
        .collect();
    // The replication grammar's literals know doubled quotes only, no backslashes.
    let names = names.join(",").replace('\'', "''");
    let mut text = format!(
        "START_REPLICATION SLOT {} LOGICAL {} (proto_version '1', publication_names '{names}'",
        quote_identifier(options.slot),
        options.start,
    );
    if options.messages {
        text.push_str(", messages 'true'");
    }
    if options.origin_none {
        text.push_str(", origin 'none'");
    }
    text.push(')');
    text
}

pub(super) fn system_identity(rows: Vec<Row>) -> Option<SystemIdentity> {
    let mut columns = rows.into_iter().next()?.into_iter();
    Some(SystemIdentity {
        system_id: columns.next()??,
        timeline: columns.next()??.parse().ok()?,
        flushed: columns.next()??.parse().ok()?,
        database: columns.next()?,
    })
}

pub(super) fn created_slot(rows: Vec<Row>) -> Option<CreatedSlot> {
    let mut columns = rows.into_iter().next()?.into_iter().skip(1);
    Some(CreatedSlot {
        consistent_point: columns.next()??.parse().ok()?,
        snapshot_name: columns.next()?,
    })
}

/// The (timeline, switch point) pairs of a timeline history file, oldest first.
pub(super) fn timeline_history(rows: Vec<Row>) -> Option<Vec<(u32, Lsn)>> {
    let content = rows.into_iter().next()?.into_iter().nth(1)??;
    content
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(|line| {
            let mut fields = line.split_whitespace();
            Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
        })
        .collect()
}

/// Asks for [`sender_timeout`].
pub(super) const SENDER_TIMEOUT: &str =
    "SELECT setting FROM pg_catalog.pg_settings WHERE name = 'wal_sender_timeout'";

/// The server's `wal_sender_timeout`; `None` if it never times out.
pub(super) fn sender_timeout(rows: Vec<Row>) -> Option<Duration> {
    let ms: u64 = rows.into_iter().next()?.into_iter().next()??.parse().ok()?;
    (ms > 0).then(|| Duration::from_millis(ms))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(values: &[Option<&str>]) -> Vec<Row> {
        vec![
            values
                .iter()
                .map(|value| value.map(str::to_owned))
                .collect(),
        ]
    }

    #[test]
    fn names_are_quoted_for_the_grammar_that_reads_them() {
        let options = StartOptions {
            slot: "cdc",
            start: Lsn(0x16_B374_D848),
            publications: &["a", "it's \"b\""],
            messages: true,
            origin_none: true,
        };
        assert_eq!(
            start(&options),
            "START_REPLICATION SLOT \"cdc\" LOGICAL 16/B374D848 (proto_version '1', \
             publication_names '\"a\",\"it''s \"\"b\"\"\"', messages 'true', origin 'none')"
        );
        assert_eq!(
            create_slot("s", SlotKind::Temporary, Snapshot::Export),
            "CREATE_REPLICATION_SLOT \"s\" TEMPORARY LOGICAL pgoutput EXPORT_SNAPSHOT"
        );
        assert_eq!(drop_slot("s", true), "DROP_REPLICATION_SLOT \"s\" WAIT");
    }

    #[test]
    fn answers_are_read() {
        let history = "1\t0/3000000\tno recovery target specified\n\n# note\n2\t0/5000000\tx y\n";
        assert_eq!(
            timeline_history(row(&[Some("00000003.history"), Some(history)])),
            Some(vec![(1, Lsn(0x300_0000)), (2, Lsn(0x500_0000))])
        );
        assert_eq!(timeline_history(row(&[Some("f"), Some("x y")])), None);
        assert_eq!(
            sender_timeout(row(&[Some("60000")])),
            Some(Duration::from_secs(60))
        );
        assert_eq!(sender_timeout(row(&[Some("0")])), None);
        let slot = created_slot(row(&[Some("s"), Some("0/10"), None, Some("pgoutput")]));
        let expected = CreatedSlot {
            consistent_point: Lsn(16),
            snapshot_name: None,
        };
        assert_eq!(slot, Some(expected));
        let identity = system_identity(row(&[Some("7"), Some("1"), Some("0/10"), Some("db")]));
        assert_eq!(identity.map(|identity| identity.flushed), Some(Lsn(16)));
        assert_eq!(system_identity(Vec::new()), None);
    }
}
