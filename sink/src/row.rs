//! Rows laid out by a target's table, as slices of the messages they came in.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use millrace_event::{Columns, TableName, Value};

/// A target's table as rows are laid out for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableLayout {
    /// The table at the source.
    pub source: TableName,
    /// The table in the target.
    pub target: TableName,
    /// The columns that are written, in the order of a row's cells.
    pub columns: Vec<LayoutColumn>,
    /// The key columns as indexes into `columns`, in the key's order.
    pub key: Vec<usize>,
    /// The `table_version` of the source's schema that this layout was made from.
    pub shape: String,
}

/// One column of a layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayoutColumn {
    /// Its name at the source.
    pub source: String,
    /// Its name in the target.
    pub target: String,
    /// The target's type without modifiers, as SQL: what a text is cast to before it is assigned.
    pub cast: String,
}

impl TableLayout {
    /// The name under which the target's bookkeeping knows the table.
    #[must_use]
    pub fn relation(&self) -> String {
        self.target.to_string()
    }

    /// Whether the column of this index belongs to the key.
    #[must_use]
    pub fn is_key(&self, column: usize) -> bool {
        self.key.contains(&column)
    }

    /// The index of the column that has this name at the source.
    #[must_use]
    pub fn place_of(&self, source: &str) -> Option<usize> {
        let mut columns = self.columns.iter();
        columns.position(|column| column.source == source)
    }

    /// The key of a row.
    ///
    /// # Errors
    /// A key column is NULL or missing.
    pub fn key_of(&self, row: &Row) -> Result<Key, RowError> {
        let cell = |index: &usize| match row.get(*index) {
            Some(Cell::Text(text)) => Ok(text),
            _ => Err(RowError::NoKey {
                table: self.source.clone(),
                column: self.columns[*index].source.clone(),
            }),
        };
        if let [only] = self.key.as_slice() {
            return cell(only).cloned().map(Key);
        }
        let mut text = Vec::with_capacity(32);
        for index in &self.key {
            let part = cell(index)?;
            text.extend_from_slice(part.len().to_string().as_bytes());
            text.push(b':');
            text.extend_from_slice(part);
        }
        Ok(Key(text.into()))
    }
}

/// A row's key as one text: the column's text, or for several columns each text behind its length
/// (`1:7 3:abc` without the space), so that two keys never share a text.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(pub Bytes);

impl Key {
    /// The texts of its columns, from the text that [`TableLayout::key_of`] made; `None` for one that it did not.
    #[must_use]
    pub fn texts(text: &str, columns: usize) -> Option<Vec<String>> {
        if columns == 1 {
            return Some(vec![text.to_owned()]);
        }
        let mut rest = text;
        let mut texts = Vec::with_capacity(columns);
        for _ in 0..columns {
            let (length, behind) = rest.split_once(':')?;
            let (part, behind) = behind.split_at_checked(length.parse().ok()?)?;
            texts.push(part.to_owned());
            rest = behind;
        }
        rest.is_empty().then_some(texts)
    }

    /// The key's text.
    #[must_use]
    pub fn text(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(&self.0)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({:?})", self.text())
    }
}

/// One column of a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cell {
    /// SQL NULL.
    Null,
    /// Not known: the change did not touch this value, and the WAL does not hold it.
    Missing,
    /// The exact Postgres text, a slice of the payload it came in.
    Text(Bytes),
}

/// A row's cells in the order of its layout.
pub type Row = Box<[Cell]>;

/// Whether every column is known.
#[must_use]
pub fn is_full(row: &Row) -> bool {
    !row.contains(&Cell::Missing)
}

/// Fills the missing cells of `row` from an older version of the same row.
pub fn fill(row: &mut Row, older: &Row) {
    for (cell, old) in row.iter_mut().zip(older.iter()) {
        if *cell == Cell::Missing {
            cell.clone_from(old);
        }
    }
}

/// A change event whose row cannot be laid out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RowError {
    /// A key column has no value.
    #[error("change of table {table} has no value for its key column {column:?}")]
    NoKey {
        /// The table.
        table: TableName,
        /// The column at the source.
        column: String,
    },
}

/// Lays the columns of events out as rows. Consecutive events of a table list the same columns in the same
/// order, so it remembers where each went and compares names instead of looking them up.
#[derive(Debug)]
pub(crate) struct Projection {
    layout: Arc<TableLayout>,
    /// The names of the event before, each with its column in the layout.
    order: Vec<(String, Option<usize>)>,
}

impl Projection {
    pub(crate) fn new(layout: Arc<TableLayout>) -> Self {
        Self {
            layout,
            order: Vec::new(),
        }
    }

    pub(crate) fn layout(&self) -> &Arc<TableLayout> {
        &self.layout
    }

    /// A row of these columns; what they do not list is missing.
    pub(crate) fn row(&mut self, columns: &Columns<'_>, payload: &Bytes) -> Row {
        let mut row: Row = vec![Cell::Missing; self.layout.columns.len()].into();
        for (at, (name, value)) in columns.iter().enumerate() {
            if let Some(column) = self.column(at, name) {
                row[column] = match value {
                    Value::Null => Cell::Null,
                    Value::Text(text) => Cell::Text(slice(payload, text)),
                };
            }
        }
        row
    }

    fn column(&mut self, at: usize, name: &str) -> Option<usize> {
        if let Some((known, column)) = self.order.get(at)
            && known == name
        {
            return *column;
        }
        let column = self.layout.place_of(name);
        self.order.truncate(at);
        if self.order.len() == at {
            self.order.push((name.to_owned(), column));
        }
        column
    }
}

/// The text as a slice of the payload where it is one, else as a copy.
fn slice(payload: &Bytes, text: &str) -> Bytes {
    if is_within(payload, text.as_bytes()) {
        payload.slice_ref(text.as_bytes())
    } else {
        Bytes::copy_from_slice(text.as_bytes())
    }
}

/// Whether `part` lies in `whole`: a static text such as `"true"` does not, and `slice_ref` would panic.
fn is_within(whole: &[u8], part: &[u8]) -> bool {
    let (whole, part) = (whole.as_ptr_range(), part.as_ptr_range());
    whole.start <= part.start && part.end <= whole.end
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_keys_text_gives_its_columns_back() {
        let column = |name: &str| LayoutColumn {
            source: name.to_owned(),
            target: name.to_owned(),
            cast: "text".to_owned(),
        };
        let layout = |key: Vec<usize>| TableLayout {
            source: TableName::new("public", "t"),
            target: TableName::new("public", "t"),
            columns: vec![column("a"), column("b"), column("c")],
            key,
            shape: String::new(),
        };
        let row: Row = ["1:x", "", "zw\u{f6}lf 3:"]
            .map(|text| Cell::Text(text.into()))
            .into();
        for key in [vec![0], vec![2, 1, 0], vec![1, 2]] {
            let text = layout(key.clone()).key_of(&row).expect("has its key");
            let texts = Key::texts(&text.text(), key.len()).expect("is one of ours");
            let cells = texts.into_iter().map(|text| Cell::Text(text.into()));
            let expected = key.iter().map(|index| row[*index].clone());
            assert!(cells.eq(expected), "{key:?}");
        }
        assert_eq!(Key::texts("1:ab", 2), None);
        assert_eq!(Key::texts("9:ab1:c", 2), None);
    }
}
