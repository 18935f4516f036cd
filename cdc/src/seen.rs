//! What the source's tables looked like when they were last looked at, remembered durably: rows may change without
//! an event, and then they are read again.
//!
//! A rewrite of a table, an attached or detached partition, and another table of the same name leave no change in
//! the WAL. Each is found in the catalog, remembered together with the backfill that is due, and ordered only once
//! the stream holds everything up to the moment it was found: an older change of a row that was rewritten would
//! otherwise outrank the row that is read.

use async_nats::jetstream::kv;
use millrace_config::{Config, Table};
use millrace_event::{Lsn, TableName, work};
use serde::{Deserialize, Serialize};
use tokio_postgres::Client;

use crate::life::Stream;
use crate::orders::order_backfill;
use crate::{Error, identity};

/// A table as it was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Seen {
    #[serde(flatten)]
    pub(crate) table: TableName,
    pub(crate) oid: u32,
    /// A digest of the files that hold the rows: a rewrite makes new ones, and so does a compaction.
    files: String,
    /// The partitions that hold rows.
    leaves: Vec<u32>,
    columns: Vec<Column>,
    /// A digest of what identifies rows.
    keys: String,
    /// A backfill that is to be ordered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    due: Option<Due>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Column {
    number: i16,
    name: String,
    type_oid: u32,
    typmod: i32,
    /// Whether older rows have a value in it that is not told to targets.
    hidden: bool,
}

/// A backfill that is to be ordered once the stream has passed a place in the WAL.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Due {
    id: String,
    #[serde(with = "lsn_text")]
    lsn: Lsn,
}

/// A look at a table: what it is, and which of its partitions are empty.
struct Look {
    seen: Seen,
    empty: Vec<u32>,
}

const LOOK: &str = "SELECT c.oid, md5(coalesce((SELECT string_agg(l.relid::oid::text || ':' || \
    coalesce(pg_relation_filenode(l.relid)::text, ''), ',' ORDER BY l.relid::oid) FROM pg_partition_tree(c.oid) l \
    WHERE l.isleaf), pg_relation_filenode(c.oid)::text, '')), \
    ARRAY(SELECT l.relid::oid FROM pg_partition_tree(c.oid) l WHERE l.isleaf AND c.relkind = 'p' ORDER BY 1), \
    ARRAY(SELECT l.relid::oid FROM pg_partition_tree(c.oid) l WHERE l.isleaf AND c.relkind = 'p' \
    AND pg_relation_size(l.relid) = 0), a.numbers, a.names, a.types, a.typmods, a.missing, a.told, \
    md5(coalesce((SELECT string_agg(i.indisprimary::text || i.indkey::text, ',' ORDER BY i.indexrelid) \
    FROM pg_index i WHERE i.indrelid = c.oid AND i.indisvalid AND (i.indisprimary OR i.indisreplident)), '')), w.place \
    FROM unnest($1::text[]) WITH ORDINALITY w(name, place) JOIN pg_class c ON c.oid = to_regclass(w.name) \
    CROSS JOIN LATERAL (SELECT coalesce(array_agg(attnum ORDER BY attnum), '{}') AS numbers, \
    coalesce(array_agg(attname::text ORDER BY attnum), '{}') AS names, \
    coalesce(array_agg(atttypid ORDER BY attnum), '{}') AS types, \
    coalesce(array_agg(atttypmod ORDER BY attnum), '{}') AS typmods, \
    coalesce(array_agg(atthasmissing ORDER BY attnum), '{}') AS missing, \
    coalesce(array_agg(t.typdelim = ',' ORDER BY attnum), '{}') AS told \
    FROM pg_attribute JOIN pg_type t ON t.oid = atttypid \
    WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped AND attgenerated = '') a";

const INSERT_LSN: &str = "SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() \
    ELSE pg_current_wal_insert_lsn() END::text";

/// How the tables stand in this life.
pub(crate) struct Watched {
    seen: Vec<Seen>,
}

impl Watched {
    /// Looks at every configured table and remembers what has changed since an earlier life, before this one counts
    /// on how it is now. A table of another OID is taken for new by the publication.
    ///
    /// # Errors
    /// The source or the broker is away.
    pub(crate) async fn begin(
        config: &Config,
        client: &Client,
        state: &kv::Store,
    ) -> Result<Self, Error> {
        let (looks, lsn) = look(client, &config.tables).await?;
        let mut seen = Vec::with_capacity(looks.len());
        for look in looks {
            let key = key(&look.seen.table);
            let before: Option<Seen> = identity::read(state, &key).await?;
            let after = remembered(before.as_ref(), &look, lsn);
            if before.as_ref() != Some(&after) {
                if before.is_some_and(|before| before.oid != after.oid) {
                    identity::published::forget(state, &after.table).await?;
                }
                store(state, &after).await?;
            }
            seen.push(after);
        }
        Ok(Self { seen })
    }

    /// Looks again. What is due is ordered once the stream holds everything up to `covered`.
    ///
    /// # Errors
    /// A table has other columns, another key, or is another one: the next life takes it as it is. Or the source or
    /// the broker is away.
    pub(crate) async fn again(
        &mut self,
        config: &Config,
        client: &Client,
        state: &kv::Store,
        stream: &Stream,
        covered: Lsn,
    ) -> Result<(), Error> {
        let (looks, lsn) = look(client, &config.tables).await?;
        for look in looks {
            let now = &look.seen;
            let mut seen = self.seen.iter_mut();
            let Some(before) = seen.find(|before| before.table == now.table) else {
                continue;
            };
            if (before.oid, &before.columns, &before.keys) != (now.oid, &now.columns, &now.keys) {
                let reason = format!("table {} was changed at the source", now.table);
                return Err(Error::retry_because(reason));
            }
            let mut after = remembered(Some(before), &look, lsn);
            if let Some(due) = after.due.take_if(|due| covered >= due.lsn) {
                order_backfill(config, stream, &after.table, &due.id).await?;
            }
            if *before != after {
                store(state, &after).await?;
                *before = after;
            }
        }
        Ok(())
    }
}

/// Every configured table that is there, and a place in the WAL behind everything that was found.
async fn look(client: &Client, tables: &[Table]) -> Result<(Vec<Look>, Lsn), Error> {
    let names: Vec<_> = tables.iter().map(|table| table.name.quoted()).collect();
    let rows = client.query(LOOK, &[&names]).await?;
    let mut looks = Vec::with_capacity(rows.len());
    for row in &rows {
        let place = usize::try_from(row.get::<_, i64>(11)).unwrap_or(1);
        let table = &tables[place - 1];
        let (numbers, names): (Vec<i16>, Vec<String>) = (row.get(4), row.get(5));
        let (types, typmods): (Vec<u32>, Vec<i32>) = (row.get(6), row.get(7));
        let (missing, told): (Vec<bool>, Vec<bool>) = (row.get(8), row.get(9));
        let columns = numbers.into_iter().zip(names).enumerate();
        let columns = columns.filter(|(_, (_, name))| !table.columns.exclude.contains(name));
        let column = |(at, (number, name)): (usize, (i16, String))| {
            let masked = table.columns.mask.iter().any(|(column, _)| *column == name);
            Column {
                number,
                name,
                type_oid: types[at],
                typmod: typmods[at],
                hidden: missing[at] && (masked || !told[at]),
            }
        };
        looks.push(Look {
            seen: Seen {
                table: table.name.clone(),
                oid: row.get(0),
                files: row.get(1),
                leaves: row.get(2),
                columns: columns.map(column).collect(),
                keys: row.get(10),
                due: None,
            },
            empty: row.get(3),
        });
    }
    // Asked for afterwards: what was found committed below it.
    let lsn: Option<String> = client.query_one(INSERT_LSN, &[]).await?.get(0);
    let lsn = lsn.unwrap_or_default().parse().unwrap_or(Lsn::ZERO);
    Ok((looks, lsn))
}

/// What is remembered of a table from now on: as it was found, with the backfill that is due.
fn remembered(before: Option<&Seen>, look: &Look, lsn: Lsn) -> Seen {
    let mut after = look.seen.clone();
    let Some(before) = before else { return after };
    after.due = match unseen(before, look) {
        Some(what) => {
            let Seen { table, oid, .. } = &after;
            tracing::info!(%table, "{what}: the table's rows are read again");
            let id = format!("schema-{oid}-{lsn}");
            Some(Due { id, lsn })
        }
        None => before.due.clone(),
    };
    after
}

/// Why rows may have changed without an event since a table was looked at.
fn unseen(before: &Seen, now: &Look) -> Option<&'static str> {
    let Look { seen: now, empty } = now;
    if before.oid != now.oid {
        return Some("another table has its name");
    }
    let came = now
        .leaves
        .iter()
        .filter(|leaf| !before.leaves.contains(leaf));
    let gone = before.leaves.iter().any(|leaf| !now.leaves.contains(leaf));
    if gone || came.into_iter().any(|leaf| !empty.contains(leaf)) {
        return Some("a partition came or went");
    }
    let rewritten = before.files != now.files;
    for column in &now.columns {
        let was = before
            .columns
            .iter()
            .find(|was| was.number == column.number);
        let named = before.columns.iter().find(|was| was.name == column.name);
        if named.is_some_and(|named| named.number != column.number) {
            return Some("a column has the name of another one");
        }
        match was {
            None if rewritten || column.hidden => return Some("a column came with values"),
            Some(was)
                if rewritten && (was.type_oid, was.typmod) != (column.type_oid, column.typmod) =>
            {
                return Some("a column has another type");
            }
            _ => {}
        }
    }
    None
}

fn key(table: &TableName) -> String {
    format!("seen.{}", work::schema_key(table))
}

async fn store(state: &kv::Store, seen: &Seen) -> Result<(), Error> {
    let value = serde_json::to_vec(seen).expect("plain JSON");
    identity::store(state, &key(&seen.table), value).await
}

mod lsn_text {
    use millrace_event::Lsn;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(lsn: &Lsn, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(lsn)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Lsn, D::Error> {
        String::deserialize(from)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn column(number: i16, name: &str, type_oid: u32) -> Column {
        Column {
            number,
            name: name.to_owned(),
            type_oid,
            typmod: -1,
            hidden: false,
        }
    }

    fn seen(oid: u32, files: &str, leaves: &[u32], columns: &[Column]) -> Seen {
        Seen {
            table: TableName::new("public", "t"),
            oid,
            files: files.to_owned(),
            leaves: leaves.to_vec(),
            columns: columns.to_vec(),
            keys: String::new(),
            due: None,
        }
    }

    fn due(before: &Seen, now: Seen, empty: &[u32]) -> bool {
        let look = Look {
            seen: now,
            empty: empty.to_vec(),
        };
        remembered(Some(before), &look, Lsn(9)).due.is_some()
    }

    #[test]
    fn a_compaction_is_no_change_of_rows_and_a_rewrite_may_be() {
        let before = seen(7, "a", &[], &[column(1, "id", 23), column(2, "v", 25)]);
        let compacted = seen(7, "b", &[], &before.columns);
        assert!(!due(&before, compacted, &[]));
        let retyped = |files| seen(7, files, &[], &[column(1, "id", 20), column(2, "v", 25)]);
        assert!(due(&before, retyped("b"), &[]));
        assert!(!due(&before, retyped("a"), &[]));
        let longer = |files| {
            seen(
                7,
                files,
                &[],
                &[column(1, "id", 23), column(2, "v", 25), column(3, "w", 25)],
            )
        };
        assert!(due(&before, longer("b"), &[]));
        assert!(!due(&before, longer("a"), &[]));
        let mut hidden = longer("a");
        hidden.columns[2].hidden = true;
        assert!(due(&before, hidden, &[]));
        let dropped = seen(7, "a", &[], &[column(1, "id", 23)]);
        assert!(!due(&before, dropped, &[]));
        let renamed = seen(7, "a", &[], &[column(1, "id", 23), column(2, "w", 25)]);
        assert!(!due(&before, renamed, &[]));
        // Dropped and added again: nothing of the old values is left.
        let again = seen(7, "a", &[], &[column(1, "id", 23), column(3, "v", 25)]);
        assert!(due(&before, again, &[]));
        let another = seen(8, "a", &[], &before.columns);
        assert!(due(&before, another, &[]));
    }

    #[test]
    fn partitions_that_come_and_go_are_seen() {
        let before = seen(7, "a", &[1, 2], &[]);
        assert!(due(&before, seen(7, "b", &[1, 2, 3], &[]), &[]));
        assert!(!due(&before, seen(7, "b", &[1, 2, 3], &[]), &[3]));
        assert!(due(&before, seen(7, "b", &[1], &[]), &[]));
    }

    #[test]
    fn what_is_due_stays_due() {
        let mut before = seen(7, "a", &[], &[]);
        let due = Due {
            id: "schema-7-0/9".to_owned(),
            lsn: Lsn(9),
        };
        before.due = Some(due.clone());
        let look = Look {
            seen: seen(7, "a", &[], &[]),
            empty: Vec::new(),
        };
        assert_eq!(remembered(Some(&before), &look, Lsn(99)).due, Some(due));
    }
}
