//! Reads the fields of a message from its bytes, front to back.

use millrace_event::Lsn;

use super::{
    Datum, OldKind, OldTuple, PgoutputError, Relation, RelationColumn, Relids, ReplicaIdentity,
    Truncate, Tuple,
};

/// Microseconds from the Unix epoch to Postgres's, 2000-01-01.
const POSTGRES_EPOCH_US: i64 = 946_684_800_000_000;

/// What is left of a message.
#[derive(Clone, Debug)]
pub(super) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    pub(super) fn end(&self) -> Result<(), PgoutputError> {
        match self.rest.len() {
            0 => Ok(()),
            bytes => Err(PgoutputError::Trailing { bytes }),
        }
    }

    fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], PgoutputError> {
        let (array, rest) = self
            .rest
            .split_first_chunk()
            .ok_or(PgoutputError::Truncated { field })?;
        self.rest = rest;
        Ok(*array)
    }

    fn bytes(&mut self, count: usize, field: &'static str) -> Result<&'a [u8], PgoutputError> {
        let (bytes, rest) = self
            .rest
            .split_at_checked(count)
            .ok_or(PgoutputError::Truncated { field })?;
        self.rest = rest;
        Ok(bytes)
    }

    pub(super) fn u8(&mut self, field: &'static str) -> Result<u8, PgoutputError> {
        self.array(field).map(u8::from_be_bytes)
    }

    pub(super) fn u32(&mut self, field: &'static str) -> Result<u32, PgoutputError> {
        self.array(field).map(u32::from_be_bytes)
    }

    fn i32(&mut self, field: &'static str) -> Result<i32, PgoutputError> {
        self.array(field).map(i32::from_be_bytes)
    }

    pub(super) fn lsn(&mut self, field: &'static str) -> Result<Lsn, PgoutputError> {
        self.array(field)
            .map(|bytes| Lsn(u64::from_be_bytes(bytes)))
    }

    /// A timestamp, converted to microseconds since the Unix epoch.
    pub(super) fn timestamp(&mut self, field: &'static str) -> Result<i64, PgoutputError> {
        let us = self.array(field).map(i64::from_be_bytes)?;
        Ok(us.saturating_add(POSTGRES_EPOCH_US))
    }

    /// A count of at most 32767.
    fn count(&mut self, field: &'static str) -> Result<u16, PgoutputError> {
        let count = self.array(field).map(i16::from_be_bytes)?;
        u16::try_from(count).map_err(|_| PgoutputError::Length {
            field,
            length: i64::from(count),
        })
    }

    /// A length of 32 bits.
    fn length(&mut self, field: &'static str) -> Result<usize, PgoutputError> {
        let length = self.i32(field)?;
        usize::try_from(length).map_err(|_| PgoutputError::Length {
            field,
            length: i64::from(length),
        })
    }

    /// Bytes behind their own length.
    pub(super) fn content(&mut self, field: &'static str) -> Result<&'a [u8], PgoutputError> {
        let length = self.length(field)?;
        self.bytes(length, field)
    }

    /// A text that a zero byte ends.
    pub(super) fn text(&mut self, field: &'static str) -> Result<&'a str, PgoutputError> {
        let length = memchr::memchr(0, self.rest).ok_or(PgoutputError::Truncated { field })?;
        let text = self.bytes(length, field)?;
        self.u8(field)?;
        std::str::from_utf8(text).map_err(|_| PgoutputError::NotUtf8 { field })
    }

    /// A schema's name; `pg_catalog` is sent as an empty text.
    pub(super) fn schema(&mut self, field: &'static str) -> Result<&'a str, PgoutputError> {
        Ok(match self.text(field)? {
            "" => "pg_catalog",
            schema => schema,
        })
    }

    pub(super) fn relation(&mut self) -> Result<Relation<'a>, PgoutputError> {
        let relid = self.u32("relation oid")?;
        let schema = self.schema("schema")?;
        let table = self.text("table")?;
        let identity = match self.u8("replica identity")? {
            b'd' => ReplicaIdentity::Default,
            b'n' => ReplicaIdentity::Nothing,
            b'f' => ReplicaIdentity::Full,
            b'i' => ReplicaIdentity::Index,
            value => {
                return Err(PgoutputError::Unknown {
                    field: "replica identity",
                    value,
                });
            }
        };
        let count = self.count("column count")?;
        let columns = (0..count)
            .map(|_| self.relation_column())
            .collect::<Result<_, _>>()?;
        Ok(Relation {
            relid,
            schema,
            table,
            identity,
            columns,
        })
    }

    fn relation_column(&mut self) -> Result<RelationColumn<'a>, PgoutputError> {
        Ok(RelationColumn {
            key: self.u8("column flags")? & 1 == 1,
            name: self.text("column name")?,
            type_oid: self.u32("column type")?,
            typmod: self.i32("column modifier")?,
        })
    }

    pub(super) fn truncate(&mut self) -> Result<Truncate<'a>, PgoutputError> {
        let field = "relation oids";
        let count = self.length(field)?;
        let flags = self.u8("flags")?;
        let length = count
            .checked_mul(size_of::<u32>())
            .ok_or(PgoutputError::Length {
                field,
                length: i64::MAX,
            })?;
        let (relids, _) = self.bytes(length, field)?.as_chunks();
        Ok(Truncate {
            flags,
            relids: Relids(relids),
        })
    }

    pub(super) fn new_tuple(&mut self) -> Result<Tuple<'a>, PgoutputError> {
        match self.u8("tuple kind")? {
            b'N' => self.tuple(),
            value => Err(PgoutputError::Unknown {
                field: "tuple kind",
                value,
            }),
        }
    }

    pub(super) fn old_tuple(&mut self) -> Result<OldTuple<'a>, PgoutputError> {
        let kind = match self.u8("tuple kind")? {
            b'K' => OldKind::Key,
            b'O' => OldKind::Full,
            value => {
                return Err(PgoutputError::Unknown {
                    field: "tuple kind",
                    value,
                });
            }
        };
        Ok(OldTuple {
            kind,
            tuple: self.tuple()?,
        })
    }

    /// The old tuple of an update, unless the new one comes at once.
    pub(super) fn optional_old_tuple(&mut self) -> Result<Option<OldTuple<'a>>, PgoutputError> {
        match self.rest.first() {
            Some(b'N') => Ok(None),
            _ => self.old_tuple().map(Some),
        }
    }

    /// Walks a tuple once, so that what [`Tuple`] promises holds: walking it again cannot fail.
    fn tuple(&mut self) -> Result<Tuple<'a>, PgoutputError> {
        let columns = self.count("column count")?;
        let start = self.rest;
        for _ in 0..columns {
            self.datum()?;
        }
        let length = start.len() - self.rest.len();
        let bytes = start.get(..length).unwrap_or_default();
        Ok(Tuple { columns, bytes })
    }

    pub(super) fn datum(&mut self) -> Result<Datum<'a>, PgoutputError> {
        match self.u8("column kind")? {
            b'n' => Ok(Datum::Null),
            b'u' => Ok(Datum::Unchanged),
            b't' => self.content("column value").map(Datum::Text),
            b'b' => self.content("column value").map(Datum::Binary),
            value => Err(PgoutputError::Unknown {
                field: "column kind",
                value,
            }),
        }
    }
}
