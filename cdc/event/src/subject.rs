//! Names on the stream: subjects, and the streams and buckets themselves.

use crate::fnv::fnv1a_64;
use crate::{ControlKind, Op, TableName};

/// Escapes a name into one subject token, injectively: `[A-Za-z0-9_-]` stay, every other byte of the UTF-8
/// text, and a leading `_`, becomes `=HH`. Two names never share a token, and none collides with `_ctl`.
#[must_use]
pub fn escape(name: &str) -> String {
    if name.is_empty() {
        return "=".to_owned();
    }
    let mut token = String::with_capacity(name.len());
    for (index, byte) in name.bytes().enumerate() {
        let plain = byte.is_ascii_alphanumeric() || byte == b'-' || (byte == b'_' && index > 0);
        if plain {
            token.push(char::from(byte));
        } else {
            token.push_str(&format!("={byte:02X}"));
        }
    }
    token
}

/// The inverse of [`escape`]; `None` for a token that `escape` does not produce.
#[must_use]
pub fn unescape(token: &str) -> Option<String> {
    if token == "=" {
        return Some(String::new());
    }
    let mut bytes = Vec::with_capacity(token.len());
    let mut rest = token.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'=' {
            let digits = [rest.next()?, rest.next()?];
            let digits = std::str::from_utf8(&digits).ok()?;
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
        } else {
            bytes.push(byte);
        }
    }
    let name = String::from_utf8(bytes).ok()?;
    (escape(&name) == token).then_some(name)
}

/// The subject of a change: `cdc.<source>.<schema>.<table>.<op>`.
#[must_use]
pub fn change(source: &str, table: &TableName, op: Op) -> String {
    format!("{}.{}", table_prefix("cdc", source, table), op.letter())
}

/// Every subject of one table's changes: `cdc.<source>.<schema>.<table>.*`.
#[must_use]
pub fn table_filter(source: &str, table: &TableName) -> String {
    format!("{}.*", table_prefix("cdc", source, table))
}

/// The subject of a control message: `cdc.<source>._ctl.<kind>`.
#[must_use]
pub fn control(source: &str, kind: ControlKind) -> String {
    format!("cdc.{}._ctl.{}", escape(source), kind.as_str())
}

/// Every subject of one source: `cdc.<source>.>`.
#[must_use]
pub fn all(source: &str) -> String {
    format!("cdc.{}.>", escape(source))
}

/// The subject of one table's rows on a sink's copy stream: `cdc-copy.<source>.<sink>.<schema>.<table>`.
#[must_use]
pub fn copy(source: &str, sink: &str, table: &TableName) -> String {
    let TableName { schema, table } = table;
    format!(
        "{}.{}.{}",
        copy_root(source, sink),
        escape(schema),
        escape(table)
    )
}

/// The subject of the copy's own messages on a sink's copy stream: `cdc-copy.<source>.<sink>._ctl.copied`.
#[must_use]
pub fn copied(source: &str, sink: &str) -> String {
    format!("{}._ctl.copied", copy_root(source, sink))
}

/// Every subject of a sink's copy stream: `cdc-copy.<source>.<sink>.>`.
#[must_use]
pub fn copy_all(source: &str, sink: &str) -> String {
    format!("{}.>", copy_root(source, sink))
}

/// The stream that holds a source's changes: `CDC_<source>`.
#[must_use]
pub fn stream_name(source: &str) -> String {
    format!("CDC_{source}")
}

/// The stream that holds the rows being copied for one sink: `COPY_<source>_<sink>_<hash16>`. The hash keeps
/// apart what the underscores alone would not (`a_b` + `c` and `a` + `b_c`).
#[must_use]
pub fn copy_stream_name(source: &str, sink: &str) -> String {
    let hash = fnv1a_64([source.as_bytes(), &[0], sink.as_bytes()]);
    format!("COPY_{source}_{sink}_{hash:016x}")
}

/// A KV bucket of a source: `MILLRACE_<source>_<kind>`.
#[must_use]
pub fn bucket_name(source: &str, kind: &str) -> String {
    format!("MILLRACE_{source}_{kind}")
}

fn table_prefix(root: &str, source: &str, table: &TableName) -> String {
    format!(
        "{root}.{}.{}.{}",
        escape(source),
        escape(&table.schema),
        escape(&table.table)
    )
}

fn copy_root(source: &str, sink: &str) -> String {
    format!("cdc-copy.{}.{}", escape(source), escape(sink))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn subjects_are_as_the_format_says() {
        let table = TableName::new("public", "order items");
        assert_eq!(
            change("shop", &table, Op::Update),
            "cdc.shop.public.order=20items.u"
        );
        assert_eq!(
            table_filter("shop", &table),
            "cdc.shop.public.order=20items.*"
        );
        assert_eq!(control("shop", ControlKind::Start), "cdc.shop._ctl.start");
        assert_eq!(
            copy("shop", "wh", &table),
            "cdc-copy.shop.wh.public.order=20items"
        );
    }

    #[test]
    fn a_schema_named_like_the_control_token_does_not_collide_with_it() {
        let subject = change("shop", &TableName::new("_ctl", "start"), Op::Create);
        assert_eq!(subject, "cdc.shop.=5Fctl.start.c");
    }

    #[test]
    fn copy_streams_of_different_pairs_have_different_names() {
        assert_ne!(copy_stream_name("a_b", "c"), copy_stream_name("a", "b_c"));
    }

    proptest! {
        #[test]
        fn escaping_is_injective_and_legal(name in ".*", token in "[A-Za-z0-9_=-]*") {
            let escaped = escape(&name);
            prop_assert!(escaped.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-=".contains(&b)));
            prop_assert!(!escaped.is_empty() && !escaped.starts_with('_'));
            prop_assert_eq!(unescape(&escaped), Some(name));
            if let Some(name) = unescape(&token) {
                prop_assert_eq!(escape(&name), token);
            }
        }
    }
}
