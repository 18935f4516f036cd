//! Rows of a load: a head, then the lines of Postgres' `COPY .. TO STDOUT`, exactly as the source wrote them.
//!
//! Only a copy stream holds them, which one sink reads. Where the target has none of the rows, they reach it
//! without ever having been taken apart into events.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::value::{Kind, Value, write_json};
use crate::{Datum, NotUtf8, TableName, Version};

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
    /// The rows' columns.
    pub columns: Vec<LoadColumn>,
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
    /// A row that is not in the text format of COPY, or has another number of columns than the head says.
    #[error("row is not in COPY's text format")]
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
}

/// The rows behind a head, each without its newline.
pub fn load_rows(rows: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = rows;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let end = memchr::memchr(b'\n', rest).unwrap_or(rest.len());
        let (row, after) = rest.split_at(end);
        rest = after.get(1..).unwrap_or_default();
        Some(row)
    })
}

/// How many rows there are behind a head.
#[must_use]
pub fn count_load_rows(rows: &[u8]) -> usize {
    memchr::memchr_iter(b'\n', rows).count()
        + usize::from(!rows.is_empty() && !rows.ends_with(b"\n"))
}

/// The fields of a row as they are written.
pub fn load_fields(row: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = Some(row);
    std::iter::from_fn(move || {
        let row = rest?;
        let end = memchr::memchr(b'\t', row).unwrap_or(row.len());
        rest = row.get(end + 1..);
        row.get(..end)
    })
}

/// The value of a field: `None` for NULL. `buffer` holds it where COPY had to escape something.
///
/// # Errors
/// The field is not in COPY's text format.
pub fn load_value<'a>(
    field: &'a [u8],
    buffer: &'a mut Vec<u8>,
) -> Result<Option<&'a [u8]>, LoadError> {
    let Some(first) = memchr::memchr(b'\\', field) else {
        return Ok(Some(field));
    };
    if field == b"\\N" {
        return Ok(None);
    }
    buffer.clear();
    let (mut rest, mut at) = (field, Some(first));
    while let Some(backslash) = at {
        let (plain, escaped) = rest.split_at(backslash);
        buffer.extend_from_slice(plain);
        let [_, code, after @ ..] = escaped else {
            return Err(LoadError::Row);
        };
        buffer.push(match code {
            b'b' => 8,
            b't' => b'\t',
            b'n' => b'\n',
            b'v' => 11,
            b'f' => 12,
            b'r' => b'\r',
            b'\\' => b'\\',
            _ => return Err(LoadError::Row),
        });
        rest = after;
        at = memchr::memchr(b'\\', rest);
    }
    buffer.extend_from_slice(rest);
    Ok(Some(buffer))
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
    use proptest::prelude::*;

    use super::*;
    use crate::Lsn;

    fn head() -> LoadHead {
        LoadHead {
            load: TableName::new("public", "a \"b\"\n"),
            version: Version::new(1, Lsn(0xAB), 0),
            table_version: "0123".to_owned(),
            columns: vec![LoadColumn {
                name: "id".to_owned(),
                type_oid: 20,
            }],
        }
    }

    fn values(row: &[u8]) -> Result<Vec<Option<Vec<u8>>>, LoadError> {
        let mut buffer = Vec::new();
        load_fields(row)
            .map(|field| Ok(load_value(field, &mut buffer)?.map(<[u8]>::to_vec)))
            .collect()
    }

    #[test]
    fn a_payload_is_a_head_and_rows() {
        let mut payload = head().line();
        payload.extend_from_slice(b"1\n2\n");
        let (read, at) = LoadHead::of(&payload).unwrap().unwrap();
        assert_eq!(read, head());
        let rows: Vec<_> = load_rows(&payload[at..]).collect();
        assert_eq!(rows, [b"1", b"2"]);
        assert_eq!(count_load_rows(&payload[at..]), 2);
        assert!(LoadHead::of(b"{\"op\":\"r\"}").unwrap().is_none());
        assert!(LoadHead::of(b"{\"load\":1}\n").is_err());
        assert!(LoadHead::of(b"{\"load\":").is_err());
    }

    #[test]
    fn null_and_empty_and_the_text_backslash_n_are_three_values() {
        let expected = [None, Some(vec![]), Some(b"\\N".to_vec())];
        assert_eq!(values(b"\\N\t\t\\\\N").unwrap(), expected);
    }

    #[test]
    fn what_copy_does_not_write_is_refused() {
        for row in [&b"a\\"[..], b"\\x41", b"\\q"] {
            assert!(values(row).is_err(), "{row:?}");
        }
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

    proptest! {
        #[test]
        fn any_row_survives(row in prop::collection::vec(prop::option::of(".*"), 1..6)) {
            let escape = |text: &String| {
                let mut out = String::new();
                for char in text.chars() {
                    match char {
                        '\u{8}' => out.push_str("\\b"),
                        '\t' => out.push_str("\\t"),
                        '\n' => out.push_str("\\n"),
                        '\u{b}' => out.push_str("\\v"),
                        '\u{c}' => out.push_str("\\f"),
                        '\r' => out.push_str("\\r"),
                        '\\' => out.push_str("\\\\"),
                        other => out.push(other),
                    }
                }
                out
            };
            let fields: Vec<String> = row
                .iter()
                .map(|field| field.as_ref().map_or("\\N".to_owned(), escape))
                .collect();
            let line = format!("{}\n", fields.join("\t"));
            let lines: Vec<_> = load_rows(line.as_bytes()).collect();
            prop_assert_eq!(lines.len(), 1);
            let expected: Vec<_> = row.iter().map(|field| field.as_ref().map(|text| text.clone().into_bytes())).collect();
            prop_assert_eq!(values(lines[0]).unwrap(), expected);
        }
    }
}
