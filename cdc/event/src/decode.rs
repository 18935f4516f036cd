//! From a message's payload to change events, borrowed.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::{Lsn, Op, TableName, Value, Version};

mod canonical;

/// One row change, or one table's truncate, borrowed from a line of a message's payload.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct ChangeEvent<'a> {
    /// What happened to the row.
    pub op: Op,
    /// The old row as far as Postgres logged it: the old key under the default replica identity, the whole
    /// old row under FULL.
    #[serde(borrow)]
    pub before: Option<Columns<'a>>,
    /// The new row without its unchanged TOASTed columns.
    #[serde(borrow)]
    pub after: Option<Columns<'a>>,
    /// The key of the row; `None` for a truncate.
    #[serde(borrow, default)]
    pub key: Option<Columns<'a>>,
    /// The columns of the new row whose values the WAL does not hold because the change did not touch them.
    #[serde(borrow, default)]
    pub unchanged: Vec<Cow<'a, str>>,
    /// Where the change comes from.
    #[serde(borrow)]
    pub source: Source<'a>,
    /// The source's clock when it sent the change, milliseconds since 1970.
    pub ts_ms: i64,
}

/// Where a change comes from.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Source<'a> {
    /// The source's name in the configuration.
    #[serde(borrow)]
    pub name: Cow<'a, str>,
    /// The source's database.
    #[serde(borrow)]
    pub db: Cow<'a, str>,
    /// The table's schema.
    #[serde(borrow)]
    pub schema: Cow<'a, str>,
    /// The table.
    #[serde(borrow)]
    pub table: Cow<'a, str>,
    /// The shape of the table that the change was written under, as [`crate::fingerprint`] made it.
    #[serde(borrow)]
    pub table_version: Cow<'a, str>,
    /// Whether a backfill read this row.
    #[serde(with = "text_bool")]
    pub snapshot: bool,
    /// The transaction's id, 32 bits; 0 for a row that a backfill read.
    #[serde(rename = "txId")]
    pub tx_id: u32,
    /// When the transaction committed, microseconds since 1970.
    pub ts_us: i64,
    /// Where the change itself stands in the WAL. Neither unique nor ordered: use `version`.
    #[serde(with = "crate::lsn::as_number")]
    pub lsn: Lsn,
    /// The row's version.
    pub version: Version,
    /// Whether this is the transaction's last event.
    #[serde(default)]
    pub last: bool,
    /// On the last event: the end of the transaction's commit record.
    #[serde(default, deserialize_with = "optional_lsn")]
    pub end_lsn: Option<Lsn>,
}

impl Source<'_> {
    /// The table's name.
    #[must_use]
    pub fn table_name(&self) -> TableName {
        TableName::new(self.schema.as_ref(), self.table.as_ref())
    }
}

/// Named values in the relation's order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Columns<'a>(pub Vec<(Cow<'a, str>, Value<'a>)>);

impl<'a> Columns<'a> {
    /// The value of a column; `None` where the row does not have it.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Value<'a>> {
        self.0
            .iter()
            .find(|(column, _)| column == name)
            .map(|(_, value)| value)
    }

    /// The columns in the relation's order.
    pub fn iter(&self) -> std::slice::Iter<'_, (Cow<'a, str>, Value<'a>)> {
        self.0.iter()
    }
}

impl<'a, 'c> IntoIterator for &'c Columns<'a> {
    type Item = &'c (Cow<'a, str>, Value<'a>);
    type IntoIter = std::slice::Iter<'c, (Cow<'a, str>, Value<'a>)>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.iter()
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Columns<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(ColumnsVisitor)
    }
}

struct ColumnsVisitor;

impl<'de> Visitor<'de> for ColumnsVisitor {
    type Value = Columns<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of columns")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut columns = Vec::with_capacity(8);
        while let Some(Name(name)) = map.next_key()? {
            let raw: &'de RawValue = map.next_value()?;
            columns.push((
                name,
                Value::from_json(raw).map_err(serde::de::Error::custom)?,
            ));
        }
        Ok(Columns(columns))
    }
}

/// A name that borrows where it has no escapes, which `Cow` alone does not do inside a map.
struct Name<'a>(Cow<'a, str>);

impl<'de> Deserialize<'de> for Name<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct NameVisitor;

        impl<'de> Visitor<'de> for NameVisitor {
            type Value = Name<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a column's name")
            }

            fn visit_borrowed_str<E>(self, name: &'de str) -> Result<Self::Value, E> {
                Ok(Name(Cow::Borrowed(name)))
            }

            fn visit_str<E>(self, name: &str) -> Result<Self::Value, E> {
                Ok(Name(Cow::Owned(name.to_owned())))
            }
        }

        deserializer.deserialize_str(NameVisitor)
    }
}

/// Debezium writes `snapshot` as a string.
mod text_bool {
    use std::borrow::Cow;

    use serde::{Deserialize, Deserializer};

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<bool, D::Error> {
        match Cow::<'de, str>::deserialize(from)?.as_ref() {
            "true" => Ok(true),
            "false" => Ok(false),
            other => Err(serde::de::Error::unknown_variant(other, &["true", "false"])),
        }
    }
}

fn optional_lsn<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Lsn>, D::Error> {
    Ok(Option::<u64>::deserialize(from)?.map(Lsn))
}

/// A payload line that is not a change event.
#[derive(Debug, thiserror::Error)]
#[error("payload line is not a change event of this format")]
pub struct DecodeError(#[from] serde_json::Error);

/// Decodes one line of a message's payload.
///
/// # Errors
/// The line is not a change event of this format.
pub fn decode_line(line: &[u8]) -> Result<ChangeEvent<'_>, DecodeError> {
    // Checked as a whole, the text need not be checked again string by string.
    let text = std::str::from_utf8(line).map_err(serde::de::Error::custom);
    let text = text.map_err(DecodeError)?;
    match canonical::read(text) {
        Some(event) => Ok(event),
        None => Ok(serde_json::from_str(text)?),
    }
}

/// The change events of a payload, one a line.
pub fn decode(payload: &[u8]) -> impl Iterator<Item = Result<ChangeEvent<'_>, DecodeError>> {
    let mut rest = payload;
    let lines = std::iter::from_fn(move || {
        let (line, after) = match memchr::memchr(b'\n', rest) {
            Some(end) => rest.split_at(end + 1),
            None => (rest, &[][..]),
        };
        rest = after;
        (!line.is_empty()).then(|| line.trim_ascii_end())
    });
    lines.filter(|line| !line.is_empty()).map(decode_line)
}
