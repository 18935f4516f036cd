//! How a column's values travel to the target: as text that the server casts, or in its own binary form.
//!
//! The binary form spares the server a text and a call of the type's input function for each value. It is used
//! only where the text is what the server itself prints for exactly one value, in its usual shape. Whatever
//! else there is, such as `infinity`, a year before 1 or after 9999, or a text that the type would refuse,
//! makes the column travel as text.

/// How the values of one column of a statement travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// As they are.
    Text,
    /// One byte.
    Bool,
    /// Two bytes.
    Int2,
    /// Four bytes.
    Int4,
    /// Eight bytes.
    Int8,
    /// Sixteen bytes.
    Uuid,
    /// Days since 2000-01-01.
    Date,
    /// Microseconds since 2000-01-01 00:00:00.
    Timestamp,
    /// Microseconds since 2000-01-01 00:00:00+00.
    TimestampTz,
}

const SECOND_US: i64 = 1_000_000;
const DAY_US: i64 = 86_400 * SECOND_US;

/// A number of so many digits is an `i64` whatever they are.
const SAFE_DIGITS: usize = 18;

/// Digits of a second's fraction at most.
const FRACTION_DIGITS: usize = 6;

impl Form {
    /// The form that values of a type may have; the type as `format_type` prints it, without a modifier.
    #[must_use]
    pub fn of(type_name: &str) -> Self {
        match type_name {
            "boolean" => Self::Bool,
            "smallint" => Self::Int2,
            "integer" => Self::Int4,
            "bigint" => Self::Int8,
            "uuid" => Self::Uuid,
            "date" => Self::Date,
            "timestamp without time zone" => Self::Timestamp,
            "timestamp with time zone" => Self::TimestampTz,
            _ => Self::Text,
        }
    }

    /// The type's name in SQL.
    #[must_use]
    pub fn type_name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Bool => "boolean",
            Self::Int2 => "smallint",
            Self::Int4 => "integer",
            Self::Int8 => "bigint",
            Self::Uuid => "uuid",
            Self::Date => "date",
            Self::Timestamp => "timestamp",
            Self::TimestampTz => "timestamptz",
        }
    }

    /// Appends the value's length and bytes to an array. `None`, and nothing appended, where the text is not
    /// in the type's usual shape.
    #[must_use]
    pub fn write(self, text: &[u8], out: &mut Vec<u8>) -> Option<()> {
        match self {
            Self::Text => {
                put(&i32::try_from(text.len()).ok()?.to_be_bytes(), out);
                out.extend_from_slice(text);
            }
            Self::Bool => value([u8::from(boolean(text)?)], out),
            Self::Int2 => value(i16::try_from(integer(text)?).ok()?.to_be_bytes(), out),
            Self::Int4 => value(i32::try_from(integer(text)?).ok()?.to_be_bytes(), out),
            Self::Int8 => value(integer(text)?.to_be_bytes(), out),
            Self::Uuid => value(uuid(text)?, out),
            Self::Date => {
                let ([], days) = date(text)? else { return None };
                value(days.to_be_bytes(), out);
            }
            Self::Timestamp => value(timestamp(text)?.to_be_bytes(), out),
            Self::TimestampTz => {
                value(timestamp(text.strip_suffix(b"+00")?)?.to_be_bytes(), out);
            }
        }
        Some(())
    }
}

fn put(bytes: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(bytes);
}

fn value<const N: usize>(bytes: [u8; N], out: &mut Vec<u8>) {
    put(&(N as i32).to_be_bytes(), out);
    put(&bytes, out);
}

fn boolean(text: &[u8]) -> Option<bool> {
    match text {
        b"t" | b"true" => Some(true),
        b"f" | b"false" => Some(false),
        _ => None,
    }
}

/// Digits alone, perhaps behind a minus.
fn integer(text: &[u8]) -> Option<i64> {
    let (negative, digits) = match text {
        [b'-', digits @ ..] => (true, digits),
        digits => (false, digits),
    };
    if digits.is_empty() {
        return None;
    }
    let mut number = 0_i64;
    if digits.len() <= SAFE_DIGITS {
        for digit in digits {
            number = number * 10 + i64::from(decimal(*digit)?);
        }
        return Some(if negative { -number } else { number });
    }
    for digit in digits {
        // Towards the sign, because the lowest number has no positive counterpart.
        let digit = i64::from(decimal(*digit)?);
        number = number.checked_mul(10)?;
        number = if negative {
            number.checked_sub(digit)?
        } else {
            number.checked_add(digit)?
        };
    }
    Some(number)
}

fn decimal(digit: u8) -> Option<u8> {
    digit.is_ascii_digit().then(|| digit - b'0')
}

/// Lower-case digits in groups of 8, 4, 4, 4 and 12.
fn uuid(text: &[u8]) -> Option<[u8; 16]> {
    let text: &[u8; 36] = text.try_into().ok()?;
    let (mut bytes, mut at) = ([0; 16], 0);
    for byte in &mut bytes {
        if matches!(at, 8 | 13 | 18 | 23) {
            if text[at] != b'-' {
                return None;
            }
            at += 1;
        }
        *byte = nibble(text[at])? << 4 | nibble(text[at + 1])?;
        at += 2;
    }
    Some(bytes)
}

pub(super) fn nibble(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    }
}

/// Takes a number of exactly `N` digits from the front, for `N` up to 9.
fn number<const N: usize>(text: &[u8]) -> Option<(&[u8], u32)> {
    let (digits, rest) = text.split_first_chunk::<N>()?;
    let mut sum = 0;
    for digit in digits {
        sum = sum * 10 + u32::from(decimal(*digit)?);
    }
    Some((rest, sum))
}

fn skip(text: &[u8], byte: u8) -> Option<&[u8]> {
    text.strip_prefix(&[byte])
}

/// Takes `YYYY-MM-DD` from the front, as days since 2000-01-01.
fn date(text: &[u8]) -> Option<(&[u8], i32)> {
    let (text, year) = number::<4>(text)?;
    let (text, month) = number::<2>(skip(text, b'-')?)?;
    let (text, day) = number::<2>(skip(text, b'-')?)?;
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let in_month = match month {
        2 => 28 + u32::from(leap),
        4 | 6 | 9 | 11 => 30,
        1..=12 => 31,
        _ => return None,
    };
    if year == 0 || !(1..=in_month).contains(&day) {
        return None;
    }
    // Years that begin in March have their leap day at the end.
    let (year, month) = if month > 2 {
        (year, month - 3)
    } else {
        (year - 1, month + 9)
    };
    let days = 365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day - 1;
    /// The same sum for 2000-01-01.
    const EPOCH: i32 = 730_425;
    Some((text, days as i32 - EPOCH))
}

/// `YYYY-MM-DD HH:MM:SS`, perhaps with a fraction, as microseconds since 2000-01-01.
fn timestamp(text: &[u8]) -> Option<i64> {
    let (text, days) = date(text)?;
    let (text, hour) = number::<2>(skip(text, b' ')?)?;
    let (text, minute) = number::<2>(skip(text, b':')?)?;
    let (text, second) = number::<2>(skip(text, b':')?)?;
    if hour > 23 || minute > 59 || second > 59 {
        return None;
    }
    let mut fraction = 0;
    if !text.is_empty() {
        let digits = skip(text, b'.')?;
        if digits.is_empty() || digits.len() > FRACTION_DIGITS {
            return None;
        }
        for at in 0..FRACTION_DIGITS {
            let digit = digits.get(at).map_or(Some(0), |digit| decimal(*digit))?;
            fraction = fraction * 10 + u32::from(digit);
        }
    }
    let seconds = i64::from((hour * 60 + minute) * 60 + second);
    Some(i64::from(days) * DAY_US + seconds * SECOND_US + i64::from(fraction))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(form: Form, text: &str) -> Option<Vec<u8>> {
        let mut out = Vec::new();
        let written = form.write(text.as_bytes(), &mut out);
        assert!(written.is_some() || out.is_empty(), "{form:?} {text:?}");
        written.map(|()| out)
    }

    fn value_of(form: Form, text: &str) -> Option<i64> {
        let bytes = written(form, text)?;
        let mut eight = [0; 8];
        eight[8 - (bytes.len() - 4)..].copy_from_slice(&bytes[4..]);
        Some(i64::from_be_bytes(eight))
    }

    #[test]
    fn what_the_server_prints_is_the_same_value() {
        assert_eq!(
            written(Form::Int2, "-32768"),
            Some([&2_i32.to_be_bytes()[..], &i16::MIN.to_be_bytes()[..]].concat())
        );
        assert_eq!(
            written(Form::Int4, "-1"),
            Some([0, 0, 0, 4, 255, 255, 255, 255].to_vec())
        );
        for number in [i64::MIN, i64::MIN + 1, -1, 0, 1, i64::MAX] {
            assert_eq!(value_of(Form::Int8, &number.to_string()), Some(number));
        }
        assert_eq!(value_of(Form::Bool, "t"), Some(1));
        assert_eq!(value_of(Form::Bool, "false"), Some(0));
        assert_eq!(
            written(Form::Uuid, "00010203-0405-0607-0809-0a0b0c0dfeff"),
            Some(
                [
                    0, 0, 0, 16, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 254, 255
                ]
                .to_vec()
            )
        );
        assert_eq!(value_of(Form::Date, "2000-01-01"), Some(0));
        assert_eq!(value_of(Form::Date, "2000-03-01"), Some(60));
        assert_eq!(
            value_of(Form::Timestamp, "2000-01-02 00:00:00.5"),
            Some(DAY_US + 500_000)
        );
        assert_eq!(
            value_of(Form::TimestampTz, "1999-12-31 23:59:59.999999+00"),
            Some(-1)
        );
        // SELECT extract(epoch FROM timestamptz '..') * 1000000 - 946684800000000
        assert_eq!(
            value_of(Form::TimestampTz, "2026-11-21 08:40:51.000001+00"),
            Some(848_565_651_000_001)
        );
    }

    #[test]
    fn anything_else_travels_as_text() {
        for (form, texts) in [
            (Form::Bool, &["", "T", "yes", "1", "tr"][..]),
            (Form::Int2, &["32768", "-32769", "+1", " 1", "1 ", "1_0"]),
            (Form::Int4, &["2147483648", "", "-", "0x1", "1.0", "1e3"]),
            (
                Form::Int8,
                &[
                    "9223372036854775808",
                    "-9223372036854775809",
                    "99999999999999999999",
                ],
            ),
            (
                Form::Uuid,
                &[
                    "",
                    "000102030405060708090a0b0c0dfeff",
                    "{00010203-0405-0607-0809-0a0b0c0dfeff}",
                    "00010203-0405-0607-0809-0A0b0c0dfeff",
                    "00010203-0405-0607-08090a0b0c0dfeff-",
                ],
            ),
            (
                Form::Date,
                &[
                    "infinity",
                    "-infinity",
                    "0044-03-15 BC",
                    "10000-01-01",
                    "0000-01-01",
                    "1900-02-29",
                    "2001-04-31",
                    "2001-00-01",
                    "2001-13-01",
                    "2001-01-00",
                    "2001-1-1",
                    "2001-01-01 ",
                    "01-01-2001",
                ],
            ),
            (
                Form::Timestamp,
                &[
                    "infinity",
                    "2001-01-01",
                    "2001-01-01 24:00:00",
                    "2001-01-01 00:60:00",
                    "2001-01-01 00:00:60",
                    "2001-01-01 00:00:00.",
                    "2001-01-01 00:00:00.1234567",
                    "2001-01-01 00:00:00.1a",
                    "2001-01-01 00:00:00 BC",
                    "2001-01-01 00:00:00+00",
                    "2001-01-01T00:00:00",
                ],
            ),
            (
                Form::TimestampTz,
                &[
                    "2001-01-01 00:00:00",
                    "2001-01-01 00:00:00+01",
                    "2001-01-01 00:00:00-00",
                    "2001-01-01 00:00:00+00 BC",
                    "2001-01-01 00:00:00+00:30",
                    "infinity",
                ],
            ),
        ] {
            for text in texts {
                assert_eq!(written(form, text), None, "{form:?} {text:?}");
            }
        }
    }

    #[test]
    fn every_day_is_one_after_the_day_before() {
        let mut expected = -730_119;
        for year in 1..=9999_u32 {
            for month in 1..=12 {
                for day in 1..=31 {
                    let text = format!("{year:04}-{month:02}-{day:02}");
                    if let Some(days) = date(text.as_bytes()) {
                        assert_eq!(days, (&[][..], expected), "{text}");
                        expected += 1;
                    }
                }
            }
        }
        // The day behind the last.
        assert_eq!(expected, 2_921_940);
    }

    #[test]
    fn only_types_without_anything_special_have_a_binary_form() {
        for form in [
            "boolean",
            "smallint",
            "integer",
            "bigint",
            "uuid",
            "date",
            "timestamp without time zone",
            "timestamp with time zone",
        ] {
            assert_ne!(Form::of(form), Form::Text, "{form}");
        }
        for text in [
            "shop.small",
            "integer[]",
            "numeric",
            "text",
            "jsonb",
            "\"char\"",
        ] {
            assert_eq!(Form::of(text), Form::Text, "{text}");
        }
    }
}
