//! How a value is written for `COPY .. FROM STDIN (FORMAT binary)`.

use millrace_event::BinaryType;

use super::Form;
use super::form::nibble;

/// The binary form of a type's values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    /// One of those that parameters may have, too.
    Form(Form),
    /// The text itself.
    Text,
    /// The text behind the number of its format.
    Jsonb,
    /// Digits to the base of 10,000.
    Numeric,
    /// The bytes that the text has in hexadecimal digits.
    Bytea,
}

/// The decimal digits of one digit of a numeric.
const DIGITS: usize = 4;

/// More decimal digits than fit the number of those behind the point that a numeric stores are left to the server.
const NUMERIC_TEXT_MAX: usize = 16_000;

impl Wire {
    /// The form of a type's values; the type as `format_type` prints it, without a modifier. `None` where it is
    /// not known here.
    #[must_use]
    pub fn of(type_name: &str) -> Option<Self> {
        match type_name {
            "text" | "character varying" | "bpchar" | "json" => Some(Self::Text),
            "jsonb" => Some(Self::Jsonb),
            "numeric" => Some(Self::Numeric),
            "bytea" => Some(Self::Bytea),
            other => match Form::of(other) {
                Form::Text => None,
                form => Some(Self::Form(form)),
            },
        }
    }

    /// Appends the value's length and bytes. `None` where the text is not in the type's usual shape; `out` may
    /// then end in a part of it.
    #[must_use]
    pub fn write(self, text: &[u8], out: &mut Vec<u8>) -> Option<()> {
        match self {
            Self::Form(form) => form.write(text, out),
            Self::Text => put(&[text], out),
            Self::Jsonb => put(&[&[1], text], out),
            Self::Numeric => numeric(text, out),
            Self::Bytea => bytea(text, out),
        }
    }

    /// Whether values that the source wrote in its binary form are in this one already.
    #[must_use]
    pub fn takes(self, source: BinaryType) -> bool {
        source
            == match self {
                Self::Text => BinaryType::Text,
                Self::Jsonb => BinaryType::Jsonb,
                Self::Numeric => BinaryType::Numeric,
                Self::Bytea => BinaryType::Bytea,
                Self::Form(form) => match form {
                    Form::Text => return false,
                    Form::Bool => BinaryType::Bool,
                    Form::Int2 => BinaryType::Int2,
                    Form::Int4 => BinaryType::Int4,
                    Form::Int8 => BinaryType::Int8,
                    Form::Uuid => BinaryType::Uuid,
                    Form::Date => BinaryType::Date,
                    Form::Timestamp => BinaryType::Timestamp,
                    Form::TimestampTz => BinaryType::TimestampTz,
                },
            }
    }
}

fn put(parts: &[&[u8]], out: &mut Vec<u8>) -> Option<()> {
    let length = parts.iter().map(|part| part.len()).sum::<usize>();
    out.extend_from_slice(&i32::try_from(length).ok()?.to_be_bytes());
    for part in parts {
        out.extend_from_slice(part);
    }
    Some(())
}

/// `\x` and lower-case hexadecimal digits.
fn bytea(text: &[u8], out: &mut Vec<u8>) -> Option<()> {
    let digits = text.strip_prefix(b"\\x")?;
    let (pairs, []) = digits.as_chunks::<2>() else {
        return None;
    };
    out.extend_from_slice(&i32::try_from(pairs.len()).ok()?.to_be_bytes());
    for [high, low] in pairs {
        out.push(nibble(*high)? << 4 | nibble(*low)?);
    }
    Some(())
}

/// Digits with a point perhaps, behind a minus perhaps.
fn numeric(text: &[u8], out: &mut Vec<u8>) -> Option<()> {
    let (sign, text): (u16, _) = match text {
        [b'-', text @ ..] => (0x4000, text),
        text => (0, text),
    };
    if text.len() > NUMERIC_TEXT_MAX {
        return None;
    }
    let point = text.iter().position(|byte| *byte == b'.');
    let (whole, fraction) = match point {
        Some(at) => (text.get(..at)?, text.get(at + 1..)?),
        None => (text, &[][..]),
    };
    if whole.is_empty() || (point.is_some() && fraction.is_empty()) {
        return None;
    }
    let start = out.len();
    out.extend_from_slice(&[0; 12]);
    // The digits before the point end at it, those behind it begin there.
    let head = whole.len() % DIGITS;
    let (first, rest) = whole.split_at(head);
    let mut weight = i16::try_from(whole.len().div_ceil(DIGITS)).ok()? - 1;
    let mut count = 0_i16;
    let mut last = 0_i16;
    let mut digit = |group: &[u8]| {
        let mut sum = 0_u16;
        for at in 0..DIGITS {
            let byte = group.get(at).copied().unwrap_or(b'0');
            if !byte.is_ascii_digit() {
                return None;
            }
            sum = sum * 10 + u16::from(byte - b'0');
        }
        if count == 0 && sum == 0 {
            weight -= 1;
            return Some(());
        }
        out.extend_from_slice(&sum.to_be_bytes());
        count += 1;
        if sum != 0 {
            last = count;
        }
        Some(())
    };
    if !first.is_empty() {
        let mut padded = [b'0'; DIGITS];
        padded[DIGITS - head..].copy_from_slice(first);
        digit(&padded)?;
    }
    for group in rest.chunks(DIGITS).chain(fraction.chunks(DIGITS)) {
        digit(group)?;
    }
    let (sign, weight) = if last == 0 { (0, 0) } else { (sign, weight) };
    out.truncate(start + 12 + 2 * usize::try_from(last).ok()?);
    let scale = u16::try_from(fraction.len()).ok()?;
    let head = out.get_mut(start..start + 12)?;
    head[..4].copy_from_slice(&i32::from(8 + 2 * last).to_be_bytes());
    head[4..6].copy_from_slice(&last.to_be_bytes());
    head[6..8].copy_from_slice(&weight.to_be_bytes());
    head[8..10].copy_from_slice(&sign.to_be_bytes());
    head[10..].copy_from_slice(&scale.to_be_bytes());
    Some(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn written(wire: Wire, text: &str) -> Option<Vec<u8>> {
        let mut out = b"before".to_vec();
        wire.write(text.as_bytes(), &mut out)?;
        assert!(out.starts_with(b"before"));
        let length = i32::from_be_bytes(out[6..10].try_into().unwrap());
        assert_eq!(usize::try_from(length).unwrap(), out.len() - 10);
        Some(out.split_off(10))
    }

    /// Number of digits, weight, sign, scale, digits.
    fn numeric(text: &str) -> Option<Vec<i64>> {
        let bytes = written(Wire::Numeric, text)?;
        let words = bytes
            .chunks(2)
            .map(|pair| i16::from_be_bytes([pair[0], pair[1]]));
        Some(words.map(i64::from).collect())
    }

    #[test]
    fn numerics_are_what_numeric_send_writes() {
        assert_eq!(numeric("0"), Some(vec![0, 0, 0, 0]));
        assert_eq!(numeric("-0.00"), Some(vec![0, 0, 0, 2]));
        assert_eq!(numeric("1"), Some(vec![1, 0, 0, 0, 1]));
        assert_eq!(
            numeric("-12345.6"),
            Some(vec![3, 1, 0x4000, 1, 1, 2345, 6000])
        );
        assert_eq!(numeric("0.05"), Some(vec![1, -1, 0, 2, 500]));
        assert_eq!(numeric("0.00000100"), Some(vec![1, -2, 0, 8, 100]));
        assert_eq!(numeric("100000000"), Some(vec![1, 2, 0, 0, 1]));
        assert_eq!(
            numeric("10000.00001"),
            Some(vec![4, 1, 0, 5, 1, 0, 0, 1000])
        );
    }

    #[test]
    fn what_is_no_plain_number_is_left_to_the_server() {
        for text in [
            "NaN",
            "Infinity",
            "-Infinity",
            "",
            "-",
            ".5",
            "5.",
            "1e5",
            "+1",
            " 1",
            "1.2.3",
        ] {
            assert_eq!(numeric(text), None, "{text:?}");
        }
        assert_eq!(numeric(&"1".repeat(NUMERIC_TEXT_MAX + 1)), None);
    }

    #[test]
    fn texts_go_as_they_are() {
        assert_eq!(written(Wire::Text, "é").unwrap(), "é".as_bytes());
        assert_eq!(written(Wire::Jsonb, "{}").unwrap(), b"\x01{}");
        assert_eq!(Wire::of("text[]"), None);
        assert_eq!(Wire::of("bigint"), Some(Wire::Form(Form::Int8)));
    }

    #[test]
    fn bytes_go_without_their_digits() {
        let bytes = |text| written(Wire::of("bytea").unwrap(), text);
        assert_eq!(bytes("\\x00abff"), Some(vec![0, 0xAB, 0xFF]));
        assert_eq!(bytes("\\x"), Some(vec![]));
        for text in ["", "abc", "\\x0", "\\x0G", "\\xAB", "\\000"] {
            assert_eq!(bytes(text), None, "{text:?}");
        }
    }

    #[test]
    fn a_form_takes_only_what_is_its_own() {
        let types = [
            (16, "boolean"),
            (17, "bytea"),
            (20, "bigint"),
            (21, "smallint"),
            (23, "integer"),
            (25, "text"),
            (114, "json"),
            (1042, "bpchar"),
            (1043, "character varying"),
            (1082, "date"),
            (1114, "timestamp without time zone"),
            (1184, "timestamp with time zone"),
            (1700, "numeric"),
            (2950, "uuid"),
            (3802, "jsonb"),
        ];
        for (oid, name) in types {
            for (other, _) in types {
                let is_text = |oid| matches!(oid, 25 | 114 | 1042 | 1043);
                let is_same = oid == other || (is_text(oid) && is_text(other));
                let takes = Wire::of(name)
                    .unwrap()
                    .takes(BinaryType::of(other).unwrap());
                assert_eq!(takes, is_same, "{name} {other}");
            }
        }
    }

    proptest! {
        #[test]
        fn a_numeric_keeps_its_value(whole in "0|[1-9][0-9]{0,30}", fraction in "[0-9]{0,30}", minus in any::<bool>()) {
            let point = if fraction.is_empty() { "" } else { "." };
            let text = format!("{}{whole}{point}{fraction}", if minus { "-" } else { "" });
            let words = numeric(&text).unwrap();
            let mut buffer = Vec::new();
            let bytes = written(Wire::Numeric, &text).unwrap();
            let read = BinaryType::Numeric.text(&bytes, &mut buffer).unwrap();
            let shown = if text.trim_matches(['-', '.', '0']).is_empty() { text.trim_start_matches('-') } else { &text };
            prop_assert_eq!(std::str::from_utf8(read).unwrap(), shown);
            let (count, weight, digits) = (words[0], words[1], &words[4..]);
            prop_assert_eq!(count, digits.len() as i64);
            prop_assert_eq!(words[3], fraction.len() as i64);
            prop_assert!(digits.first() != Some(&0) && digits.last() != Some(&0));
            // The digits around the point again, each behind its power of 10,000.
            let of = |power: i64| {
                let at = usize::try_from(weight - power).ok();
                at.and_then(|at| digits.get(at)).copied().unwrap_or(0)
            };
            let left: String = (0..8).rev().map(|power| format!("{:04}", of(power))).collect();
            let right: String = (1..9).map(|power| format!("{:04}", of(-power))).collect();
            prop_assert_eq!(left.trim_start_matches('0'), whole.trim_start_matches('0'));
            prop_assert_eq!(right.trim_end_matches('0'), fraction.trim_end_matches('0'));
        }
    }
}
