//! Rows of a load by `COPY .. FROM STDIN`: for keys that the target does not have, in half the time of an insert.
//!
//! Where every column's type is one whose binary form is known here, the rows go over in that form, which spares
//! the target the reading of texts: the target is what a load waits for. Else they go over as the source wrote
//! them. Either way a row gets its version as one more column.
//!
//! COPY knows no guard. So it is used only where the rows are newer than all that is remembered of the table, and
//! the unique index proves that none of the keys is there: if one is, the batch is applied again with guards. A table that
//! has no key yet has rows of the same snapshot only (`keys.rs`).

use std::collections::HashMap;
use std::pin::pin;

use bytes::Bytes;
use futures_util::SinkExt as _;
use millrace_event::{Version, load_fields, load_rows, load_value};
use tokio_postgres::{Client, CopyInSink, Error, Statement};

use super::session::Session;
use crate::batch::{Batch, Step};
use crate::load::{Load, LoadRowError};
use crate::row::TableLayout;
use crate::sink::SinkError;
use crate::sql::Wire;

/// The head of COPY's binary format: signature, flags, no extension.
const BINARY_HEAD: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";

/// What ends it.
const BINARY_END: [u8; 2] = (-1_i16).to_be_bytes();

const NULL_LENGTH: [u8; 4] = (-1_i32).to_be_bytes();

const VERSION_LENGTH: [u8; 4] = 16_i32.to_be_bytes();

/// So much is sent at a time, bytes: the target works on it while the next is written.
const SEND_BYTES: usize = 128 * 1024;

/// How a load's rows are written for the target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// In the binary forms of the columns.
    Binary(Vec<Wire>),
    /// As the source wrote them.
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
    for part in load.parts() {
        for row in load_rows(part) {
            if rows.write(row, &mut out).is_none() {
                return Ok(false);
            }
            if out.len() >= SEND_BYTES {
                let full = std::mem::replace(&mut out, Vec::with_capacity(2 * SEND_BYTES));
                sink.send(full.into()).await?;
            }
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
    /// The field of each column.
    order: Vec<usize>,
    /// Whether the columns' order is that of the fields, and each has one.
    in_order: bool,
    fields: usize,
    version: [u8; 16],
    version_text: String,
    /// Where each field of the row under way begins and ends.
    places: Vec<(usize, usize)>,
    buffer: Vec<u8>,
}

impl<'l> Rows<'l> {
    fn new(load: &Load, order: Vec<usize>, format: &'l Format) -> Self {
        let fields = load.fields().len();
        Self {
            format,
            in_order: order.iter().copied().eq(0..fields),
            order,
            fields,
            version: load.version.to_bytes(),
            version_text: load.version.to_string(),
            places: Vec::with_capacity(fields),
            buffer: Vec::new(),
        }
    }

    /// `None` where the row has another number of fields, or a value has no binary form.
    fn write(&mut self, row: &[u8], out: &mut Vec<u8>) -> Option<()> {
        match self.format {
            Format::Text if self.in_order => {
                out.extend_from_slice(row);
                out.extend_from_slice(b"\t");
            }
            Format::Text => {
                self.find(row)?;
                for field in &self.order {
                    let (from, to) = self.places[*field];
                    out.extend_from_slice(row.get(from..to)?);
                    out.extend_from_slice(b"\t");
                }
            }
            Format::Binary(wires) => {
                self.find(row)?;
                let count = i16::try_from(wires.len() + 1).ok()?;
                out.extend_from_slice(&count.to_be_bytes());
                for (wire, field) in wires.iter().zip(&self.order) {
                    let (from, to) = self.places[*field];
                    match load_value(row.get(from..to)?, &mut self.buffer).ok()? {
                        None => out.extend_from_slice(&NULL_LENGTH),
                        Some(text) => wire.write(text, out)?,
                    }
                }
                out.extend_from_slice(&VERSION_LENGTH);
                out.extend_from_slice(&self.version);
                return Some(());
            }
        }
        out.extend_from_slice(self.version_text.as_bytes());
        out.extend_from_slice(b"\n");
        Some(())
    }

    fn find(&mut self, row: &[u8]) -> Option<()> {
        self.places.clear();
        let mut from = 0;
        for field in load_fields(row) {
            let to = from + field.len();
            self.places.push((from, to));
            from = to + 1;
        }
        (self.places.len() == self.fields).then_some(())
    }
}
