//! The built-in types whose binary form is known here, and the way from it to the text that Postgres prints.

use std::io::Write as _;

use super::LoadError;

/// A type whose values may travel in binary form.
///
/// Those of which Postgres' text cannot be had again digit for digit, as of `real`, are not among them: where the target
/// has a column of another type, or a row must be written alone, the text is what counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BinaryType {
    /// One byte, 0 or 1.
    Bool,
    /// Two bytes.
    Int2,
    /// Four bytes.
    Int4,
    /// Eight bytes.
    Int8,
    /// The text itself: `text`, `varchar`, `char(n)`, `json`.
    Text,
    /// The text behind the number of its format, 1.
    Jsonb,
    /// Digits to the base of 10,000.
    Numeric,
    /// The bytes themselves.
    Bytea,
    /// Sixteen bytes.
    Uuid,
    /// Days since 2000-01-01.
    Date,
    /// Microseconds since 2000-01-01 00:00:00.
    Timestamp,
    /// Microseconds since 2000-01-01 00:00:00+00.
    TimestampTz,
}

const SECOND_US: u64 = 1_000_000;
const DAY_US: i64 = 86_400 * SECOND_US as i64;

/// The sign and special values of a numeric.
const NUMERIC_NEGATIVE: u16 = 0x4000;
const NUMERIC_NAN: u16 = 0xC000;
const NUMERIC_INFINITY: u16 = 0xD000;
const NUMERIC_MINUS_INFINITY: u16 = 0xF000;

/// Digits of one digit of a numeric to the base of 10,000.
const NUMERIC_BASE_DIGITS: usize = 4;
const NUMERIC_BASE: u16 = 10_000;

impl BinaryType {
    /// The OIDs of all types that have one.
    pub const TYPE_OIDS: [u32; 15] = [
        16, 17, 20, 21, 23, 25, 114, 1042, 1043, 1082, 1114, 1184, 1700, 2950, 3802,
    ];

    /// Of the built-in type that has this OID.
    #[must_use]
    pub const fn of(type_oid: u32) -> Option<Self> {
        Some(match type_oid {
            16 => Self::Bool,
            17 => Self::Bytea,
            20 => Self::Int8,
            21 => Self::Int2,
            23 => Self::Int4,
            25 | 114 | 1042 | 1043 => Self::Text,
            1082 => Self::Date,
            1114 => Self::Timestamp,
            1184 => Self::TimestampTz,
            1700 => Self::Numeric,
            2950 => Self::Uuid,
            3802 => Self::Jsonb,
            _ => return None,
        })
    }

    /// The text of a value, as Postgres prints it. `buffer` holds it where the bytes are not the text already.
    ///
    /// # Errors
    /// The bytes are no value of the type.
    pub fn text<'a>(self, bytes: &'a [u8], buffer: &'a mut Vec<u8>) -> Result<&'a [u8], LoadError> {
        match self {
            Self::Text => return Ok(bytes),
            Self::Jsonb => return bytes.strip_prefix(&[1]).ok_or(LoadError::Row),
            _ => buffer.clear(),
        }
        match self {
            Self::Text | Self::Jsonb => unreachable!("is the text already"),
            Self::Bool => match bytes {
                [0] => buffer.push(b'f'),
                [1] => buffer.push(b't'),
                _ => return Err(LoadError::Row),
            },
            Self::Int2 => print(buffer, i16::from_be_bytes(exactly(bytes)?)),
            Self::Int4 => print(buffer, i32::from_be_bytes(exactly(bytes)?)),
            Self::Int8 => print(buffer, i64::from_be_bytes(exactly(bytes)?)),
            Self::Numeric => numeric(bytes, buffer).ok_or(LoadError::Row)?,
            Self::Bytea => {
                buffer.extend_from_slice(b"\\x");
                bytes.iter().for_each(|byte| hex(buffer, *byte));
            }
            Self::Uuid => {
                for (at, byte) in exactly::<16>(bytes)?.iter().enumerate() {
                    if matches!(at, 4 | 6 | 8 | 10) {
                        buffer.push(b'-');
                    }
                    hex(buffer, *byte);
                }
            }
            Self::Date => match i32::from_be_bytes(exactly(bytes)?) {
                i32::MAX => buffer.extend_from_slice(b"infinity"),
                i32::MIN => buffer.extend_from_slice(b"-infinity"),
                days => {
                    let is_before_christ = date(buffer, days.into());
                    era(buffer, is_before_christ);
                }
            },
            Self::Timestamp => timestamp(buffer, i64::from_be_bytes(exactly(bytes)?), b""),
            Self::TimestampTz => timestamp(buffer, i64::from_be_bytes(exactly(bytes)?), b"+00"),
        }
        Ok(buffer)
    }
}

fn exactly<const N: usize>(bytes: &[u8]) -> Result<[u8; N], LoadError> {
    bytes.try_into().map_err(|_| LoadError::Row)
}

fn print(out: &mut Vec<u8>, number: impl itoa::Integer) {
    out.extend_from_slice(itoa::Buffer::new().format(number).as_bytes());
}

fn hex(out: &mut Vec<u8>, byte: u8) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    out.push(DIGITS[usize::from(byte >> 4)]);
    out.push(DIGITS[usize::from(byte & 15)]);
}

/// Appends `YYYY-MM-DD`; returns whether the year is one before Christ.
fn date(out: &mut Vec<u8>, days: i64) -> bool {
    // Days since 0000-03-01: years that begin in March have their leap day at the end.
    let days = days + 730_425;
    let (era, day) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 {
        (month + 3, 0)
    } else {
        (month - 9, 1)
    };
    let year = era * 400 + year + next;
    // There is no year 0.
    let (year, is_before_christ) = if year > 0 {
        (year, false)
    } else {
        (1 - year, true)
    };
    write!(out, "{year:04}-{month:02}-{day:02}").expect("memory takes all");
    is_before_christ
}

fn era(out: &mut Vec<u8>, is_before_christ: bool) {
    if is_before_christ {
        out.extend_from_slice(b" BC");
    }
}

fn timestamp(out: &mut Vec<u8>, microseconds: i64, zone: &[u8]) {
    match microseconds {
        i64::MAX => return out.extend_from_slice(b"infinity"),
        i64::MIN => return out.extend_from_slice(b"-infinity"),
        _ => {}
    }
    let is_before_christ = date(out, microseconds.div_euclid(DAY_US));
    let of_day = microseconds.rem_euclid(DAY_US).unsigned_abs();
    let (seconds, fraction) = (of_day / SECOND_US, of_day % SECOND_US);
    let (hour, minute, second) = (seconds / 3_600, seconds / 60 % 60, seconds % 60);
    write!(out, " {hour:02}:{minute:02}:{second:02}").expect("memory takes all");
    if fraction > 0 {
        write!(out, ".{fraction:06}").expect("memory takes all");
        while out.last() == Some(&b'0') {
            out.pop();
        }
    }
    out.extend_from_slice(zone);
    era(out, is_before_christ);
}

fn numeric(bytes: &[u8], out: &mut Vec<u8>) -> Option<()> {
    let word = |at: usize| {
        let word: [u8; 2] = bytes.get(2 * at..2 * at + 2)?.try_into().ok()?;
        Some(u16::from_be_bytes(word))
    };
    let (count, weight, sign, scale) = (word(0)?, word(1)?, word(2)?, word(3)?);
    if bytes.len() != 2 * (4 + usize::from(count)) {
        return None;
    }
    match sign {
        0 => {}
        NUMERIC_NEGATIVE => out.push(b'-'),
        NUMERIC_NAN => out.extend_from_slice(b"NaN"),
        NUMERIC_INFINITY => out.extend_from_slice(b"Infinity"),
        NUMERIC_MINUS_INFINITY => out.extend_from_slice(b"-Infinity"),
        _ => return None,
    }
    if !matches!(sign, 0 | NUMERIC_NEGATIVE) {
        return Some(());
    }
    // The power of 10,000 of the first digit that is stored. None is stored of the zeros around them.
    let weight = i32::from(weight.cast_signed());
    let digit = |power: i32| match usize::try_from(weight - power) {
        Ok(at) if at < usize::from(count) => word(4 + at).filter(|digit| *digit < NUMERIC_BASE),
        _ => Some(0),
    };
    print(out, digit(weight.max(0))?);
    for power in (0..weight).rev() {
        write!(out, "{:04}", digit(power)?).expect("memory takes all");
    }
    let scale = usize::from(scale);
    if scale > 0 {
        out.push(b'.');
        let end = out.len() + scale;
        for power in 1..=scale.div_ceil(NUMERIC_BASE_DIGITS) {
            let digit = digit(-i32::try_from(power).ok()?)?;
            write!(out, "{digit:04}").expect("memory takes all");
        }
        out.truncate(end);
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(of: BinaryType, bytes: &[u8]) -> Option<String> {
        let mut buffer = b"left over".to_vec();
        let text = of.text(bytes, &mut buffer).ok()?;
        Some(String::from_utf8(text.to_vec()).unwrap())
    }

    fn words(words: &[u16]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_be_bytes()).collect()
    }

    #[test]
    fn every_type_is_listed() {
        let known = (0..10_000).filter(|oid| BinaryType::of(*oid).is_some());
        assert!(known.eq(BinaryType::TYPE_OIDS));
    }

    #[test]
    fn values_are_printed_as_postgres_prints_them() {
        use BinaryType::*;
        let us = |days: i64, us: i64| (days * DAY_US + us).to_be_bytes().to_vec();
        let days = |days: i32| days.to_be_bytes().to_vec();
        for (of, bytes, expected) in [
            (Bool, vec![0], "f"),
            (Bool, vec![1], "t"),
            (Int2, i16::MIN.to_be_bytes().to_vec(), "-32768"),
            (Int4, i32::MAX.to_be_bytes().to_vec(), "2147483647"),
            (
                Int8,
                i64::MIN.to_be_bytes().to_vec(),
                "-9223372036854775808",
            ),
            (Text, "\t\\é".into(), "\t\\é"),
            (Text, vec![], ""),
            (Jsonb, b"\x01{}".to_vec(), "{}"),
            (Bytea, vec![0, 0xAB, 0xff], "\\x00abff"),
            (Bytea, vec![], "\\x"),
            (
                Uuid,
                (0_u8..16).collect(),
                "00010203-0405-0607-0809-0a0b0c0d0e0f",
            ),
            (Date, days(0), "2000-01-01"),
            (Date, days(59), "2000-02-29"),
            (Date, days(i32::MAX), "infinity"),
            (Date, days(i32::MIN), "-infinity"),
            // The first and the last day that Postgres takes, and those around the year that there is none of.
            (Date, days(-2_451_545), "4714-11-24 BC"),
            (Date, days(2_145_031_948), "5874897-12-31"),
            (Date, days(-730_119), "0001-01-01"),
            (Date, days(-730_120), "0001-12-31 BC"),
            (Timestamp, us(0, 0), "2000-01-01 00:00:00"),
            (Timestamp, us(0, 1), "2000-01-01 00:00:00.000001"),
            (Timestamp, us(0, 100_000), "2000-01-01 00:00:00.1"),
            (Timestamp, us(0, -1), "1999-12-31 23:59:59.999999"),
            (
                TimestampTz,
                us(-745_990, 3_723_500_000),
                "0044-07-20 01:02:03.5+00 BC",
            ),
            (
                TimestampTz,
                us(106_751_982, DAY_US - 1),
                "294276-12-31 23:59:59.999999+00",
            ),
            (Timestamp, i64::MAX.to_be_bytes().to_vec(), "infinity"),
            (TimestampTz, i64::MIN.to_be_bytes().to_vec(), "-infinity"),
            (Numeric, words(&[0, 0, 0, 0]), "0"),
            (Numeric, words(&[0, 0, 0, 2]), "0.00"),
            (Numeric, words(&[1, 0, 0, 0, 7]), "7"),
            (
                Numeric,
                words(&[3, 1, NUMERIC_NEGATIVE, 1, 1, 2345, 6000]),
                "-12345.6",
            ),
            (Numeric, words(&[1, 0xFFFF, 0, 2, 500]), "0.05"),
            (Numeric, words(&[1, 0xFFFE, 0, 8, 100]), "0.00000100"),
            (Numeric, words(&[1, 2, 0, 0, 1]), "100000000"),
            (Numeric, words(&[4, 1, 0, 5, 1, 0, 0, 1000]), "10000.00001"),
            (Numeric, words(&[1, 0, 0, 6, 1]), "1.000000"),
            (Numeric, words(&[0, 0, NUMERIC_NAN, 0]), "NaN"),
            (Numeric, words(&[0, 0, NUMERIC_INFINITY, 32]), "Infinity"),
            (
                Numeric,
                words(&[0, 0, NUMERIC_MINUS_INFINITY, 32]),
                "-Infinity",
            ),
        ] {
            assert_eq!(text(of, &bytes).as_deref(), Some(expected), "{of:?}");
        }
    }

    #[test]
    fn what_is_no_value_is_refused() {
        use BinaryType::*;
        for (of, bytes) in [
            (Bool, vec![2]),
            (Bool, vec![]),
            (Int2, vec![0; 4]),
            (Int4, vec![0; 3]),
            (Int8, vec![0; 9]),
            (Jsonb, vec![]),
            (Jsonb, b"\x02{}".to_vec()),
            (Uuid, vec![0; 15]),
            (Date, vec![0; 8]),
            (Timestamp, vec![0; 4]),
            (Numeric, words(&[1, 0, 0])),
            (Numeric, words(&[1, 0, 0, 0])),
            (Numeric, words(&[1, 0, 0, 0, 10_000])),
            (Numeric, words(&[0, 0, 1, 0])),
        ] {
            assert_eq!(text(of, &bytes), None, "{of:?} {bytes:?}");
        }
    }

    #[test]
    fn every_day_is_the_day_after_the_one_before() {
        let in_month = |year: i32, month| match month {
            2 => 28 + i32::from(year % 4 == 0 && (year % 100 != 0 || year % 400 == 0)),
            4 | 6 | 9 | 11 => 30,
            _ => 31,
        };
        // Year 0 is 1 BC.
        let (mut year, mut month, mut day) = (-799, 1, 1);
        for days in -1_022_313..=1_000_000 {
            let (shown, era) = if year > 0 {
                (year, "")
            } else {
                (1 - year, " BC")
            };
            let expected = format!("{shown:04}-{month:02}-{day:02}{era}");
            let bytes = i32::to_be_bytes(days);
            assert_eq!(text(BinaryType::Date, &bytes), Some(expected), "{days}");
            day += 1;
            if day > in_month(year, month) {
                (month, day) = (month + 1, 1);
            }
            if month > 12 {
                (year, month) = (year + 1, 1);
            }
        }
    }
}
