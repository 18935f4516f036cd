//! The source's `COPY .. TO STDOUT` of a load, row by row as it is published.
//!
//! Pure. Postgres sends a message for each row. In binary format the first has the head before its row, and the last is
//! the end.

use millrace_config::limits;
use millrace_event::{BINARY_END, BINARY_HEAD, BinaryType, Datum, LoadFormat, binary_field};

use crate::copy::text::{CopyRow, CopyTextError, write_row};
use crate::source::SourceTable;

/// What the source sent is no row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum CopyRowError {
    /// In text format.
    #[error(transparent)]
    Text(#[from] CopyTextError),
    /// In binary format.
    #[error("row is not in COPY's binary format")]
    Binary,
}

/// The format in which a table's rows are best read for a sink that takes these types in binary format: binary where
/// every column is of one of them, and we know its form, which spares the source the printing and the sink the reading
/// of texts. Masks work on texts.
pub(super) fn format_of(table: &SourceTable, taken: &[u32]) -> LoadFormat {
    let is_known = |oid: &u32| BinaryType::of(*oid).is_some() && taken.contains(oid);
    let mut columns = table.columns.iter();
    match columns.all(|(_, type_oid, _)| is_known(type_oid)) && table.binding.is_none() {
        true => LoadFormat::Binary,
        false => LoadFormat::Text,
    }
}

/// The option of a `COPY` in this format.
pub(super) fn option(format: LoadFormat) -> &'static str {
    match format {
        LoadFormat::Text => "",
        LoadFormat::Binary => " (FORMAT binary)",
    }
}

/// Bytes of a row as text, which is what its limit is about: as an event it would have as many. Of a row in binary
/// format that is far from it they are not counted.
pub(super) fn text_bytes(table: &SourceTable, format: LoadFormat, row: &[u8]) -> usize {
    if format == LoadFormat::Text || row.len() < limits::ROW_BYTES_MAX / 2 {
        return row.len();
    }
    let mut bytes = 0;
    let (mut rest, mut buffer) = (row.get(2..).unwrap_or_default(), Vec::new());
    for (_, type_oid, _) in &table.columns {
        let Ok((value, after)) = binary_field(rest) else {
            return row.len();
        };
        let text = value.zip(BinaryType::of(*type_oid));
        bytes += text.map_or(0, |(value, of)| {
            of.text(value, &mut buffer).map_or(0, <[u8]>::len)
        });
        rest = after;
    }
    bytes
}

/// The rows of one `COPY`.
pub(super) enum Rows<'t> {
    /// In text format, of a table that is published as it is.
    Text,
    /// In text format, of a table with masks.
    Masked(Masked<'t>),
    /// In binary format, of which the head is still to come.
    BinaryHead,
    /// In binary format.
    Binary,
    /// In binary format, and all there.
    BinaryEnd,
}

impl<'t> Rows<'t> {
    pub(super) fn new(table: &'t SourceTable, format: LoadFormat) -> Self {
        match (format, &table.binding) {
            (LoadFormat::Binary, Some(_)) => unreachable!("masks work on texts"),
            (LoadFormat::Binary, None) => Self::BinaryHead,
            (LoadFormat::Text, None) => Self::Text,
            (LoadFormat::Text, Some(_)) => Self::Masked(Masked::new(table)),
        }
    }

    /// The row of a message; `None` where it has none.
    ///
    /// # Errors
    /// The message is not what Postgres sends.
    pub(super) fn row<'l>(
        &'l mut self,
        message: &'l [u8],
    ) -> Result<Option<&'l [u8]>, CopyRowError> {
        let row = match self {
            Self::Text => return Ok(Some(message)),
            Self::Masked(masked) => return Ok(Some(masked.row(message)?)),
            Self::BinaryHead => {
                *self = Self::Binary;
                message
                    .strip_prefix(BINARY_HEAD)
                    .ok_or(CopyRowError::Binary)?
            }
            Self::Binary => message,
            Self::BinaryEnd => return Err(CopyRowError::Binary),
        };
        if row == BINARY_END {
            *self = Self::BinaryEnd;
            return Ok(None);
        }
        Ok((!row.is_empty()).then_some(row))
    }
}

/// Makes rows of a table with masks the published ones.
pub(super) struct Masked<'t> {
    table: &'t SourceTable,
    row: CopyRow,
    line: Vec<u8>,
}

impl<'t> Masked<'t> {
    fn new(table: &'t SourceTable) -> Self {
        Self {
            table,
            row: CopyRow::default(),
            line: Vec::new(),
        }
    }

    fn row(&mut self, line: &[u8]) -> Result<&[u8], CopyTextError> {
        self.row.read(line)?;
        let mut room = Vec::new();
        let mut data: Vec<Datum<'_>> = self.row.data().collect();
        self.table.publish(&mut data, &mut room);
        self.line.clear();
        write_row(&mut self.line, &data);
        Ok(&self.line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_binary_copy_is_a_head_rows_and_an_end() {
        let mut rows = Rows::BinaryHead;
        let first = [BINARY_HEAD, &b"\0\x01\xff\xff\xff\xff"[..]].concat();
        assert_eq!(rows.row(&first), Ok(Some(&first[19..])));
        let second = b"\0\x01\0\0\0\0";
        assert_eq!(rows.row(second), Ok(Some(&second[..])));
        assert_eq!(rows.row(&BINARY_END), Ok(None));
        assert_eq!(rows.row(second), Err(CopyRowError::Binary));
    }

    #[test]
    fn a_binary_copy_of_nothing_is_a_head_and_an_end() {
        let mut rows = Rows::BinaryHead;
        let all = [BINARY_HEAD, &BINARY_END[..]].concat();
        assert_eq!(rows.row(&all), Ok(None));
        let mut apart = Rows::BinaryHead;
        assert_eq!(apart.row(BINARY_HEAD), Ok(None));
        assert_eq!(apart.row(&BINARY_END), Ok(None));
        assert_eq!(Rows::BinaryHead.row(b"1\t2\n"), Err(CopyRowError::Binary));
    }
}
