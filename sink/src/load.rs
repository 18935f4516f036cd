//! Rows of a load on their way to the target: as the source's COPY wrote them, laid out only where they must be.
//!
//! Pure.

use std::sync::Arc;

use bytes::Bytes;
use millrace_event::{
    LoadError, LoadHead, Version, as_streamed, count_load_rows, load_fields, load_rows, load_value,
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
            && self.fields.len() == head.columns.len()
    }

    /// Adds a message's rows, without their head.
    pub fn push(&mut self, rows: Bytes) {
        self.rows += count_load_rows(&rows);
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

    /// The rows, message by message.
    #[must_use]
    pub fn parts(&self) -> &[Bytes] {
        &self.parts
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
            for line in load_rows(part) {
                rows.push(self.row(part, line, &mut buffer)?);
            }
        }
        Ok(TableRows {
            layout: Arc::clone(&self.layout),
            rows,
        })
    }

    fn row(&self, part: &Bytes, line: &[u8], buffer: &mut Vec<u8>) -> Result<RowOp, LoadRowError> {
        let mut row: Row = vec![Cell::Missing; self.layout.columns.len()].into();
        let mut texts = load_fields(line);
        for field in self.fields.iter() {
            let text = texts.next().ok_or(LoadError::Row)?;
            let Some(column) = field.column else { continue };
            row[column] = match load_value(text, buffer)? {
                None => Cell::Null,
                Some(value) => {
                    let escaped = !std::ptr::eq(value, text);
                    match as_streamed(field.type_oid, value)? {
                        std::borrow::Cow::Borrowed(value) if !escaped => {
                            Cell::Text(part.slice_ref(value))
                        }
                        value => Cell::Text(Bytes::copy_from_slice(&value)),
                    }
                }
            };
        }
        if texts.next().is_some() {
            return Err(LoadError::Row.into());
        }
        Ok(RowOp {
            key: self.layout.key_of(&row)?,
            version: self.version,
            created: false,
            action: Action::Put(row),
        })
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
