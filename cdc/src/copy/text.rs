//! Rows of `COPY .. TO STDOUT` in text format.
//!
//! Pure. A field's text is the value's own, as the stream carries it, once COPY's escapes are undone.

use millrace_event::{Datum, escape_load_value, load_fields, load_value};

/// A row that is not in COPY's text format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("row is not in COPY's text format")]
pub(crate) struct CopyTextError;

#[derive(Clone, Copy, Debug)]
enum Field {
    Null,
    Text { start: usize, end: usize },
}

/// Splits rows into values, in a buffer that is used again for each row.
#[derive(Debug, Default)]
pub(crate) struct CopyRow {
    text: Vec<u8>,
    fields: Vec<Field>,
}

impl CopyRow {
    /// Reads one row, with its newline or without.
    ///
    /// # Errors
    /// The bytes are not a row.
    pub(crate) fn read(&mut self, line: &[u8]) -> Result<(), CopyTextError> {
        self.text.clear();
        self.fields.clear();
        let line = line.strip_suffix(b"\n").unwrap_or(line);
        let mut buffer = Vec::new();
        for field in load_fields(line) {
            let value = load_value(field, &mut buffer).map_err(|_| CopyTextError)?;
            self.fields.push(match value {
                None => Field::Null,
                Some(text) => {
                    let start = self.text.len();
                    self.text.extend_from_slice(text);
                    Field::Text {
                        start,
                        end: self.text.len(),
                    }
                }
            });
        }
        Ok(())
    }

    /// The row's values.
    pub(crate) fn data(&self) -> impl Iterator<Item = Datum<'_>> {
        self.fields.iter().map(|field| match *field {
            Field::Null => Datum::Null,
            Field::Text { start, end } => {
                Datum::Text(self.text.get(start..end).unwrap_or_default())
            }
        })
    }
}

/// Appends a row with its newline. A value that is not known becomes NULL; a snapshot knows them all.
pub(crate) fn write_row(out: &mut Vec<u8>, row: &[Datum<'_>]) {
    for (at, datum) in row.iter().enumerate() {
        if at > 0 {
            out.push(b'\t');
        }
        match datum {
            Datum::Null | Datum::Unchanged => out.extend_from_slice(b"\\N"),
            Datum::Text(text) => escape_load_value(text, out),
        }
    }
    out.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn null_and_empty_and_the_text_backslash_n_are_three_values() {
        let mut row = CopyRow::default();
        row.read(b"\\N\t\t\\\\N\n").unwrap();
        let values: Vec<_> = row.data().collect();
        assert_eq!(values, [Datum::Null, Datum::Text(b""), Datum::Text(b"\\N")]);
    }

    #[test]
    fn what_copy_does_not_write_is_refused() {
        for line in [&b"a\\"[..], b"\\x41", b"\\q"] {
            assert_eq!(
                CopyRow::default().read(line),
                Err(CopyTextError),
                "{line:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn any_row_survives(row in prop::collection::vec(prop::option::of(".*"), 1..6)) {
            let expected: Vec<_> = row
                .iter()
                .map(|field| field.as_ref().map_or(Datum::Null, |text| Datum::Text(text.as_bytes())))
                .collect();
            let mut line = Vec::new();
            write_row(&mut line, &expected);
            let mut read = CopyRow::default();
            read.read(&line).unwrap();
            let values: Vec<_> = read.data().collect();
            prop_assert_eq!(values, expected);
        }
    }
}
