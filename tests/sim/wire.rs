//! The model source's changes as `pgoutput` bytes.

use millrace_event::Lsn;

use crate::source::TableSpec;

/// Microseconds from the Unix epoch to Postgres's.
const POSTGRES_EPOCH_US: i64 = 946_684_800_000_000;

/// One column of a tuple.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Cell {
    Null,
    Unchanged,
    Text(String),
}

/// Which old columns go with a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OldKind {
    Key,
    Full,
}

/// What one WAL record says.
#[derive(Clone, Debug)]
pub(crate) enum Record {
    Insert {
        table: usize,
        new: Vec<Cell>,
    },
    Update {
        table: usize,
        old: Option<(OldKind, Vec<Cell>)>,
        new: Vec<Cell>,
    },
    Delete {
        table: usize,
        old: (OldKind, Vec<Cell>),
    },
    Truncate {
        tables: Vec<usize>,
    },
    /// With the mark that somebody waits for, if there is one.
    Heartbeat(Option<u64>),
}

impl Record {
    pub(crate) fn tables(&self) -> Vec<usize> {
        match self {
            Self::Insert { table, .. }
            | Self::Update { table, .. }
            | Self::Delete { table, .. } => vec![*table],
            Self::Truncate { tables } => tables.clone(),
            Self::Heartbeat(_) => Vec::new(),
        }
    }
}

pub(crate) fn begin(commit_lsn: Lsn, ts_us: i64, xid: u32) -> Vec<u8> {
    let mut out = vec![b'B'];
    out.extend(commit_lsn.0.to_be_bytes());
    out.extend((ts_us - POSTGRES_EPOCH_US).to_be_bytes());
    out.extend(xid.to_be_bytes());
    out
}

pub(crate) fn commit(commit_lsn: Lsn, end_lsn: Lsn, ts_us: i64) -> Vec<u8> {
    let mut out = vec![b'C', 0];
    out.extend(commit_lsn.0.to_be_bytes());
    out.extend(end_lsn.0.to_be_bytes());
    out.extend((ts_us - POSTGRES_EPOCH_US).to_be_bytes());
    out
}

pub(crate) fn relation(spec: &TableSpec) -> Vec<u8> {
    let mut out = vec![b'R'];
    out.extend(spec.oid.to_be_bytes());
    text(&mut out, &spec.name.schema);
    text(&mut out, &spec.name.table);
    out.push(if spec.full { b'f' } else { b'd' });
    count(&mut out, spec.columns.len());
    for (index, (name, type_oid)) in spec.columns.iter().enumerate() {
        out.push(u8::from(spec.full || spec.key.contains(&index)));
        text(&mut out, name);
        out.extend(type_oid.to_be_bytes());
        out.extend((-1_i32).to_be_bytes());
    }
    out
}

pub(crate) fn record(record: &Record, specs: &[TableSpec], lsn: Lsn) -> Vec<u8> {
    let oid = |table: &usize| specs[*table].oid.to_be_bytes();
    let mut out = Vec::new();
    match record {
        Record::Insert { table, new } => {
            out.push(b'I');
            out.extend(oid(table));
            tuple(&mut out, b'N', new);
        }
        Record::Update { table, old, new } => {
            out.push(b'U');
            out.extend(oid(table));
            if let Some((kind, old)) = old {
                tuple(&mut out, letter(*kind), old);
            }
            tuple(&mut out, b'N', new);
        }
        Record::Delete { table, old } => {
            out.push(b'D');
            out.extend(oid(table));
            tuple(&mut out, letter(old.0), &old.1);
        }
        Record::Truncate { tables } => {
            out.push(b'T');
            out.extend(u32::try_from(tables.len()).unwrap_or(0).to_be_bytes());
            out.push(0);
            tables.iter().for_each(|table| out.extend(oid(table)));
        }
        Record::Heartbeat(mark) => {
            out.extend([b'M', 1]);
            out.extend(lsn.0.to_be_bytes());
            text(&mut out, millrace_cdc::capture::HEARTBEAT_PREFIX);
            let content = mark.map(|mark| format!("{mark:016x}")).unwrap_or_default();
            out.extend(u32::try_from(content.len()).unwrap_or(0).to_be_bytes());
            out.extend(content.as_bytes());
        }
    }
    out
}

fn letter(kind: OldKind) -> u8 {
    match kind {
        OldKind::Key => b'K',
        OldKind::Full => b'O',
    }
}

fn tuple(out: &mut Vec<u8>, kind: u8, cells: &[Cell]) {
    out.push(kind);
    count(out, cells.len());
    for cell in cells {
        match cell {
            Cell::Null => out.push(b'n'),
            Cell::Unchanged => out.push(b'u'),
            Cell::Text(value) => {
                out.push(b't');
                out.extend(u32::try_from(value.len()).unwrap_or(0).to_be_bytes());
                out.extend(value.as_bytes());
            }
        }
    }
}

fn count(out: &mut Vec<u8>, count: usize) {
    out.extend(u16::try_from(count).unwrap_or(0).to_be_bytes());
}

fn text(out: &mut Vec<u8>, value: &str) {
    out.extend(value.as_bytes());
    out.push(0);
}
