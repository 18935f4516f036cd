//! Rows of `COPY .. TO STDOUT` in text format.

use super::LoadError;

/// Takes a row from the front: the row without its newline, and what follows it.
pub(super) fn row(rows: &[u8]) -> (&[u8], &[u8]) {
    let end = memchr::memchr(b'\n', rows).unwrap_or(rows.len());
    let (row, after) = rows.split_at(end);
    (row, after.get(1..).unwrap_or_default())
}

/// How many rows there are.
pub(super) fn count(rows: &[u8]) -> usize {
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

/// Appends a value as COPY writes it.
pub fn escape_load_value(value: &[u8], out: &mut Vec<u8>) {
    for byte in value {
        let code = match byte {
            8 => b'b',
            b'\t' => b't',
            b'\n' => b'n',
            11 => b'v',
            12 => b'f',
            b'\r' => b'r',
            b'\\' => b'\\',
            other => {
                out.push(*other);
                continue;
            }
        };
        out.extend_from_slice(&[b'\\', code]);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn values(row: &[u8]) -> Result<Vec<Option<Vec<u8>>>, LoadError> {
        let mut buffer = Vec::new();
        load_fields(row)
            .map(|field| Ok(load_value(field, &mut buffer)?.map(<[u8]>::to_vec)))
            .collect()
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

    proptest! {
        #[test]
        fn any_row_survives(row in prop::collection::vec(prop::option::of(".*"), 1..6)) {
            let escape = |text: &String| {
                let mut out = Vec::new();
                escape_load_value(text.as_bytes(), &mut out);
                String::from_utf8(out).unwrap()
            };
            let fields: Vec<String> = row
                .iter()
                .map(|field| field.as_ref().map_or("\\N".to_owned(), escape))
                .collect();
            let line = format!("{}\n", fields.join("\t"));
            let (first, rest) = super::row(line.as_bytes());
            prop_assert_eq!((rest, count(line.as_bytes())), (&[][..], 1));
            let expected: Vec<_> = row.iter().map(|field| field.as_ref().map(|text| text.clone().into_bytes())).collect();
            prop_assert_eq!(values(first).unwrap(), expected);
        }
    }
}
