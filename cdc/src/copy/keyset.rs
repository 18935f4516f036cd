//! The SQL that reads a part of a table in the order of its key. Pure.

use millrace_event::{TableName, quote_identifier, quote_literal};

/// A table as its chunks are read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Keyset {
    /// What the `SELECT` reads from, as SQL.
    from: String,
    /// The columns of the `SELECT`, as SQL.
    select_list: String,
    /// The rows that are published at all, as SQL.
    published: Option<String>,
    key: Vec<KeyColumn>,
}

/// A column of the key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct KeyColumn {
    /// Its name.
    pub(super) name: String,
    /// Its type as SQL, without a modifier: a cast must not cut a value off.
    pub(super) type_name: String,
}

/// A key that was asked for does not have one text for each key column.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a key of {found} columns was asked for, and the table's has {wanted}")]
pub(super) struct KeyMismatch {
    found: usize,
    wanted: usize,
}

impl Keyset {
    /// Reads these columns of the table's published rows by this key.
    pub(super) fn new(
        from: String,
        select_list: String,
        published: Option<String>,
        key: Vec<KeyColumn>,
    ) -> Self {
        Self {
            from,
            select_list,
            published,
            key,
        }
    }

    /// Whether only some of the table's rows are read.
    pub(super) fn is_filtered(&self, filter: Option<&str>) -> bool {
        self.published.is_some() || filter.is_some()
    }

    /// At most `limit` rows behind a key, or from the first one.
    ///
    /// The source compares: nobody else knows its collations.
    ///
    /// # Errors
    /// The key is not one of this table.
    pub(super) fn chunk(
        &self,
        after: Option<&[String]>,
        limit: u32,
    ) -> Result<String, KeyMismatch> {
        let rest = format!(" ORDER BY {} LIMIT {limit}", self.key_list());
        Ok(self.copy(self.behind(after)?, None, &rest))
    }

    /// The `number`-th key behind a key, of all rows, as texts. Rows of which few are wanted are read up to it: how many
    /// are looked at must not depend on how many of them are.
    ///
    /// # Errors
    /// The key is not one of this table.
    pub(super) fn key_behind(
        &self,
        after: Option<&[String]>,
        number: u32,
    ) -> Result<String, KeyMismatch> {
        let texts = self.key.iter();
        let texts = texts.map(|column| format!("{}::text", quote_identifier(&column.name)));
        let behind = self.behind(after)?;
        Ok(format!(
            "SELECT {} FROM {}{} ORDER BY {} OFFSET {} LIMIT 1",
            texts.collect::<Vec<_>>().join(", "),
            self.from,
            behind.map_or_else(String::new, |behind| format!(" WHERE {behind}")),
            self.key_list(),
            number.saturating_sub(1)
        ))
    }

    /// The rows behind a key and up to another one, or to the last, for which the condition holds.
    ///
    /// # Errors
    /// A key is not one of this table.
    pub(super) fn range(
        &self,
        after: Option<&[String]>,
        to: Option<&[String]>,
        filter: Option<&str>,
    ) -> Result<String, KeyMismatch> {
        let up_to = match to {
            None => None,
            Some(to) => Some(format!("({}) <= {}", self.key_list(), self.row(to)?)),
        };
        let between: Vec<_> = self.behind(after)?.into_iter().chain(up_to).collect();
        let between = (!between.is_empty()).then(|| between.join(" AND "));
        let rest = format!(" ORDER BY {}", self.key_list());
        Ok(self.copy(between, filter, &rest))
    }

    fn behind(&self, after: Option<&[String]>) -> Result<Option<String>, KeyMismatch> {
        let Some(after) = after else { return Ok(None) };
        Ok(Some(format!(
            "({}) > {}",
            self.key_list(),
            self.row(after)?
        )))
    }

    /// The rows of these keys.
    ///
    /// # Errors
    /// A key is not one of this table.
    pub(super) fn rows_of(&self, keys: &[Vec<String>]) -> Result<String, KeyMismatch> {
        let rows = keys.iter().map(|key| self.row(key));
        let rows: Vec<String> = rows.collect::<Result<_, _>>()?;
        let among = format!("({}) IN ({})", self.key_list(), rows.join(", "));
        Ok(self.copy(Some(among), None, ""))
    }

    /// Waits for those who change the table's shape, and keeps them out until the transaction's end. It does not
    /// take the transaction's snapshot, so that one shows whatever the lock waited for.
    pub(super) fn lock(table: &TableName) -> String {
        format!("LOCK TABLE {} IN ACCESS SHARE MODE", table.quoted())
    }

    fn copy(&self, of_key: Option<String>, filter: Option<&str>, rest: &str) -> String {
        let own = self.published.as_deref().into_iter().chain(filter);
        // The line's end ends a comment too.
        let own = own.map(|condition| format!("({condition}\n)"));
        let conditions: Vec<String> = of_key.into_iter().chain(own).collect();
        let filtered = match conditions.is_empty() {
            true => String::new(),
            false => format!(" WHERE {}", conditions.join(" AND ")),
        };
        format!(
            "COPY (SELECT {} FROM {}{filtered}{rest}) TO STDOUT",
            self.select_list, self.from
        )
    }

    fn key_list(&self) -> String {
        let key = self.key.iter().map(|column| quote_identifier(&column.name));
        key.collect::<Vec<_>>().join(", ")
    }

    fn row(&self, key: &[String]) -> Result<String, KeyMismatch> {
        if key.len() != self.key.len() {
            return Err(KeyMismatch {
                found: key.len(),
                wanted: self.key.len(),
            });
        }
        let texts = key.iter().zip(&self.key);
        let literals: Vec<String> = texts
            .map(|(text, column)| format!("{}::{}", quote_literal(text).trim(), column.type_name))
            .collect();
        Ok(format!("({})", literals.join(", ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keyset() -> Keyset {
        publishing(None)
    }

    fn publishing(condition: Option<&str>) -> Keyset {
        let key = |name: &str, type_name: &str| KeyColumn {
            name: name.to_owned(),
            type_name: type_name.to_owned(),
        };
        Keyset::new(
            "ONLY \"s\".\"a\"\"b\"".to_owned(),
            "\"id\", \"k\"".to_owned(),
            condition.map(str::to_owned),
            vec![key("k", "pg_catalog.text"), key("id", "bigint")],
        )
    }

    fn key(k: &str, id: &str) -> Vec<String> {
        vec![k.to_owned(), id.to_owned()]
    }

    #[test]
    fn a_chunk_begins_behind_a_key_or_at_the_first_row() {
        let first = keyset().chunk(None, 10).unwrap();
        let select = "COPY (SELECT \"id\", \"k\" FROM ONLY \"s\".\"a\"\"b\"";
        assert_eq!(
            first,
            format!("{select} ORDER BY \"k\", \"id\" LIMIT 10) TO STDOUT")
        );
        let next = keyset().chunk(Some(&key("it's\\", "7")), 10).unwrap();
        assert_eq!(
            next,
            format!(
                "{select} WHERE (\"k\", \"id\") > (E'it''s\\\\'::pg_catalog.text, '7'::bigint) \
                 ORDER BY \"k\", \"id\" LIMIT 10) TO STDOUT"
            )
        );
    }

    #[test]
    fn a_condition_keeps_to_its_place() {
        let (a, b) = (key("a", "1"), key("b", "2"));
        let filtered = keyset()
            .range(Some(&a), Some(&b), Some("id > 3 OR true -- all"))
            .unwrap();
        let condition = " WHERE (\"k\", \"id\") > ('a'::pg_catalog.text, '1'::bigint) \
                         AND (\"k\", \"id\") <= ('b'::pg_catalog.text, '2'::bigint) \
                         AND (id > 3 OR true -- all\n) ORDER BY";
        assert!(filtered.contains(condition), "{filtered}");
        let first = keyset().range(None, None, Some("id > 3")).unwrap();
        assert!(first.contains(" WHERE (id > 3\n) ORDER BY"), "{first}");
        let part = publishing(Some("open"));
        let both = part.range(None, None, Some("id > 3")).unwrap();
        assert!(
            both.contains(" WHERE (open\n) AND (id > 3\n) ORDER"),
            "{both}"
        );
        let keys = part.rows_of(&[key("a", "1")]).unwrap();
        assert!(
            keys.ends_with("'1'::bigint)) AND (open\n)) TO STDOUT"),
            "{keys}"
        );
    }

    #[test]
    fn the_key_of_a_place_is_that_of_all_rows() {
        let part = publishing(Some("open"));
        assert!(part.is_filtered(None) && keyset().is_filtered(Some("true")));
        assert!(!keyset().is_filtered(None));
        let tenth = part.key_behind(Some(&key("a", "1")), 10).unwrap();
        assert_eq!(
            tenth,
            "SELECT \"k\"::text, \"id\"::text FROM ONLY \"s\".\"a\"\"b\" \
             WHERE (\"k\", \"id\") > ('a'::pg_catalog.text, '1'::bigint) \
             ORDER BY \"k\", \"id\" OFFSET 9 LIMIT 1"
        );
    }

    #[test]
    fn keys_are_listed() {
        let read = keyset().rows_of(&[key("a", "1"), key("b", "2")]).unwrap();
        let condition = "(\"k\", \"id\") IN (('a'::pg_catalog.text, '1'::bigint), \
                         ('b'::pg_catalog.text, '2'::bigint))) TO STDOUT";
        assert!(read.ends_with(condition), "{read}");
    }

    #[test]
    fn a_key_of_other_columns_is_refused() {
        let short = vec!["a".to_owned()];
        assert!(keyset().chunk(Some(&short), 1).is_err());
        assert!(keyset().rows_of(&[key("a", "1"), short]).is_err());
    }
}
