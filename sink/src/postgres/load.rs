//! Rows of a load by `COPY .. FROM STDIN`: for keys that the target does not have, in half the time of an insert.
//!
//! Where every column's type is one whose binary form is known here, the rows go over in that form, which spares
//! the target the reading of texts: the target is what a load waits for. Else they go over as texts. Values that the
//! source wrote in the form that the target's column takes are copied as they are. Either way a row gets its version as
//! one more column.
//!
//! COPY knows no guard. So it is used only where the rows are newer than all that is remembered of the table, and
//! the unique index proves that none of the keys is there: if one is, the batch is applied again with guards. A table that
//! has no key yet has rows of the same snapshot only (`keys.rs`).

use std::collections::HashMap;
use std::pin::pin;

use bytes::Bytes;
use futures_util::SinkExt as _;
use millrace_event::{
    BINARY_END, BINARY_HEAD, BINARY_NULL, BinaryType, LoadError, LoadFormat, Version, binary_field,
    escape_load_value, load_fields, load_value,
};
use tokio_postgres::{Client, CopyInSink, Error, Statement};

use super::session::Session;
use crate::batch::{Batch, Step};
use crate::load::{Load, LoadRowError};
use crate::row::TableLayout;
use crate::sink::SinkError;
use crate::sql::Wire;

const VERSION_LENGTH: [u8; 4] = 16_i32.to_be_bytes();

/// So much is sent at a time, bytes: the target works on it while the next is written.
const SEND_BYTES: usize = 128 * 1024;

/// How a load's rows are written for the target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// In the binary forms of the columns.
    Binary(Vec<Wire>),
    /// As texts.
    Text,
}

impl Format {
    /// The best format for a table.
    pub(super) fn of(layout: &TableLayout) -> Self {
        let wires = layout.columns.iter().map(|column| Wire::of(&column.cast));
        wires
            .collect::<Option<_>>()
            .map_or(Self::Text, Self::Binary)
    }

    /// Whether it is the binary one.
    pub(super) fn is_binary(&self) -> bool {
        matches!(self, Self::Binary(_))
    }
}

/// Why rows were not copied.
#[derive(Debug)]
pub(super) enum Refused {
    /// The target's answer.
    Target(Error),
    /// A value has no binary form. With the target's word on the transaction, which is over.
    Form(Error),
}

/// Whether a batch's loads may be copied: whole rows, newer than all that is remembered of their tables.
pub(super) fn may_copy(session: &mut Session, batch: &Batch) -> bool {
    let mut loads = Vec::new();
    for step in &batch.steps {
        match step {
            Step::Load(load) => loads.push(load),
            Step::Sweep { .. } => {}
            Step::Rows(_) | Step::Move(_) | Step::Truncate(_) => return false,
        }
    }
    loads.iter().all(|load| {
        let relation = load.layout.relation();
        let is_newer = |remembered: &HashMap<String, Version>| {
            let newest = remembered.get(&relation);
            newest.is_none_or(|newest| *newest < load.version)
        };
        load.order().is_some()
            && is_newer(&session.floors)
            && is_newer(&session.tombstones)
            && !session.letters.contains(&relation)
            && session.inserts.may(&relation, load.rows())
    })
}

/// Rows that are not what a load's are: only another copy can bring them.
pub(super) fn unreadable(error: LoadRowError) -> SinkError {
    SinkError::Transient {
        what: "laying a load's rows out",
        condition: None,
        source: error.into(),
    }
}

/// Writes a load's rows, and ends the COPY.
pub(super) async fn copy(
    client: &Client,
    statement: &Statement,
    load: &Load,
    format: &Format,
) -> Result<u64, Refused> {
    {
        let sink = client.copy_in::<_, Bytes>(statement).await;
        let mut sink = pin!(sink.map_err(Refused::Target)?);
        match write(sink.as_mut(), load, format).await {
            Ok(true) => return sink.finish().await.map_err(Refused::Target),
            Ok(false) => {}
            // The target has ended the COPY, and says why only at its end.
            Err(error) => {
                return sink
                    .finish()
                    .await
                    .map_err(Refused::Target)
                    .and(Err(Refused::Target(error)));
            }
        }
        // Dropped without its end, the COPY fails, and with it the transaction.
    }
    match client.batch_execute("SELECT").await {
        Err(error) => Err(Refused::Form(error)),
        Ok(()) => unreachable!("a transaction whose COPY failed takes no statement"),
    }
}

/// Whether each value had a form.
async fn write(
    mut sink: std::pin::Pin<&mut CopyInSink<Bytes>>,
    load: &Load,
    format: &Format,
) -> Result<bool, Error> {
    let Some(order) = load.order() else {
        return Ok(false);
    };
    let mut rows = Rows::new(load, order, format);
    let mut out = Vec::with_capacity(2 * SEND_BYTES);
    if format.is_binary() {
        out.extend_from_slice(BINARY_HEAD);
    }
    for row in load.written() {
        let written = row.ok().and_then(|row| rows.write(row, &mut out));
        if written.is_none() {
            return Ok(false);
        }
        if out.len() >= SEND_BYTES {
            let full = std::mem::replace(&mut out, Vec::with_capacity(2 * SEND_BYTES));
            sink.send(full.into()).await?;
        }
    }
    if format.is_binary() {
        out.extend_from_slice(&BINARY_END);
    }
    sink.send(out.into()).await?;
    Ok(true)
}

/// Writes rows one by one.
struct Rows<'l> {
    format: &'l Format,
    /// How the source wrote them.
    written: LoadFormat,
    /// The field of each column.
    order: Vec<usize>,
    /// Whether they are written as the source wrote them, but for the version.
    as_written: bool,
    /// What the bytes of each field are, where the source wrote it in binary format.
    types: Vec<Option<BinaryType>>,
    version: [u8; 16],
    version_text: String,
    /// Where each field of the row under way begins and ends; one in binary format begins with its length.
    places: Vec<(usize, usize)>,
    buffer: Vec<u8>,
}

impl<'l> Rows<'l> {
    fn new(load: &Load, order: Vec<usize>, format: &'l Format) -> Self {
        let fields = load.fields();
        let types: Vec<_> = fields.iter().map(|field| field.binary_type()).collect();
        let takes = match (load.format, format) {
            (LoadFormat::Text, Format::Text) => true,
            (LoadFormat::Binary, Format::Binary(wires)) => {
                let mut pairs = wires.iter().zip(&order);
                pairs.all(|(wire, field)| types[*field].is_some_and(|of| wire.takes(of)))
            }
            _ => false,
        };
        Self {
            format,
            written: load.format,
            as_written: takes && order.iter().copied().eq(0..fields.len()),
            order,
            places: Vec::with_capacity(fields.len()),
            types,
            version: load.version.to_bytes(),
            version_text: load.version.to_string(),
            buffer: Vec::new(),
        }
    }

    /// `None` where the row has another number of fields, or a value has no binary form.
    fn write(&mut self, row: &[u8], out: &mut Vec<u8>) -> Option<()> {
        if !self.as_written {
            self.find(row)?;
        }
        match self.format {
            Format::Text => {
                match self.as_written {
                    true => {
                        out.extend_from_slice(row);
                        out.push(b'\t');
                    }
                    false => self.texts(row, out)?,
                }
                out.extend_from_slice(self.version_text.as_bytes());
                out.push(b'\n');
            }
            Format::Binary(wires) => {
                let count = i16::try_from(wires.len() + 1).ok()?;
                out.extend_from_slice(&count.to_be_bytes());
                match self.as_written {
                    // Behind the number of its fields.
                    true => out.extend_from_slice(row.get(size_of_val(&count)..)?),
                    false => self.values(row, wires, out)?,
                }
                out.extend_from_slice(&VERSION_LENGTH);
                out.extend_from_slice(&self.version);
            }
        }
        Some(())
    }

    /// Each column's text, with a tab behind it.
    fn texts(&mut self, row: &[u8], out: &mut Vec<u8>) -> Option<()> {
        for field in &self.order {
            let (from, to) = self.places[*field];
            let bytes = row.get(from..to)?;
            match self.written {
                LoadFormat::Text => out.extend_from_slice(bytes),
                LoadFormat::Binary => match text_of(bytes, self.types[*field]?, &mut self.buffer) {
                    Ok(None) => out.extend_from_slice(b"\\N"),
                    Ok(Some(text)) => escape_load_value(text, out),
                    Err(_) => return None,
                },
            }
            out.push(b'\t');
        }
        Some(())
    }

    /// Each column's length and bytes.
    fn values(&mut self, row: &[u8], wires: &[Wire], out: &mut Vec<u8>) -> Option<()> {
        for (wire, field) in wires.iter().zip(&self.order) {
            let (from, to) = self.places[*field];
            let bytes = row.get(from..to)?;
            let text = match self.written {
                LoadFormat::Text => load_value(bytes, &mut self.buffer),
                LoadFormat::Binary => match self.types[*field]? {
                    of if wire.takes(of) => {
                        out.extend_from_slice(bytes);
                        continue;
                    }
                    of => text_of(bytes, of, &mut self.buffer),
                },
            };
            match text.ok()? {
                None => out.extend_from_slice(&BINARY_NULL),
                Some(text) => wire.write(text, out)?,
            }
        }
        Some(())
    }

    fn find(&mut self, row: &[u8]) -> Option<()> {
        self.places.clear();
        match self.written {
            LoadFormat::Text => {
                let mut from = 0;
                for field in load_fields(row) {
                    let to = from + field.len();
                    self.places.push((from, to));
                    from = to + 1;
                }
            }
            LoadFormat::Binary => {
                let mut rest = row.get(2..)?;
                while !rest.is_empty() {
                    let from = row.len() - rest.len();
                    (_, rest) = binary_field(rest).ok()?;
                    self.places.push((from, row.len() - rest.len()));
                }
            }
        }
        (self.places.len() == self.types.len()).then_some(())
    }
}

/// The text of a field in binary format, which begins with its length.
fn text_of<'a>(
    field: &'a [u8],
    of: BinaryType,
    buffer: &'a mut Vec<u8>,
) -> Result<Option<&'a [u8]>, LoadError> {
    match binary_field(field)? {
        (None, _) => Ok(None),
        (Some(bytes), _) => of.text(bytes, buffer).map(Some),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use millrace_event::{LoadColumn, LoadHead, Lsn, TableName};

    use super::*;
    use crate::row::LayoutColumn;

    /// Columns of the target: their names at the source, and their types.
    fn layout(columns: &[(&str, &str)]) -> Arc<TableLayout> {
        let key = columns.iter().position(|(name, _)| *name == "id");
        let columns = columns.iter().map(|(name, cast)| LayoutColumn {
            source: (*name).to_owned(),
            target: (*name).to_owned(),
            cast: (*cast).to_owned(),
        });
        Arc::new(TableLayout {
            source: TableName::new("public", "t"),
            target: TableName::new("public", "t"),
            columns: columns.collect(),
            key: key.into_iter().collect(),
            shape: "1".to_owned(),
        })
    }

    /// A load of `id int4, v text` into a target.
    fn load(target: &[(&str, &str)], format: LoadFormat, rows: &[u8], count: usize) -> Load {
        let column = |(name, type_oid): (&str, u32)| LoadColumn {
            name: name.to_owned(),
            type_oid,
        };
        let head = LoadHead {
            load: TableName::new("public", "t"),
            version: Version::new(1, Lsn(5), 0),
            table_version: "1".to_owned(),
            format,
            columns: [("id", 23), ("v", 25)].map(column).to_vec(),
        };
        let mut load = Load::new(layout(target), &head);
        load.push(Bytes::copy_from_slice(rows), count);
        load
    }

    fn written(load: &Load) -> Option<Vec<u8>> {
        let format = Format::of(&load.layout);
        let mut rows = Rows::new(load, load.order()?, &format);
        let mut out = Vec::new();
        for row in load.written() {
            rows.write(row.ok()?, &mut out)?;
        }
        Some(out)
    }

    fn field(bytes: &[u8]) -> Vec<u8> {
        let length = i32::try_from(bytes.len()).unwrap();
        [&length.to_be_bytes(), bytes].concat()
    }

    fn binary(fields: &[Vec<u8>]) -> Vec<u8> {
        let count = i16::try_from(fields.len()).unwrap();
        [&count.to_be_bytes(), &fields.concat()[..]].concat()
    }

    fn rows() -> Vec<u8> {
        let first = binary(&[field(&7_i32.to_be_bytes()), field(b"a\tb")]);
        let second = binary(&[field(&8_i32.to_be_bytes()), BINARY_NULL.to_vec()]);
        [first, second].concat()
    }

    const TEXT_ROWS: &[u8] = b"7\ta\\tb\n8\t\\N\n";

    #[test]
    fn rows_get_their_version_whatever_their_format_is() {
        let version = Version::new(1, Lsn(5), 0);
        let id = |id: i64, bytes: usize| field(&id.to_be_bytes()[8 - bytes..]);
        let expected = |bytes, is_last_first| {
            let rows = [(7, field(b"a\tb")), (8, BINARY_NULL.to_vec())].map(|(number, text)| {
                let mut fields = vec![id(number, bytes), text];
                if is_last_first {
                    fields.reverse();
                }
                fields.push(field(&version.to_bytes()));
                binary(&fields)
            });
            Some(rows.concat())
        };
        let text = format!("7\ta\\tb\t{version}\n8\t\\N\t{version}\n").into_bytes();
        for (target, expected) in [
            (&[("id", "integer"), ("v", "text")][..], expected(4, false)),
            (&[("v", "text"), ("id", "integer")], expected(4, true)),
            (
                &[("id", "bigint"), ("v", "character varying")],
                expected(8, false),
            ),
            (&[("id", "integer"), ("v", "shop.mood")], Some(text)),
        ] {
            let binary = load(target, LoadFormat::Binary, &rows(), 2);
            assert_eq!(written(&binary), expected, "{target:?}");
            let texts = load(target, LoadFormat::Text, TEXT_ROWS, 2);
            assert_eq!(written(&texts), expected, "{target:?}");
        }
    }

    #[test]
    fn rows_of_both_formats_are_laid_out_alike() {
        let target = [("v", "text"), ("id", "numeric")];
        let binary = load(&target, LoadFormat::Binary, &rows(), 2).laid_out();
        let texts = load(&target, LoadFormat::Text, TEXT_ROWS, 2).laid_out();
        let rows =
            |laid_out: Result<crate::batch::TableRows, _>| format!("{:?}", laid_out.unwrap().rows);
        assert_eq!(rows(binary), rows(texts));
    }

    #[test]
    fn what_is_no_row_is_not_written() {
        let target = [("id", "integer"), ("v", "text")];
        let mut cut = rows();
        cut.pop();
        assert_eq!(written(&load(&target, LoadFormat::Binary, &cut, 2)), None);
        assert_eq!(written(&load(&target, LoadFormat::Text, b"7\n", 1)), None);
        let wrong = binary(&[field(b"7"), field(b"a")]);
        let wider = [("id", "bigint"), ("v", "text")];
        assert_eq!(written(&load(&wider, LoadFormat::Binary, &wrong, 1)), None);
    }
}
