//! From a decoded row change to a line of a message's payload.

use crate::value::{write_json, write_string};
use crate::{ColumnShape, Datum, Kind, Lsn, NotUtf8, Op, TableName, Version, fingerprint};

/// A table as the stream's writer knows it: what is the same for all its events, prepared once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relation {
    name: TableName,
    columns: Vec<Column>,
    key: Vec<usize>,
    version: String,
    /// The members of `source` that are the same for every change of this table.
    source_json: Vec<u8>,
}

/// One column of a [`Relation`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Column {
    name: String,
    type_oid: u32,
    typmod: i32,
    kind: Kind,
    /// The name as a JSON member: `"id":`.
    member_json: Vec<u8>,
}

impl Column {
    /// The column's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The column as the relation message told it.
    #[must_use]
    pub fn shape(&self) -> ColumnShape<'_> {
        ColumnShape {
            name: &self.name,
            type_oid: self.type_oid,
            typmod: self.typmod,
        }
    }
}

impl Relation {
    /// Prepares a table of the source `source` in the database `db`. `key` are indexes into `columns`.
    ///
    /// # Panics
    /// If a key index is out of bounds or the key is empty.
    #[must_use]
    pub fn new(
        source: &str,
        db: &str,
        name: TableName,
        columns: &[ColumnShape<'_>],
        key: Vec<usize>,
    ) -> Self {
        assert!(!key.is_empty(), "a published table has a key");
        assert!(
            key.iter().all(|index| *index < columns.len()),
            "key columns are columns"
        );
        let version = fingerprint(
            columns.iter().copied(),
            key.iter().map(|index| columns[*index].name),
        );
        let mut source_json = b"\"name\":".to_vec();
        write_string(&mut source_json, source);
        for (member, value) in [
            ("db", db),
            ("schema", &name.schema),
            ("table", &name.table),
            ("table_version", &version),
            ("snapshot", ""),
        ] {
            source_json.extend_from_slice(b",\"");
            source_json.extend_from_slice(member.as_bytes());
            source_json.extend_from_slice(b"\":");
            if member != "snapshot" {
                write_string(&mut source_json, value);
            }
        }
        let columns = columns
            .iter()
            .map(|column| {
                let mut member_json = Vec::with_capacity(column.name.len() + 3);
                write_string(&mut member_json, column.name);
                member_json.push(b':');
                Column {
                    name: column.name.to_owned(),
                    type_oid: column.type_oid,
                    typmod: column.typmod,
                    kind: Kind::of_type(column.type_oid),
                    member_json,
                }
            })
            .collect();
        Self {
            name,
            columns,
            key,
            version,
            source_json,
        }
    }

    /// The table's name.
    #[must_use]
    pub fn name(&self) -> &TableName {
        &self.name
    }

    /// The columns in the relation's order.
    #[must_use]
    pub fn columns(&self) -> &[Column] {
        &self.columns
    }

    /// The indexes of the key columns.
    #[must_use]
    pub fn key(&self) -> &[usize] {
        &self.key
    }

    /// The fingerprint of the shape, the events' `table_version`.
    #[must_use]
    pub fn version(&self) -> &str {
        &self.version
    }
}

/// The transaction that changes belong to: what is the same for all its events, prepared once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transaction {
    epoch: u32,
    commit_lsn: Lsn,
    /// The members of `source` that are the same for every change, up to the version's last 8 digits.
    source_json: Vec<u8>,
}

impl Transaction {
    /// Prepares a transaction. `committed_at_us` is the source's clock, microseconds since 1970.
    #[must_use]
    pub fn new(epoch: u32, commit_lsn: Lsn, tx_id: u32, committed_at_us: i64) -> Self {
        let version = Version::new(epoch, commit_lsn, 0).to_string();
        let (version_prefix, _) = version.split_at(24);
        let source_json = format!(
            "\"txId\":{tx_id},\"ts_ms\":{},\"ts_us\":{committed_at_us},\"epoch\":{epoch},\
             \"commit_lsn\":{},\"version\":\"{version_prefix}",
            committed_at_us.div_euclid(1000),
            commit_lsn.0,
        );
        Self {
            epoch,
            commit_lsn,
            source_json: source_json.into_bytes(),
        }
    }

    /// The version of the transaction's change number `seq`.
    #[must_use]
    pub fn version(&self, seq: u32) -> Version {
        Version::new(self.epoch, self.commit_lsn, seq)
    }
}

/// The old row as far as Postgres logged it.
#[derive(Clone, Copy, Debug)]
pub enum Before<'a> {
    /// Nothing was logged.
    None,
    /// The key columns of this row; the others are absent.
    Key(&'a [Datum<'a>]),
    /// The whole row.
    Row(&'a [Datum<'a>]),
}

/// One row change, ready to be written.
#[derive(Clone, Copy, Debug)]
pub struct Change<'a> {
    /// What happened.
    pub op: Op,
    /// The old row.
    pub before: Before<'a>,
    /// The new row, one datum a column.
    pub after: Option<&'a [Datum<'a>]>,
    /// The row whose key is the event's key; `None` for a truncate.
    pub key: Option<&'a [Datum<'a>]>,
    /// The change's number in its transaction.
    pub seq: u32,
    /// Where the change stands in the WAL.
    pub lsn: Lsn,
    /// The source's clock when it sent the change, microseconds since 1970.
    pub sent_at_us: i64,
}

/// How a line ends: known only when the next change of the transaction, or its commit, has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LineEnd {
    /// More of the transaction follows.
    More,
    /// The transaction's last event; its commit record ends at this LSN.
    Last(Lsn),
}

/// A change that cannot be written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("column {column:?} of table {table}: value cannot be written")]
pub struct EncodeError {
    /// The table.
    pub table: TableName,
    /// The column.
    pub column: String,
    /// Why.
    #[source]
    pub cause: NotUtf8,
}

/// Appends a change as a JSON line without its end; [`write_line_end`] must follow.
///
/// # Errors
/// A value is not UTF-8; `out` then ends in a part of the line.
///
/// # Panics
/// If a row does not have one datum a column.
pub fn write_change(
    out: &mut Vec<u8>,
    relation: &Relation,
    transaction: &Transaction,
    change: &Change<'_>,
) -> Result<(), EncodeError> {
    out.extend_from_slice(b"{\"op\":\"");
    out.extend_from_slice(change.op.letter().as_bytes());
    out.extend_from_slice(b"\",\"before\":");
    match change.before {
        Before::None => out.extend_from_slice(b"null"),
        Before::Key(row) => write_key(out, relation, row)?,
        Before::Row(row) => write_row(out, relation, row)?,
    }
    out.extend_from_slice(b",\"after\":");
    match change.after {
        None => out.extend_from_slice(b"null"),
        Some(row) => write_row(out, relation, row)?,
    }
    out.extend_from_slice(b",\"key\":");
    match change.key {
        None => out.extend_from_slice(b"null"),
        Some(row) => write_key(out, relation, row)?,
    }
    if let Some(row) = change.after {
        write_unchanged(out, relation, row);
    }
    let mut number = itoa::Buffer::new();
    out.extend_from_slice(b",\"ts_ms\":");
    out.extend_from_slice(number.format(change.sent_at_us.div_euclid(1000)).as_bytes());
    out.extend_from_slice(b",\"source\":{");
    out.extend_from_slice(&relation.source_json);
    let snapshot: &[u8] = if change.op == Op::Read {
        b"\"true\","
    } else {
        b"\"false\","
    };
    out.extend_from_slice(snapshot);
    out.extend_from_slice(&transaction.source_json);
    write_hex_32(out, change.seq);
    out.extend_from_slice(b"\",\"seq\":");
    out.extend_from_slice(number.format(change.seq).as_bytes());
    out.extend_from_slice(b",\"lsn\":");
    out.extend_from_slice(number.format(change.lsn.0).as_bytes());
    Ok(())
}

/// Ends the line that [`write_change`] began. The newline between two lines is the caller's.
pub fn write_line_end(out: &mut Vec<u8>, end: LineEnd) {
    if let LineEnd::Last(end_lsn) = end {
        out.extend_from_slice(b",\"last\":true,\"end_lsn\":");
        out.extend_from_slice(itoa::Buffer::new().format(end_lsn.0).as_bytes());
    }
    out.extend_from_slice(b"}}");
}

fn write_row(out: &mut Vec<u8>, relation: &Relation, row: &[Datum<'_>]) -> Result<(), EncodeError> {
    assert_eq!(
        row.len(),
        relation.columns.len(),
        "a row has one datum a column"
    );
    out.push(b'{');
    let mut separator: &[u8] = b"";
    for (column, datum) in relation.columns.iter().zip(row) {
        if *datum != Datum::Unchanged {
            out.extend_from_slice(separator);
            separator = b",";
            write_member(out, relation, column, *datum)?;
        }
    }
    out.push(b'}');
    Ok(())
}

fn write_key(out: &mut Vec<u8>, relation: &Relation, row: &[Datum<'_>]) -> Result<(), EncodeError> {
    assert_eq!(
        row.len(),
        relation.columns.len(),
        "a row has one datum a column"
    );
    out.push(b'{');
    let mut separator: &[u8] = b"";
    for index in &relation.key {
        out.extend_from_slice(separator);
        separator = b",";
        write_member(out, relation, &relation.columns[*index], row[*index])?;
    }
    out.push(b'}');
    Ok(())
}

fn write_member(
    out: &mut Vec<u8>,
    relation: &Relation,
    column: &Column,
    datum: Datum<'_>,
) -> Result<(), EncodeError> {
    out.extend_from_slice(&column.member_json);
    write_json(out, column.kind, datum).map_err(|cause| EncodeError {
        table: relation.name.clone(),
        column: column.name.clone(),
        cause,
    })
}

fn write_unchanged(out: &mut Vec<u8>, relation: &Relation, row: &[Datum<'_>]) {
    if !row.contains(&Datum::Unchanged) {
        return;
    }
    out.extend_from_slice(b",\"unchanged\":[");
    let mut separator: &[u8] = b"";
    for (column, datum) in relation.columns.iter().zip(row) {
        if *datum == Datum::Unchanged {
            out.extend_from_slice(separator);
            separator = b",";
            write_string(out, &column.name);
        }
    }
    out.push(b']');
}

fn write_hex_32(out: &mut Vec<u8>, number: u32) {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    for shift in (0..8).rev() {
        out.push(HEX[(number >> (shift * 4)) as usize & 0xF]);
    }
}

#[cfg(test)]
mod tests;
