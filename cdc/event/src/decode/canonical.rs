//! Lines in the very layout that [`crate::write_change`] writes, read without a general parser.
//!
//! Every event of ours has this layout, and a general parser takes several times as long for it. Whatever
//! differs, be it by a space, is `None` here and left to `serde_json`: this file may refuse anything, and must
//! read what it does read exactly as `serde_json` would. Arrays and rare escapes are given to `serde_json` in any
//! case.

use std::borrow::Cow;
use std::str::FromStr;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::{ChangeEvent, Columns, Source};
use crate::value::is_json_number;
use crate::{Lsn, Op, Value, Version};

/// Columns that a row has room for at once: most rows have no more.
const ROW_COLUMNS: usize = 8;
/// Columns that a key has room for at once.
const KEY_COLUMNS: usize = 2;

/// Room that a string with escapes begins with: JSON in a value has one every few bytes.
const ESCAPED_BYTES: usize = 64;

/// The event of a line; `None` where its layout is another one, or it is no event at all.
pub(super) fn read(line: &str) -> Option<ChangeEvent<'_>> {
    let mut line = Rest(line);
    line.literal("{\"op\":\"")?;
    let op = line.op()?;
    line.literal("\",\"before\":")?;
    let before = line.columns(ROW_COLUMNS)?;
    line.literal(",\"after\":")?;
    let after = line.columns(ROW_COLUMNS)?;
    line.literal(",\"key\":")?;
    let key = line.columns(KEY_COLUMNS)?;
    let unchanged = match line.literal(",\"unchanged\":") {
        Some(()) => line.general()?,
        None => Vec::new(),
    };
    line.literal(",\"ts_ms\":")?;
    let ts_ms = line.number()?;
    line.literal(",\"source\":{")?;
    let source = line.source()?;
    line.literal("}}")?;
    line.0.is_empty().then_some(ChangeEvent {
        op,
        before,
        after,
        key,
        unchanged,
        source,
        ts_ms,
    })
}

/// What of a line has not been read. Each method takes its part off the front, or is `None`.
struct Rest<'a>(&'a str);

impl<'a> Rest<'a> {
    fn literal(&mut self, text: &str) -> Option<()> {
        self.0 = self.0.strip_prefix(text)?;
        Some(())
    }

    fn take(&mut self, length: usize) -> Option<&'a str> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    fn op(&mut self) -> Option<Op> {
        let letter = self.take(1)?;
        Op::ALL.into_iter().find(|op| op.letter() == letter)
    }

    /// The members of `source`, without its braces.
    fn source(&mut self) -> Option<Source<'a>> {
        self.literal("\"name\":")?;
        let name = self.string()?;
        self.literal(",\"db\":")?;
        let db = self.string()?;
        self.literal(",\"schema\":")?;
        let schema = self.string()?;
        self.literal(",\"table\":")?;
        let table = self.string()?;
        self.literal(",\"table_version\":")?;
        let table_version = self.string()?;
        self.literal(",\"snapshot\":")?;
        let snapshot = match self.literal("\"true\"") {
            Some(()) => true,
            None => self.literal("\"false\"").map(|()| false)?,
        };
        self.literal(",\"txId\":")?;
        let tx_id = self.number()?;
        self.literal(",\"ts_ms\":")?;
        self.digits()?;
        self.literal(",\"ts_us\":")?;
        let ts_us = self.number()?;
        self.literal(",\"epoch\":")?;
        self.digits()?;
        self.literal(",\"commit_lsn\":")?;
        self.digits()?;
        self.literal(",\"version\":\"")?;
        let version = Version::from_digits(self.take(32)?.as_bytes())?;
        self.literal("\",\"seq\":")?;
        self.digits()?;
        self.literal(",\"lsn\":")?;
        let lsn = Lsn(self.number()?);
        let last = self.literal(",\"last\":true").is_some();
        let end_lsn = match self.literal(",\"end_lsn\":") {
            Some(()) => Some(Lsn(self.number()?)),
            None => None,
        };
        Some(Source {
            name,
            db,
            schema,
            table,
            table_version,
            snapshot,
            tx_id,
            ts_us,
            lsn,
            version,
            last,
            end_lsn,
        })
    }

    /// `null` or an object of columns; room for `capacity` of them is made.
    fn columns(&mut self, capacity: usize) -> Option<Option<Columns<'a>>> {
        if self.literal("null").is_some() {
            return Some(None);
        }
        self.literal("{")?;
        if self.literal("}").is_some() {
            return Some(Some(Columns::default()));
        }
        let mut columns = Vec::with_capacity(capacity);
        loop {
            let name = self.string()?;
            self.literal(":")?;
            columns.push((name, self.value()?));
            match self.take(1)? {
                "," => {}
                "}" => return Some(Some(Columns(columns))),
                _ => return None,
            }
        }
    }

    fn value(&mut self) -> Option<Value<'a>> {
        match self.0.as_bytes().first()? {
            b'"' => self.string().map(Value::Text),
            b'n' => self.literal("null").map(|()| Value::Null),
            b't' => self.literal("true").map(|()| Value::TRUE),
            b'f' => self.literal("false").map(|()| Value::FALSE),
            b'-' | b'0'..=b'9' => {
                let in_number =
                    |byte: &u8| matches!(byte, b'0'..=b'9' | b'-' | b'+' | b'.' | b'e' | b'E');
                let length = self.0.bytes().take_while(|byte| in_number(byte)).count();
                let number = self.take(length)?;
                is_json_number(number).then_some(Value::Text(Cow::Borrowed(number)))
            }
            _ => Value::from_json(self.general::<&RawValue>()?).ok(),
        }
    }

    fn string(&mut self) -> Option<Cow<'a, str>> {
        let mut rest = self.0.strip_prefix('"')?;
        let mut unescaped = String::new();
        loop {
            let (plain, special) = rest.split_at_checked(plain(rest.as_bytes()))?;
            if let Some(after) = special.strip_prefix('"') {
                self.0 = after;
                if unescaped.is_empty() {
                    return Some(Cow::Borrowed(plain));
                }
                unescaped.push_str(plain);
                return Some(Cow::Owned(unescaped));
            }
            let escape = special.strip_prefix('\\')?;
            let character = match escape.as_bytes().first()? {
                byte @ (b'"' | b'\\') => char::from(*byte),
                b'n' => '\n',
                b'r' => '\r',
                b't' => '\t',
                _ => return self.general::<String>().map(Cow::Owned),
            };
            if unescaped.is_empty() {
                unescaped.reserve(ESCAPED_BYTES);
            }
            unescaped.push_str(plain);
            unescaped.push(character);
            rest = escape.get(1..)?;
        }
    }

    /// A number without sign, fraction and exponent.
    fn number<T: FromStr>(&mut self) -> Option<T> {
        self.digits()?.parse().ok()
    }

    fn digits(&mut self) -> Option<&'a str> {
        let length = self.0.bytes().take_while(u8::is_ascii_digit).count();
        let digits = self.take(length)?;
        let is_json = !digits.is_empty() && (digits == "0" || !digits.starts_with('0'));
        is_json.then_some(digits)
    }

    /// Whatever `serde_json` reads next.
    fn general<T: Deserialize<'a>>(&mut self) -> Option<T> {
        let mut values = serde_json::Deserializer::from_str(self.0).into_iter();
        let value = values.next()?.ok()?;
        self.0 = self.0.get(values.byte_offset()..)?;
        Some(value)
    }
}

/// How many bytes of a string stand for themselves: up to a quote, a backslash or a control character.
fn plain(bytes: &[u8]) -> usize {
    /// Eight bytes at a time; each byte's highest bit says what was found in it.
    const ONES: u64 = u64::MAX / 0xFF;
    const HIGHEST: u64 = ONES << 7;
    // Exact up to the first byte that is found, and no further one counts.
    let zeros = |word: u64| word.wrapping_sub(ONES) & !word;
    let (words, rest) = bytes.as_chunks::<8>();
    for (index, word) in words.iter().enumerate() {
        let word = u64::from_le_bytes(*word);
        let control = word.wrapping_sub(ONES * 0x20) & !word;
        let quote = zeros(word ^ (ONES * u64::from(b'"')));
        let backslash = zeros(word ^ (ONES * u64::from(b'\\')));
        let found = (control | quote | backslash) & HIGHEST;
        if found != 0 {
            return index * 8 + found.trailing_zeros() as usize / 8;
        }
    }
    let is_plain = |byte: &&u8| !matches!(byte, 0..0x20 | b'"' | b'\\');
    bytes.len() - rest.len() + rest.iter().take_while(is_plain).count()
}

#[cfg(test)]
mod tests;
