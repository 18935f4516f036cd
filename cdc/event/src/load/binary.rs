//! Rows of `COPY .. TO STDOUT (FORMAT binary)`: a number of fields, then each field's length and bytes. The length of
//! NULL is -1.

use super::LoadError;

/// What begins the rows of a `COPY`: signature, flags, the length of an extension that there is none of.
pub const BINARY_HEAD: &[u8; 19] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";

/// What ends them.
pub const BINARY_END: [u8; 2] = (-1_i16).to_be_bytes();

/// The length of a field that is NULL.
pub const BINARY_NULL: [u8; 4] = (-1_i32).to_be_bytes();

/// Takes a row of so many fields from the front: the row, and what follows it.
///
/// # Errors
/// There is none.
pub fn binary_row(rows: &[u8], columns: usize) -> Result<(&[u8], &[u8]), LoadError> {
    let (count, mut rest) = rows.split_first_chunk().ok_or(LoadError::Row)?;
    if usize::try_from(i16::from_be_bytes(*count)) != Ok(columns) {
        return Err(LoadError::Row);
    }
    for _ in 0..columns {
        (_, rest) = binary_field(rest)?;
    }
    Ok(rows.split_at(rows.len() - rest.len()))
}

/// Takes a field from the front: its bytes, `None` for NULL, and what follows it. The first is behind the row's
/// first two bytes.
///
/// # Errors
/// There is none.
pub fn binary_field(row: &[u8]) -> Result<(Option<&[u8]>, &[u8]), LoadError> {
    let (length, rest) = row.split_first_chunk().ok_or(LoadError::Row)?;
    if *length == BINARY_NULL {
        return Ok((None, rest));
    }
    let length = usize::try_from(i32::from_be_bytes(*length)).map_err(|_| LoadError::Row)?;
    let (bytes, rest) = rest.split_at_checked(length).ok_or(LoadError::Row)?;
    Ok((Some(bytes), rest))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn row(fields: &[Option<Vec<u8>>]) -> Vec<u8> {
        let mut row = (fields.len() as i16).to_be_bytes().to_vec();
        for field in fields {
            match field {
                None => row.extend_from_slice(&BINARY_NULL),
                Some(bytes) => {
                    row.extend_from_slice(&(bytes.len() as i32).to_be_bytes());
                    row.extend_from_slice(bytes);
                }
            }
        }
        row
    }

    #[test]
    fn what_is_no_row_is_refused() {
        let whole = row(&[Some(b"abc".to_vec()), None]);
        assert!(binary_row(&whole, 2).is_ok());
        assert!(binary_row(&whole, 1).is_err() && binary_row(&whole, 3).is_err());
        assert!(binary_row(&BINARY_END, 2).is_err());
        for end in 0..whole.len() {
            assert!(binary_row(&whole[..end], 2).is_err(), "{end}");
        }
        let negative = [&1_i16.to_be_bytes()[..], &(-2_i32).to_be_bytes()].concat();
        assert!(binary_row(&negative, 1).is_err());
    }

    proptest! {
        #[test]
        fn any_row_survives(
            fields in prop::collection::vec(prop::option::of(prop::collection::vec(any::<u8>(), 0..9)), 0..6),
            behind in prop::collection::vec(any::<u8>(), 0..9),
        ) {
            let written = row(&fields);
            let rows = [&written[..], &behind].concat();
            let (read, rest) = binary_row(&rows, fields.len()).unwrap();
            prop_assert_eq!((read, rest), (&written[..], &behind[..]));
            let mut rest = &read[2..];
            for field in &fields {
                let (bytes, after) = binary_field(rest).unwrap();
                prop_assert_eq!(bytes, field.as_deref());
                rest = after;
            }
            prop_assert!(rest.is_empty());
        }
    }
}
