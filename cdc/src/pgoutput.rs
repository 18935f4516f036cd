//! Decoding of `pgoutput`, protocol version 1: the bytes of one WAL message, borrowed, never copied.
//!
//! Pure. Every byte comes from outside, so nothing here indexes: a message that is too short, too long or
//! not what the protocol says is a [`PgoutputError`], never a panic.

mod wire;

#[cfg(test)]
mod tests;

use std::fmt;

use millrace_event::Lsn;
use wire::Reader;

/// One decoded message. Text is what Postgres sent, in the session's `client_encoding` (UTF-8).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message<'a> {
    /// A transaction begins; its changes follow, then its [`Message::Commit`].
    Begin(Begin),
    /// The transaction is complete.
    Commit(Commit),
    /// The transaction was first committed on another node.
    Origin(Origin<'a>),
    /// The shape of a table, sent before the table's first change and again when it may have changed.
    Relation(Relation<'a>),
    /// The name of a type that is not built in, sent before the relation that uses it.
    Type(Type<'a>),
    /// A row was inserted.
    Insert(Insert<'a>),
    /// A row was updated.
    Update(Update<'a>),
    /// A row was deleted.
    Delete(Delete<'a>),
    /// Tables were emptied by one command.
    Truncate(Truncate<'a>),
    /// `pg_logical_emit_message`.
    Message(LogicalMessage<'a>),
}

/// `B`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Begin {
    /// Where the commit record starts: the transaction's commit LSN.
    pub final_lsn: Lsn,
    /// When it committed, in microseconds since the Unix epoch. Not monotone.
    pub commit_ts_us: i64,
    /// The top-level transaction's id, 32 bits: it wraps around.
    pub xid: u32,
}

/// `C`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Commit {
    /// Always 0 today.
    pub flags: u8,
    /// Equal to the transaction's [`Begin::final_lsn`].
    pub commit_lsn: Lsn,
    /// Just behind the commit record: what may be confirmed to the slot.
    pub end_lsn: Lsn,
    /// When it committed, in microseconds since the Unix epoch.
    pub commit_ts_us: i64,
}

/// `O`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin<'a> {
    /// The commit LSN on the node of origin.
    pub commit_lsn: Lsn,
    /// The replication origin's name.
    pub name: &'a str,
}

/// Which old columns Postgres logs for a table's updates and deletes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplicaIdentity {
    /// The primary key's.
    Default,
    /// None: updates and deletes of a published table fail at the source.
    Nothing,
    /// All.
    Full,
    /// Those of a chosen unique index.
    Index,
}

/// `R`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relation<'a> {
    /// The table's oid.
    pub relid: u32,
    /// The table's schema. The wire's empty text is already `pg_catalog` here.
    pub schema: &'a str,
    /// The table's name.
    pub table: &'a str,
    /// Which old columns are logged.
    pub identity: ReplicaIdentity,
    /// The published columns, in the order of every tuple of this table.
    pub columns: Vec<RelationColumn<'a>>,
}

/// A column of a [`Relation`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelationColumn<'a> {
    /// Part of the replica identity's key. True for every column under FULL.
    pub key: bool,
    /// The column's name.
    pub name: &'a str,
    /// The type's oid; above 16383 it is this database's own.
    pub type_oid: u32,
    /// The type's modifier, -1 for none.
    pub typmod: i32,
}

/// `Y`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Type<'a> {
    /// The type's oid. For a domain the names below are its base type's.
    pub oid: u32,
    /// The type's schema. The wire's empty text is already `pg_catalog` here.
    pub schema: &'a str,
    /// The type's name.
    pub name: &'a str,
}

/// `I`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Insert<'a> {
    /// The table's oid.
    pub relid: u32,
    /// The row.
    pub new: Tuple<'a>,
}

/// `U`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Update<'a> {
    /// The table's oid.
    pub relid: u32,
    /// The old key if it changed, the whole old row under FULL, otherwise nothing.
    pub old: Option<OldTuple<'a>>,
    /// The row as it is now; TOAST values that were not touched are [`Datum::Unchanged`].
    pub new: Tuple<'a>,
}

/// `D`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delete<'a> {
    /// The table's oid.
    pub relid: u32,
    /// The deleted row's key, or the whole row under FULL.
    pub old: OldTuple<'a>,
}

/// What an [`OldTuple`] holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OldKind {
    /// Only the columns of the replica identity; the others are sent as null and are not.
    Key,
    /// Every column.
    Full,
}

/// The old columns of an updated or deleted row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OldTuple<'a> {
    /// Which columns it holds.
    pub kind: OldKind,
    /// One datum per column of the relation.
    pub tuple: Tuple<'a>,
}

/// `T`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Truncate<'a> {
    /// Bit 0: CASCADE. Bit 1: RESTART IDENTITY.
    pub flags: u8,
    /// The published tables that were emptied.
    pub relids: Relids<'a>,
}

/// `M`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogicalMessage<'a> {
    /// Whether it belongs to the transaction around it; otherwise it arrives at once, outside of any.
    pub transactional: bool,
    /// Just behind the message's own record.
    pub lsn: Lsn,
    /// The sender's prefix.
    pub prefix: &'a str,
    /// The content: any bytes.
    pub content: &'a [u8],
}

/// A list of table oids, read from the message as it is walked.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Relids<'a>(&'a [[u8; 4]]);

impl<'a> Relids<'a> {
    /// The oids in the server's order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = u32> + use<'a> {
        self.0.iter().map(|oid| u32::from_be_bytes(*oid))
    }
}

impl fmt::Debug for Relids<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

/// The column values of one row, as sent: checked once, then read as it is walked, without an allocation.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Tuple<'a> {
    columns: u16,
    bytes: &'a [u8],
}

impl<'a> Tuple<'a> {
    /// How many columns the tuple has.
    #[must_use]
    pub fn len(&self) -> usize {
        usize::from(self.columns)
    }

    /// Whether the tuple has no columns.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.columns == 0
    }

    /// The values in the order of the relation's columns.
    #[must_use]
    pub fn iter(&self) -> Data<'a> {
        Data {
            left: self.columns,
            reader: Reader::new(self.bytes),
        }
    }
}

impl<'a> IntoIterator for Tuple<'a> {
    type Item = Datum<'a>;
    type IntoIter = Data<'a>;

    fn into_iter(self) -> Data<'a> {
        self.iter()
    }
}

impl fmt::Debug for Tuple<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

/// Walks a [`Tuple`].
#[derive(Clone, Debug)]
pub struct Data<'a> {
    left: u16,
    reader: Reader<'a>,
}

impl<'a> Iterator for Data<'a> {
    type Item = Datum<'a>;

    fn next(&mut self) -> Option<Datum<'a>> {
        self.left = self.left.checked_sub(1)?;
        self.reader.datum().ok()
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (usize::from(self.left), Some(usize::from(self.left)))
    }
}

impl ExactSizeIterator for Data<'_> {}

/// One column's value.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Datum<'a> {
    /// SQL NULL. In a [`OldKind::Key`] tuple also any column outside the key.
    Null,
    /// A TOAST value that the update did not touch and Postgres did not send.
    Unchanged,
    /// The type's text form.
    Text(&'a [u8]),
    /// The type's binary form; only sent when `binary` was asked for, which we never do.
    Binary(&'a [u8]),
}

impl fmt::Debug for Datum<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null => f.write_str("Null"),
            Self::Unchanged => f.write_str("Unchanged"),
            Self::Text(bytes) => write!(f, "Text(\"{}\")", bytes.escape_ascii()),
            Self::Binary(bytes) => write!(f, "Binary(\"{}\")", bytes.escape_ascii()),
        }
    }
}

/// Bytes that are not a message of protocol version 1.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PgoutputError {
    /// The message ends inside one of its fields.
    #[error("the message ends inside its {field}")]
    Truncated {
        /// The field.
        field: &'static str,
    },
    /// Bytes are left behind the message's last field.
    #[error("{bytes} bytes are left behind the end of the message")]
    Trailing {
        /// How many.
        bytes: usize,
    },
    /// A field has a value that the protocol does not know.
    #[error("{field} has the unknown value {value:#04x}")]
    Unknown {
        /// The field.
        field: &'static str,
        /// Its value.
        value: u8,
    },
    /// A count or a length below zero, or one that does not fit.
    #[error("{field} has the impossible length {length}")]
    Length {
        /// The field.
        field: &'static str,
        /// What was sent.
        length: i64,
    },
    /// A name that is not UTF-8 although the session asked for it.
    #[error("the {field} is not UTF-8")]
    NotUtf8 {
        /// The field.
        field: &'static str,
    },
    /// A message of protocol version 2 or later, which must not come with what we asked for.
    #[error("message {tag:?} belongs to streamed or prepared transactions; streaming is off")]
    StreamingOff {
        /// The message's tag.
        tag: char,
    },
    /// No message has this tag.
    #[error("no message has the tag {tag:#04x}")]
    UnknownTag {
        /// The tag.
        tag: u8,
    },
}

/// Decodes one message, which must fill `payload` exactly.
///
/// # Errors
/// See [`PgoutputError`].
pub fn parse(payload: &[u8]) -> Result<Message<'_>, PgoutputError> {
    let mut reader = Reader::new(payload);
    let message = match reader.u8("tag")? {
        b'B' => Message::Begin(Begin {
            final_lsn: reader.lsn("final LSN")?,
            commit_ts_us: reader.timestamp("commit time")?,
            xid: reader.u32("xid")?,
        }),
        b'C' => Message::Commit(Commit {
            flags: reader.u8("flags")?,
            commit_lsn: reader.lsn("commit LSN")?,
            end_lsn: reader.lsn("end LSN")?,
            commit_ts_us: reader.timestamp("commit time")?,
        }),
        b'O' => Message::Origin(Origin {
            commit_lsn: reader.lsn("origin LSN")?,
            name: reader.text("origin")?,
        }),
        b'R' => Message::Relation(reader.relation()?),
        b'Y' => Message::Type(Type {
            oid: reader.u32("type oid")?,
            schema: reader.schema("schema")?,
            name: reader.text("type name")?,
        }),
        b'I' => Message::Insert(Insert {
            relid: reader.u32("relation oid")?,
            new: reader.new_tuple()?,
        }),
        b'U' => Message::Update(Update {
            relid: reader.u32("relation oid")?,
            old: reader.optional_old_tuple()?,
            new: reader.new_tuple()?,
        }),
        b'D' => Message::Delete(Delete {
            relid: reader.u32("relation oid")?,
            old: reader.old_tuple()?,
        }),
        b'T' => Message::Truncate(reader.truncate()?),
        b'M' => Message::Message(LogicalMessage {
            transactional: reader.u8("flags")? & 1 == 1,
            lsn: reader.lsn("message LSN")?,
            prefix: reader.text("prefix")?,
            content: reader.content("content")?,
        }),
        tag @ (b'S' | b'E' | b'c' | b'A' | b'b' | b'P' | b'K' | b'r' | b'p') => {
            return Err(PgoutputError::StreamingOff {
                tag: char::from(tag),
            });
        }
        tag => return Err(PgoutputError::UnknownTag { tag }),
    };
    reader.end()?;
    Ok(message)
}
