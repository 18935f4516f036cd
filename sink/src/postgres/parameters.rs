//! Statement parameters, encoded straight from rows: one buffer for a whole column, no string for each cell.

use std::error::Error;
use std::fmt;

use bytes::{BufMut, BytesMut};
use millrace_event::Version;
use tokio_postgres::types::{FromSql, IsNull, ToSql, Type, to_sql_checked};

use crate::batch::{Action, RowOp};
use crate::row::{Cell, Row};
use crate::sql::Form;

/// A boxed parameter of one statement.
pub(super) type Parameter<'a> = Box<dyn ToSql + Sync + Send + 'a>;

const NULL_LENGTH: i32 = -1;

/// The bytes of a version.
const VERSION_BYTES: usize = 16;

/// The bytes of an array's head at most.
const HEAD_BYTES: usize = 20;

/// The bytes before each item.
const LENGTH_BYTES: usize = size_of::<i32>();

type Encoded<T> = Result<T, Box<dyn Error + Sync + Send>>;

/// Writes the head of a one-dimensional array in Postgres's binary form, and makes room for its items.
fn begin_array(out: &mut BytesMut, element: &Type, len: usize, bytes: usize) -> Encoded<()> {
    out.reserve(HEAD_BYTES + len * LENGTH_BYTES + bytes);
    let len = i32::try_from(len)?;
    out.put_i32(i32::from(len > 0));
    // "Has nulls" is a hint that Postgres ignores.
    out.put_i32(1);
    out.put_u32(element.oid());
    if len > 0 {
        out.put_i32(len);
        out.put_i32(1);
    }
    Ok(())
}

/// Writes `text[]`.
fn write_texts<'a>(
    out: &mut BytesMut,
    texts: impl ExactSizeIterator<Item = Option<&'a [u8]>> + Clone,
) -> Encoded<IsNull> {
    let bytes = texts.clone().flatten().map(<[u8]>::len).sum();
    begin_array(out, &Type::TEXT, texts.len(), bytes)?;
    for text in texts {
        match text {
            None => out.put_i32(NULL_LENGTH),
            Some(text) => {
                out.put_i32(i32::try_from(text.len())?);
                out.put_slice(text);
            }
        }
    }
    Ok(IsNull::No)
}

/// The row that a change's parameters come from: of a delete, the one with the key alone.
pub(super) fn cells(op: &RowOp) -> &Row {
    match &op.action {
        Action::Put(row) => row,
        Action::Delete { key, .. } => key,
    }
}

fn cell_text(cell: &Cell) -> Option<&[u8]> {
    match cell {
        Cell::Text(text) => Some(text),
        Cell::Null | Cell::Missing => None,
    }
}

/// One column of many rows, as `text[]`.
pub(super) struct TextColumn<'a> {
    pub(super) ops: &'a [&'a RowOp],
    pub(super) column: usize,
}

/// One column of many rows, as an array of a type in its binary form.
pub(super) struct BinaryColumn {
    form: Form,
    rows: usize,
    /// The array's items, each behind its length.
    items: Vec<u8>,
}

impl BinaryColumn {
    /// `None` if some row's value does not have that form.
    pub(super) fn new(form: Form, ops: &[&RowOp], column: usize) -> Option<Self> {
        if form == Form::Text {
            return None;
        }
        let mut items = Vec::with_capacity(ops.len() * (LENGTH_BYTES + size_of::<i64>()));
        for op in ops {
            match cell_text(&cells(op)[column]) {
                None => items.extend_from_slice(&NULL_LENGTH.to_be_bytes()),
                Some(text) => form.write(text, &mut items)?,
            }
        }
        let rows = ops.len();
        Some(Self { form, rows, items })
    }

    /// The form of the items.
    pub(super) fn form(&self) -> Form {
        self.form
    }
}

/// The types of an array of this form and of its items.
fn types(form: Form) -> (Type, Type) {
    match form {
        Form::Text => (Type::TEXT_ARRAY, Type::TEXT),
        Form::Bool => (Type::BOOL_ARRAY, Type::BOOL),
        Form::Int2 => (Type::INT2_ARRAY, Type::INT2),
        Form::Int4 => (Type::INT4_ARRAY, Type::INT4),
        Form::Int8 => (Type::INT8_ARRAY, Type::INT8),
        Form::Uuid => (Type::UUID_ARRAY, Type::UUID),
        Form::Date => (Type::DATE_ARRAY, Type::DATE),
        Form::Timestamp => (Type::TIMESTAMP_ARRAY, Type::TIMESTAMP),
        Form::TimestampTz => (Type::TIMESTAMPTZ_ARRAY, Type::TIMESTAMPTZ),
    }
}

impl fmt::Debug for BinaryColumn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BinaryColumn({:?})", self.form)
    }
}

impl ToSql for BinaryColumn {
    fn to_sql(&self, ty: &Type, out: &mut BytesMut) -> Encoded<IsNull> {
        let (array, item) = types(self.form);
        if *ty != array {
            return Err(format!("an array of {item} for a parameter of type {ty}").into());
        }
        begin_array(out, &item, self.rows, self.items.len())?;
        out.put_slice(&self.items);
        Ok(IsNull::No)
    }

    fn accepts(_: &Type) -> bool {
        // Which type it is depends on the form, which is not known here.
        true
    }

    to_sql_checked!();
}

/// The keys of many rows, as `text[]`.
pub(super) struct KeyColumn<'a>(pub(super) &'a [&'a RowOp]);

/// The versions of many rows, as `uuid[]`.
pub(super) struct VersionColumn<'a>(pub(super) &'a [&'a RowOp]);

/// One cell, as `text`.
pub(super) struct Text<'a>(pub(super) &'a Cell);

/// A version, as `uuid`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Uuid(pub(super) Version);

/// Values stay out of logs, so a parameter's debug text is its type alone.
macro_rules! parameter {
    ($name:ident, $type:path, |$this:ident, $out:ident| $body:expr) => {
        impl fmt::Debug for $name<'_> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(stringify!($name))
            }
        }

        impl ToSql for $name<'_> {
            fn to_sql(
                &self,
                _: &Type,
                $out: &mut BytesMut,
            ) -> Result<IsNull, Box<dyn Error + Sync + Send>> {
                let $this = self;
                $body
            }

            fn accepts(ty: &Type) -> bool {
                *ty == $type
            }

            to_sql_checked!();
        }
    };
}

parameter!(TextColumn, Type::TEXT_ARRAY, |this, out| {
    let texts = this.ops.iter().map(|op| cell_text(&cells(op)[this.column]));
    write_texts(out, texts)
});

parameter!(KeyColumn, Type::TEXT_ARRAY, |this, out| {
    write_texts(out, this.0.iter().map(|op| Some(&*op.key.0)))
});

parameter!(VersionColumn, Type::UUID_ARRAY, |this, out| {
    let len = this.0.len();
    begin_array(out, &Type::UUID, len, len * VERSION_BYTES)?;
    for op in this.0 {
        out.put_i32(VERSION_BYTES as i32);
        out.put_slice(&op.version.to_bytes());
    }
    Ok(IsNull::No)
});

parameter!(Text, Type::TEXT, |this, out| match cell_text(this.0) {
    None => Ok(IsNull::Yes),
    Some(text) => {
        out.put_slice(text);
        Ok(IsNull::No)
    }
});

impl ToSql for Uuid {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn Error + Sync + Send>> {
        out.put_slice(&self.0.to_bytes());
        Ok(IsNull::No)
    }

    fn accepts(ty: &Type) -> bool {
        *ty == Type::UUID
    }

    to_sql_checked!();
}

impl<'a> FromSql<'a> for Uuid {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn Error + Sync + Send>> {
        Ok(Self(Version::from_bytes(raw.try_into()?)))
    }

    fn accepts(ty: &Type) -> bool {
        *ty == Type::UUID
    }
}
