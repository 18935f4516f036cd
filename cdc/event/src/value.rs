//! One column's value: Postgres text on one side, JSON on the other, without loss.

use std::borrow::Cow;

use serde_json::value::RawValue;

/// A column's value as the source sent it, borrowed from the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Datum<'a> {
    /// SQL NULL.
    Null,
    /// A TOASTed value that the change did not touch, and that the WAL therefore does not hold.
    Unchanged,
    /// The value as Postgres prints it.
    Text(&'a [u8]),
}

/// How values of a type are written in JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `true` and `false`.
    Bool,
    /// A number, digit for digit what Postgres printed.
    Integer,
    /// A number where finite, else a string (`"NaN"`, `"Infinity"`).
    Float,
    /// A string with the exact Postgres text.
    Text,
    /// An array of elements of this kind where it has one dimension and starts at 1, else its text.
    Array(Element),
}

/// How an array's elements are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// `true` and `false`.
    Bool,
    /// Numbers.
    Integer,
    /// Numbers where finite, else strings.
    Float,
    /// Strings.
    Text,
}

impl Kind {
    /// The kind of a built-in type; every type that is not listed travels as text.
    #[must_use]
    pub const fn of_type(oid: u32) -> Self {
        match oid {
            16 => Self::Bool,
            20 | 21 | 23 => Self::Integer,
            700 | 701 => Self::Float,
            1000 => Self::Array(Element::Bool),
            1005 | 1007 | 1016 => Self::Array(Element::Integer),
            1021 | 1022 => Self::Array(Element::Float),
            // xml, json, money, bytea, char, name, text, oid, bpchar, varchar, macaddr8, macaddr, inet, cidr,
            // timestamp, date, time, timestamptz, interval, numeric, timetz, bit, varbit, uuid, pg_lsn, jsonb
            143 | 199 | 791 | 1001 | 1002 | 1003 | 1009 | 1028 | 1014 | 1015 | 775 | 1040
            | 1041 | 651 | 1115 | 1182 | 1183 | 1185 | 1187 | 1231 | 1270 | 1561 | 1563 | 2951
            | 3221 | 3807 => Self::Array(Element::Text),
            _ => Self::Text,
        }
    }
}

/// A value that cannot be written as JSON: its bytes are not UTF-8.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("value is not valid UTF-8")]
pub struct NotUtf8;

/// Appends a value of this kind as JSON. `Unchanged` must be left out by the caller.
pub(crate) fn write_json(out: &mut Vec<u8>, kind: Kind, datum: Datum<'_>) -> Result<(), NotUtf8> {
    let text = match datum {
        Datum::Null => {
            out.extend_from_slice(b"null");
            return Ok(());
        }
        Datum::Unchanged => unreachable!("an unchanged value is listed by name, never written"),
        Datum::Text(bytes) => std::str::from_utf8(bytes).map_err(|_| NotUtf8)?,
    };
    match kind {
        Kind::Bool => write_element(out, Element::Bool, text),
        Kind::Integer => write_element(out, Element::Integer, text),
        Kind::Float => write_element(out, Element::Float, text),
        Kind::Text => write_string(out, text),
        Kind::Array(element) => {
            let start = out.len();
            if write_array(out, element, text).is_none() {
                out.truncate(start);
                write_string(out, text);
            }
        }
    }
    Ok(())
}

fn write_element(out: &mut Vec<u8>, element: Element, text: &str) {
    match (element, text) {
        (Element::Bool, "t") => out.extend_from_slice(b"true"),
        (Element::Bool, "f") => out.extend_from_slice(b"false"),
        (Element::Integer | Element::Float, text) if is_json_number(text) => {
            out.extend_from_slice(text.as_bytes());
        }
        (_, text) => write_string(out, text),
    }
}

/// Whether the text is a number by JSON's grammar, as `-0`, `1e+20` and `1.5e-07` are.
pub(crate) fn is_json_number(text: &str) -> bool {
    let digits = |bytes: &[u8]| {
        bytes
            .iter()
            .take_while(|byte| byte.is_ascii_digit())
            .count()
    };
    let rest = text.as_bytes();
    let rest = rest.strip_prefix(b"-").unwrap_or(rest);
    let integer = digits(rest);
    if integer == 0 || (integer > 1 && rest.first() == Some(&b'0')) {
        return false;
    }
    let mut rest = rest.get(integer..).unwrap_or_default();
    if let Some(fraction) = rest.strip_prefix(b".") {
        let length = digits(fraction);
        if length == 0 {
            return false;
        }
        rest = fraction.get(length..).unwrap_or_default();
    }
    if let [b'e' | b'E', exponent @ ..] = rest {
        let exponent = match exponent {
            [b'+' | b'-', exponent @ ..] => exponent,
            _ => exponent,
        };
        return !exponent.is_empty() && digits(exponent) == exponent.len();
    }
    rest.is_empty()
}

/// Appends a one-dimensional array literal as a JSON array. `None` (with `out` dirty) where it is another
/// array: more dimensions, or a lower bound other than 1.
fn write_array(out: &mut Vec<u8>, element: Element, text: &str) -> Option<()> {
    let inner = text.strip_prefix('{')?.strip_suffix('}')?;
    out.push(b'[');
    let mut rest = inner;
    let mut unescaped = String::new();
    while !rest.is_empty() {
        if let Some(quoted) = rest.strip_prefix('"') {
            rest = read_quoted(quoted, &mut unescaped)?;
            write_element(out, element, &unescaped);
        } else {
            let end = rest.find(',').unwrap_or(rest.len());
            let (word, after) = rest.split_at(end);
            if word.is_empty() || word.contains(['{', '}', '"', '\\']) {
                return None;
            }
            if word.eq_ignore_ascii_case("null") {
                out.extend_from_slice(b"null");
            } else {
                write_element(out, element, word);
            }
            rest = after;
        }
        match rest.strip_prefix(',') {
            Some("") => return None,
            Some(after) => {
                out.push(b',');
                rest = after;
            }
            None if rest.is_empty() => {}
            None => return None,
        }
    }
    out.push(b']');
    Some(())
}

/// Reads a quoted element up to its closing quote into `unescaped`; returns what follows.
fn read_quoted<'a>(text: &'a str, unescaped: &mut String) -> Option<&'a str> {
    unescaped.clear();
    let mut chars = text.chars();
    loop {
        match chars.next()? {
            '"' => return Some(chars.as_str()),
            '\\' => unescaped.push(chars.next()?),
            other => unescaped.push(other),
        }
    }
}

/// Appends a JSON string.
pub(crate) fn write_string(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    let bytes = text.as_bytes();
    let mut clean_from = 0;
    for (index, &byte) in bytes.iter().enumerate() {
        if byte >= 0x20 && byte != b'"' && byte != b'\\' {
            continue;
        }
        out.extend_from_slice(bytes.get(clean_from..index).unwrap_or_default());
        clean_from = index + 1;
        match byte {
            b'"' => out.extend_from_slice(b"\\\""),
            b'\\' => out.extend_from_slice(b"\\\\"),
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\r' => out.extend_from_slice(b"\\r"),
            b'\t' => out.extend_from_slice(b"\\t"),
            control => {
                const HEX: &[u8; 16] = b"0123456789abcdef";
                out.extend_from_slice(b"\\u00");
                out.push(HEX[usize::from(control >> 4)]);
                out.push(HEX[usize::from(control & 0xF)]);
            }
        }
    }
    out.extend_from_slice(bytes.get(clean_from..).unwrap_or_default());
    out.push(b'"');
}

/// A column's value as an event carries it, borrowed from the payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value<'a> {
    /// SQL NULL.
    Null,
    /// The value as Postgres prints it, array literals included.
    Text(Cow<'a, str>),
}

impl<'a> Value<'a> {
    pub(crate) const TRUE: Self = Self::Text(Cow::Borrowed("t"));
    pub(crate) const FALSE: Self = Self::Text(Cow::Borrowed("f"));

    /// The Postgres text; `None` for NULL.
    #[must_use]
    pub fn as_text(&self) -> Option<&str> {
        match self {
            Self::Null => None,
            Self::Text(text) => Some(text),
        }
    }

    /// The value that a JSON scalar or array of scalars stands for.
    pub(crate) fn from_json(raw: &'a RawValue) -> Result<Self, serde_json::Error> {
        let json = raw.get();
        Ok(match json.as_bytes().first() {
            Some(b'n') => Self::Null,
            Some(b'"') => Self::Text(string_from_json(json)?),
            Some(b't') => Self::TRUE,
            Some(b'f') => Self::FALSE,
            Some(b'[') => Self::Text(Cow::Owned(array_from_json(json)?)),
            Some(b'{') => return Err(serde::de::Error::custom("a value is never an object")),
            _ => Self::Text(Cow::Borrowed(json)),
        })
    }
}

fn string_from_json(json: &str) -> Result<Cow<'_, str>, serde_json::Error> {
    // A raw value is valid JSON: without an escape the text between the quotes is the string.
    match json
        .strip_prefix('"')
        .and_then(|rest| rest.strip_suffix('"'))
    {
        Some(text) if memchr::memchr(b'\\', text.as_bytes()).is_none() => Ok(Cow::Borrowed(text)),
        _ => serde_json::from_str::<String>(json).map(Cow::Owned),
    }
}

/// The Postgres array literal of a JSON array of scalars. Strings are always quoted: `{"a",1,NULL}`.
fn array_from_json(json: &str) -> Result<String, serde_json::Error> {
    let elements: Vec<&RawValue> = serde_json::from_str(json)?;
    let mut literal = String::with_capacity(json.len() + 2);
    literal.push('{');
    for (index, element) in elements.into_iter().enumerate() {
        if index > 0 {
            literal.push(',');
        }
        let text = match (element.get().as_bytes().first(), Value::from_json(element)?) {
            (Some(b'['), _) => {
                return Err(serde::de::Error::custom(
                    "an array inside an array is never JSON",
                ));
            }
            (_, Value::Null) => Cow::Borrowed("NULL"),
            (Some(b'"'), Value::Text(text)) => Cow::Owned(format!(
                "\"{}\"",
                text.replace('\\', "\\\\").replace('"', "\\\"")
            )),
            (_, Value::Text(text)) => text,
        };
        literal.push_str(&text);
    }
    literal.push('}');
    Ok(literal)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn json(kind: Kind, text: &str) -> String {
        let mut out = Vec::new();
        write_json(&mut out, kind, Datum::Text(text.as_bytes())).unwrap();
        String::from_utf8(out).unwrap()
    }

    fn back(json: &str) -> String {
        let raw: &RawValue = serde_json::from_str(json).unwrap();
        Value::from_json(raw).unwrap().as_text().unwrap().to_owned()
    }

    #[test]
    fn scalars_become_json_and_come_back_exactly() {
        for (kind, text, expected) in [
            (Kind::Bool, "t", "true"),
            (Kind::Bool, "f", "false"),
            (
                Kind::Integer,
                "-9223372036854775808",
                "-9223372036854775808",
            ),
            (Kind::Float, "-0", "-0"),
            (Kind::Float, "1e+20", "1e+20"),
            (Kind::Float, "1.5e-07", "1.5e-07"),
            (Kind::Float, "NaN", "\"NaN\""),
            (Kind::Float, "-Infinity", "\"-Infinity\""),
            (Kind::Text, "null", "\"null\""),
            (Kind::Text, "a\"\\\n\u{1}é", "\"a\\\"\\\\\\n\\u0001é\""),
        ] {
            assert_eq!(json(kind, text), expected);
            assert_eq!(back(expected), text);
        }
    }

    #[test]
    fn arrays_of_one_dimension_become_json_arrays() {
        for (element, text, expected) in [
            (Element::Integer, "{}", "[]"),
            (Element::Integer, "{1,NULL,-3}", "[1,null,-3]"),
            (Element::Bool, "{t,f}", "[true,false]"),
            (Element::Float, "{1.5,NaN}", "[1.5,\"NaN\"]"),
            (
                Element::Text,
                r#"{a,"b,c","NULL",NULL,"\"\\",""}"#,
                r#"["a","b,c","NULL",null,"\"\\",""]"#,
            ),
        ] {
            assert_eq!(json(Kind::Array(element), text), expected);
        }
        assert_eq!(
            back(r#"["a","b,c","NULL",null,"\"\\",""]"#),
            r#"{"a","b,c","NULL",NULL,"\"\\",""}"#
        );
        assert_eq!(back("[1,null,true]"), "{1,NULL,t}");
    }

    #[test]
    fn other_arrays_keep_their_text() {
        for text in [
            "{{1,2},{3,4}}",
            "[0:1]={1,2}",
            "{{}}",
            "{1,2",
            "{1,}",
            "{,1}",
        ] {
            let expected = serde_json::to_string(text).unwrap();
            assert_eq!(json(Kind::Array(Element::Integer), text), expected);
            assert_eq!(back(&expected), text);
        }
    }

    #[test]
    fn bytes_that_are_not_utf8_are_refused() {
        let mut out = Vec::new();
        assert_eq!(
            write_json(&mut out, Kind::Text, Datum::Text(b"\xff")),
            Err(NotUtf8)
        );
    }

    proptest! {
        #[test]
        fn any_text_survives(text in "\\PC*|[\\x00-\\x7f]*") {
            let written = json(Kind::Text, &text);
            prop_assert_eq!(&serde_json::from_str::<String>(&written).unwrap(), &text);
            prop_assert_eq!(back(&written), text);
        }

        #[test]
        fn whatever_claims_to_be_a_number_is_valid_json(text in "[-+0-9.eE]{0,8}") {
            let valid = serde_json::from_str::<serde_json::Number>(&text).is_ok()
                || serde_json::from_str::<&RawValue>(&text).is_ok();
            if is_json_number(&text) {
                prop_assert!(valid, "{}", text);
            }
        }

        #[test]
        fn any_text_array_survives(elements in prop::collection::vec(prop::option::of("\\PC*"), 0..5)) {
            let literal = format!("{{{}}}", elements.iter().map(|element| match element {
                None => "NULL".to_owned(),
                Some(text) => format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"")),
            }).collect::<Vec<_>>().join(","));
            let written = json(Kind::Array(Element::Text), &literal);
            prop_assert_eq!(&serde_json::from_str::<Vec<Option<String>>>(&written).unwrap(), &elements);
            prop_assert_eq!(back(&written), literal);
        }
    }
}
