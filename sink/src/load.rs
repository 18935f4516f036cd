//! Rows of a load on their way to the target: as the source's COPY wrote them, laid out as texts only where they must
//! be.
//!
//! Pure.

use std::sync::Arc;

use bytes::Bytes;
use millrace_event::{
    BinaryType, LoadError, LoadFormat, LoadHead, Version, as_streamed, binary_field, load_fields,
    load_rows, load_value,
};

use crate::batch::{Action, Batch, RowOp, Step, TableRows};
use crate::row::{Cell, Row, RowError, TableLayout};

/// Rows of one table and one snapshot: each key at most once.
#[derive(Clone, Debug)]
pub struct Load {
    /// The table.
    pub layout: Arc<TableLayout>,
    /// The version of every row.
    pub version: Version,
    /// How the rows are written.
    pub format: LoadFormat,
    /// Where the column of each field goes, and its type's OID at the source.
    fields: Arc<[Field]>,
    /// The rows, in the order in which they came.
    parts: Vec<Bytes>,
    rows: usize,
    bytes: usize,
}

/// A field of every row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// The column of the layout; `None` where the target does not have it.
    pub column: Option<usize>,
    type_oid: u32,
}

impl Field {
    /// What its bytes are in rows of binary format.
    pub(crate) fn binary_type(self) -> Option<BinaryType> {
        BinaryType::of(self.type_oid)
    }
}

/// A row that cannot be laid out.
#[derive(Debug, thiserror::Error)]
pub enum LoadRowError {
    /// It is not what a load's rows are.
    #[error(transparent)]
    Format(#[from] LoadError),
    /// It has no key.
    #[error(transparent)]
    Row(#[from] RowError),
}

impl Load {
    /// A load without rows yet.
    #[must_use]
    pub fn new(layout: Arc<TableLayout>, head: &LoadHead) -> Self {
        let fields = head.columns.iter().map(|column| Field {
            column: layout.place_of(&column.name),
            type_oid: column.type_oid,
        });
        Self {
            version: head.version,
            format: head.format,
            fields: fields.collect(),
            layout,
            parts: Vec::new(),
            rows: 0,
            bytes: 0,
        }
    }

    /// Whether a message's rows may be added.
    #[must_use]
    pub fn takes(&self, head: &LoadHead) -> bool {
        self.layout.source == head.load
            && self.layout.shape == head.table_version
            && self.version == head.version
            && self.format == head.format
            && self.fields.len() == head.columns.len()
    }

    /// Adds a message's rows, without their head: so many.
    pub fn push(&mut self, rows: Bytes, count: usize) {
        self.rows += count;
        self.bytes += rows.len();
        self.parts.push(rows);
    }

    /// Takes another layout of the table. A column that the old one lacked gets no value.
    pub(crate) fn refit(&mut self, layout: &Arc<TableLayout>) {
        let place = |old: usize| layout.place_of(&self.layout.columns[old].source);
        let fields = self.fields.iter().map(|field| Field {
            column: field.column.and_then(place),
            ..*field
        });
        self.fields = fields.collect();
        self.layout = Arc::clone(layout);
    }

    /// How many rows there are.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Their bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The rows as they are written, each without its newline.
    pub(crate) fn written(&self) -> impl Iterator<Item = Result<&[u8], LoadError>> {
        let parts = self.parts.iter();
        parts.flat_map(|part| load_rows(self.format, self.fields.len(), part))
    }

    /// The fields of every row.
    #[must_use]
    pub fn fields(&self) -> &[Field] {
        &self.fields
    }

    /// For each column of the layout its field; `None` where a column has none: the rows are not whole then.
    #[must_use]
    pub fn order(&self) -> Option<Vec<usize>> {
        (0..self.layout.columns.len())
            .map(|column| {
                self.fields
                    .iter()
                    .position(|field| field.column == Some(column))
            })
            .collect()
    }

    /// The same rows, laid out like any others.
    ///
    /// # Errors
    /// A row is not what a load's rows are.
    pub fn laid_out(&self) -> Result<TableRows, LoadRowError> {
        let mut rows = Vec::with_capacity(self.rows);
        let mut buffer = Vec::new();
        for part in &self.parts {
            for written in load_rows(self.format, self.fields.len(), part) {
                let row = match self.format {
                    LoadFormat::Text => self.text_row(part, written?, &mut buffer),
                    LoadFormat::Binary => self.binary_row(part, written?, &mut buffer),
                }?;
                rows.push(RowOp {
                    key: self.layout.key_of(&row)?,
                    version: self.version,
                    created: false,
                    action: Action::Put(row),
                });
            }
        }
        Ok(TableRows {
            layout: Arc::clone(&self.layout),
            rows,
        })
    }

    fn text_row(&self, part: &Bytes, row: &[u8], buffer: &mut Vec<u8>) -> Result<Row, LoadError> {
        let mut cells: Row = vec![Cell::Missing; self.layout.columns.len()].into();
        let mut texts = load_fields(row);
        for field in self.fields.iter() {
            let text = texts.next().ok_or(LoadError::Row)?;
            let Some(column) = field.column else { continue };
            cells[column] = match load_value(text, buffer)? {
                None => Cell::Null,
                Some(value) => cell(part, &as_streamed(field.type_oid, value)?),
            };
        }
        match texts.next() {
            Some(_) => Err(LoadError::Row),
            None => Ok(cells),
        }
    }

    fn binary_row(&self, part: &Bytes, row: &[u8], buffer: &mut Vec<u8>) -> Result<Row, LoadError> {
        let mut cells: Row = vec![Cell::Missing; self.layout.columns.len()].into();
        // Behind the number of fields.
        let mut rest = row.get(2..).ok_or(LoadError::Row)?;
        for field in self.fields.iter() {
            let value;
            (value, rest) = binary_field(rest)?;
            let Some(column) = field.column else { continue };
            cells[column] = match value {
                None => Cell::Null,
                Some(value) => {
                    let of = field.binary_type().ok_or(LoadError::Row)?;
                    cell(part, of.text(value, buffer)?)
                }
            };
        }
        Ok(cells)
    }
}

/// A text as a cell: where it lies in the message, it stays there.
fn cell(part: &Bytes, text: &[u8]) -> Cell {
    match part.as_ptr_range().contains(&text.as_ptr()) {
        true => Cell::Text(part.slice_ref(text)),
        false => Cell::Text(Bytes::copy_from_slice(text)),
    }
}

impl Batch {
    /// The same batch with the rows of its loads laid out.
    ///
    /// # Errors
    /// A row is not what a load's rows are.
    pub fn laid_out(&self) -> Result<Self, LoadRowError> {
        let steps = self.steps.iter().map(|step| match step {
            Step::Load(load) => Ok(Step::Rows(vec![load.laid_out()?])),
            other => Ok(other.clone()),
        });
        Ok(Self {
            steps: steps.collect::<Result<_, LoadRowError>>()?,
            copy: self.copy.clone(),
            ..*self
        })
    }

    /// Whether there are rows of a load.
    #[must_use]
    pub fn has_load(&self) -> bool {
        self.steps.iter().any(|step| matches!(step, Step::Load(_)))
    }
}
