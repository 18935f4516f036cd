//! Statement parameters, encoded straight from rows: one buffer for a whole column, no string for each cell.

use std::error::Error;
use std::fmt;

use bytes::{BufMut, BytesMut};
use millrace_event::Version;
use tokio_postgres::types::{FromSql, IsNull, ToSql, Type, to_sql_checked};

use crate::batch::{Action, RowOp};
use crate::row::{Cell, Row};

/// A boxed parameter of one statement.
pub(super) type Parameter<'a> = Box<dyn ToSql + Sync + Send + 'a>;

const NULL_LENGTH: i32 = -1;

/// Writes a one-dimensional array in Postgres's binary form.
fn write_array<T>(
    out: &mut BytesMut,
    element: &Type,
    items: impl ExactSizeIterator<Item = T>,
    mut write: impl FnMut(T, &mut BytesMut) -> Result<(), Box<dyn Error + Sync + Send>>,
) -> Result<(), Box<dyn Error + Sync + Send>> {
    let len = i32::try_from(items.len())?;
    out.put_i32(i32::from(len > 0));
    // "Has nulls" is a hint that Postgres ignores.
    out.put_i32(1);
    out.put_u32(element.oid());
    if len > 0 {
        out.put_i32(len);
        out.put_i32(1);
    }
    for item in items {
        write(item, out)?;
    }
    Ok(())
}

fn write_text(text: Option<&[u8]>, out: &mut BytesMut) -> Result<(), Box<dyn Error + Sync + Send>> {
    match text {
        None => out.put_i32(NULL_LENGTH),
        Some(text) => {
            out.put_i32(i32::try_from(text.len())?);
            out.put_slice(text);
        }
    }
    Ok(())
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
    write_array(out, &Type::TEXT, texts, write_text)?;
    Ok(IsNull::No)
});

parameter!(KeyColumn, Type::TEXT_ARRAY, |this, out| {
    let texts = this.0.iter().map(|op| Some(&*op.key.0));
    write_array(out, &Type::TEXT, texts, write_text)?;
    Ok(IsNull::No)
});

parameter!(VersionColumn, Type::UUID_ARRAY, |this, out| {
    write_array(out, &Type::UUID, this.0.iter(), |op, out| {
        out.put_i32(16);
        out.put_slice(&op.version.to_bytes());
        Ok(())
    })?;
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
