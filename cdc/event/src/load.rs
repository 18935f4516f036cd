//! Rows of a load: a head, then rows as Postgres' `COPY .. TO STDOUT` wrote them at the source.
//!
//! Only a copy stream holds them, which one sink reads. Where the target has none of the rows, they reach it
//! without ever having been taken apart into events.

mod binary;
mod binary_type;
mod text;

use std::borrow::Cow;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::value::{Kind, Value, write_json};
use crate::{Datum, NotUtf8, TableName, Version};

pub use binary::{BINARY_END, BINARY_HEAD, BINARY_NULL, binary_field, binary_row};
pub use binary_type::BinaryType;
pub use text::{escape_load_value, load_fields, load_value};

/// How every payload with rows of a load begins; no event does.
const BEGIN: &[u8] = b"{\"load\":";

/// What is the same for all rows of a message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadHead {
    /// The table at the source.
    pub load: TableName,
    /// The version of every row.
    #[serde(with = "crate::as_text")]
    pub version: Version,
    /// The fingerprint of the table's schema, as in an event.
    pub table_version: String,
    /// How the rows are written.
    #[serde(default, skip_serializing_if = "LoadFormat::is_text")]
    pub format: LoadFormat,
    /// The rows' columns.
    pub columns: Vec<LoadColumn>,
}

/// How rows of a load are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LoadFormat {
    /// In COPY's text format, each with its newline.
    #[default]
    Text,
    /// In COPY's binary format, without its head and its end. Each column's type is a [`BinaryType`].
    Binary,
}

impl LoadFormat {
    fn is_text(&self) -> bool {
        *self == Self::Text
    }
}

/// A column of a load's rows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadColumn {
    /// Its name at the source.
    pub name: String,
    /// The type's OID at the source, which says how an event would write its values.
    pub type_oid: u32,
}

/// Rows that are not what a load's are.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The payload's first line is no head.
    #[error("head of a load's rows cannot be read")]
    Head(#[source] Option<serde_json::Error>),
    /// A row that is not in the format of COPY that the head says, or has another number of columns.
    #[error("row is not in COPY's format")]
    Row,
    /// A value is not UTF-8.
    #[error(transparent)]
    NotUtf8(#[from] NotUtf8),
}

impl LoadHead {
    /// The head as the first line of a payload; the rows follow.
    #[must_use]
    pub fn line(&self) -> Vec<u8> {
        let mut line = serde_json::to_vec(self).expect("a head has names only, so it is JSON");
        line.push(b'\n');
        line
    }

    /// Reads the head of a payload, and where its rows begin; `None` where the payload holds no load's rows.
    ///
    /// # Errors
    /// The first line is no head.
    pub fn of(payload: &[u8]) -> Result<Option<(Self, usize)>, LoadError> {
        if !payload.starts_with(BEGIN) {
            return Ok(None);
        }
        let end = memchr::memchr(b'\n', payload).ok_or(LoadError::Head(None))?;
        let head = payload.get(..end).unwrap_or_default();
        let head = serde_json::from_slice(head).map_err(|error| LoadError::Head(Some(error)))?;
        Ok(Some((head, end + 1)))
    }

    /// How many rows there are behind the head.
    ///
    /// # Errors
    /// They are not in the binary format that the head says. In text format each is looked at where it is taken apart.
    pub fn count(&self, rows: &[u8]) -> Result<usize, LoadError> {
        match self.format {
            LoadFormat::Text => Ok(text::count(rows)),
            LoadFormat::Binary => {
                let mut types = self.columns.iter().map(|column| column.type_oid);
                if !types.all(|type_oid| BinaryType::of(type_oid).is_some()) {
                    return Err(LoadError::Row);
                }
                let mut rows = load_rows(self.format, self.columns.len(), rows);
                rows.try_fold(0, |count, row| row.map(|_| count + 1))
            }
        }
    }
}

/// The rows behind a head, of so many columns; each without its newline. Behind an error comes nothing more.
pub fn load_rows(
    format: LoadFormat,
    columns: usize,
    rows: &[u8],
) -> impl Iterator<Item = Result<&[u8], LoadError>> {
    let mut rest = rows;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let taken = match format {
            LoadFormat::Text => Ok(text::row(rest)),
            LoadFormat::Binary => binary_row(rest, columns),
        };
        let (row, after) = match taken {
            Ok((row, after)) => (Ok(row), after),
            Err(error) => (Err(error), &[][..]),
        };
        rest = after;
        Some(row)
    })
}

/// A value's text as an event of the stream would bring it: the elements of arrays are quoted there.
///
/// # Errors
/// The text is not UTF-8.
pub fn as_streamed(type_oid: u32, text: &[u8]) -> Result<Cow<'_, [u8]>, LoadError> {
    let kind = Kind::of_type(type_oid);
    if !matches!(kind, Kind::Array(_)) {
        return Ok(Cow::Borrowed(text));
    }
    let mut json = Vec::new();
    write_json(&mut json, kind, Datum::Text(text))?;
    let raw: &RawValue = serde_json::from_slice(&json).map_err(|_| LoadError::Row)?;
    let value = Value::from_json(raw).map_err(|_| LoadError::Row)?;
    let text = value.as_text().ok_or(LoadError::Row)?;
    Ok(Cow::Owned(text.as_bytes().to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Lsn;

    fn head() -> LoadHead {
        LoadHead {
            load: TableName::new("public", "a \"b\"\n"),
            version: Version::new(1, Lsn(0xAB), 0),
            table_version: "0123".to_owned(),
            format: LoadFormat::Text,
            columns: vec![LoadColumn {
                name: "id".to_owned(),
                type_oid: 20,
            }],
        }
    }

    #[test]
    fn a_payload_is_a_head_and_rows() {
        let mut payload = head().line();
        payload.extend_from_slice(b"1\n2\n");
        let (read, at) = LoadHead::of(&payload).unwrap().unwrap();
        assert_eq!(read, head());
        let rows: Result<Vec<_>, _> = load_rows(read.format, 1, &payload[at..]).collect();
        assert_eq!(rows.unwrap(), [b"1", b"2"]);
        assert_eq!(read.count(&payload[at..]).unwrap(), 2);
        assert!(LoadHead::of(b"{\"op\":\"r\"}").unwrap().is_none());
        assert!(LoadHead::of(b"{\"load\":1}\n").is_err());
        assert!(LoadHead::of(b"{\"load\":").is_err());
    }

    #[test]
    fn an_array_is_spelt_as_an_event_spells_it() {
        let text = |oid, text: &'static str| {
            String::from_utf8(as_streamed(oid, text.as_bytes()).unwrap().into_owned()).unwrap()
        };
        assert_eq!(text(1009, "{a,NULL,\"b c\"}"), "{\"a\",NULL,\"b c\"}");
        assert_eq!(text(1007, "{1,2}"), "{1,2}");
        assert_eq!(text(1009, "{{a},{b}}"), "{{a},{b}}");
        assert_eq!(text(25, "{a}"), "{a}");
    }

    #[test]
    fn a_head_without_a_format_is_one_of_texts() {
        let text = head().line();
        assert!(!String::from_utf8(text).unwrap().contains("format"));
        let binary = LoadHead {
            format: LoadFormat::Binary,
            ..head()
        };
        let (read, _) = LoadHead::of(&binary.line()).unwrap().unwrap();
        assert_eq!(read, binary);
    }

    #[test]
    fn binary_rows_are_counted_where_they_are_whole() {
        let mut head = head();
        head.format = LoadFormat::Binary;
        let row = [0, 1, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 7];
        assert_eq!(head.count(&row.repeat(3)).unwrap(), 3);
        assert_eq!(head.count(&[]).unwrap(), 0);
        assert!(head.count(&row[..13]).is_err());
        // A type whose binary form nobody knows.
        head.columns[0].type_oid = 700;
        assert!(head.count(&row).is_err());
    }
}
