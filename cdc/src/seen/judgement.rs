//! Whether rows of a table may have changed without an event between two looks at it. Pure.

use millrace_event::{Lsn, TableName};
use serde::{Deserialize, Serialize};

/// So many names of columns are remembered of a table: Postgres numbers 1,600 columns in a table's life. Of more,
/// which takes as many renames, the oldest are forgotten.
const NAMES_MAX: usize = 3_200;

/// A table as it was found. What an older release did not look at is not there, and not judged by.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Seen {
    #[serde(flatten)]
    pub(super) table: TableName,
    pub(super) oid: u32,
    /// A digest of the files that hold the rows: a rewrite makes new ones, and so does a compaction.
    pub(super) files: String,
    /// The partitions that hold rows.
    pub(super) leaves: Vec<u32>,
    /// The file of each of them: a truncate of a partition makes a new one, and so does a rewrite or a compaction.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) leaf_files: Option<Vec<(u32, u32)>>,
    /// The partitions of every level, with the transaction that attached each.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) attached: Option<Vec<(u32, u32)>>,
    /// Those that are not generated. One that is not any more came into the selection, which orders its backfill.
    pub(super) columns: Vec<Column>,
    /// Names that columns ever had, each with the number of the last one that had it, the newest last. The number
    /// of another table's is 0.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) names: Vec<(String, i16)>,
    /// A digest of what identifies rows, and of what the table and its partitions log of old ones.
    pub(super) keys: String,
    /// The numbers of the primary key's columns, ascending, where that is what identifies rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) primary: Option<Vec<i16>>,
    /// A backfill that is to be ordered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) due: Option<Due>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Column {
    pub(super) number: i16,
    pub(super) name: String,
    pub(super) type_oid: u32,
    pub(super) typmod: i32,
    /// Whether older rows have a value in it that is not told to targets.
    pub(super) hidden: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) entry: Option<Entry>,
}

/// What the catalog's entry of a column tells about its rewriting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Entry {
    /// The transaction that wrote it. A change of the column's type writes it anew, to the same type too.
    pub(super) xid: u32,
    /// Whether older rows have a value in it that is only in the entry. A compaction writes it anew without.
    pub(super) missing: bool,
    /// The OID of its default, 0 for none. A change of the column's type makes another one, a compaction does not.
    pub(super) default: u32,
}

/// A backfill that is to be ordered once the stream has passed a place in the WAL.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Due {
    pub(super) id: String,
    #[serde(with = "millrace_event::as_text")]
    pub(super) lsn: Lsn,
}

/// A look at a table: what it is, and which of the partitions that came are empty.
pub(super) struct Look {
    pub(super) seen: Seen,
    pub(super) empty: Vec<u32>,
}

impl Seen {
    /// Whether a life that began with this table can go on with that one.
    pub(super) fn is_alike(&self, other: &Self) -> bool {
        let shape = |column: &Column| {
            let Column { number, name, .. } = column;
            let (type_oid, typmod) = (column.type_oid, column.typmod);
            (*number, name.clone(), type_oid, typmod)
        };
        (self.oid, &self.keys) == (other.oid, &other.keys)
            && self
                .columns
                .iter()
                .map(shape)
                .eq(other.columns.iter().map(shape))
    }

    /// The file of a partition, where it is known.
    fn file_of(&self, leaf: u32) -> Option<u32> {
        let mut files = self.leaf_files.iter().flatten();
        files.find(|(of, _)| *of == leaf).map(|(_, file)| *file)
    }

    /// Every name that columns had, as of this look.
    fn known_names(&self) -> Vec<(String, i16)> {
        let columns = self.columns.iter();
        let columns = columns.map(|column| (column.name.clone(), column.number));
        match self.names.is_empty() {
            // An older release remembered no others.
            true => columns.collect(),
            false => self.names.clone(),
        }
    }
}

impl Look {
    /// The partitions that came since.
    pub(super) fn came(&self, before: &Seen) -> Vec<u32> {
        let leaves = self.seen.leaves.iter().copied();
        leaves
            .filter(|leaf| !before.leaves.contains(leaf))
            .collect()
    }

    /// Leaves partitions to the next look.
    pub(super) fn leave(&mut self, leaves: &[u32]) {
        self.seen.leaves.retain(|leaf| !leaves.contains(leaf));
        let files = self.seen.leaf_files.iter_mut();
        files.for_each(|files| files.retain(|(leaf, _)| !leaves.contains(leaf)));
    }
}

/// What is remembered of a table from now on: as it was found, with the backfill that is due.
pub(super) fn remembered(before: Option<&Seen>, look: &Look, lsn: Lsn) -> Seen {
    let mut after = look.seen.clone();
    after.names = names(before, &look.seen);
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

/// The names of columns of then and of now.
fn names(before: Option<&Seen>, now: &Seen) -> Vec<(String, i16)> {
    let mut names = before.map_or_else(Vec::new, Seen::known_names);
    if before.is_some_and(|before| before.oid != now.oid) {
        names.iter_mut().for_each(|(_, number)| *number = 0);
    }
    let is_there = |name: &String| now.columns.iter().any(|column| column.name == *name);
    names.retain(|(name, _)| !is_there(name));
    let columns = now.columns.iter();
    names.extend(columns.map(|column| (column.name.clone(), column.number)));
    names.drain(..names.len().saturating_sub(NAMES_MAX));
    names
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
    // A truncate of a partition is told of its table only. One that was made and truncated since, with rows that
    // were told of, has another file than it was made with.
    let emptied = |leaf: &&u32| now.file_of(**leaf).is_some_and(|file| file != **leaf);
    let is_new = |leaf: &&u32| empty.contains(*leaf) && !emptied(leaf);
    if gone || !came.into_iter().all(|leaf| is_new(&leaf)) {
        return Some("a partition came or went");
    }
    let has_another_file = |leaf: &u32| {
        let then = before.file_of(*leaf);
        then.is_some() && then != now.file_of(*leaf)
    };
    if now.leaves.iter().any(has_another_file) {
        return Some("a partition was truncated or rewritten");
    }
    if let (Some(before), Some(now)) = (&before.attached, &now.attached) {
        let again = |(partition, xid): &(u32, u32)| {
            let mut before = before.iter();
            before.any(|(was, then)| was == partition && then != xid)
        };
        if now.iter().any(again) {
            return Some("a partition went and came back");
        }
    }
    if let (Some(before), Some(now)) = (&before.primary, &now.primary)
        && before != now
    {
        // Until it was found out, changes named their rows by the old one.
        return Some("it has another key");
    }
    let rewritten = before.files != now.files;
    let names = before.known_names();
    for column in &now.columns {
        let was = before
            .columns
            .iter()
            .find(|was| was.number == column.number);
        let mut named = names.iter().filter(|(name, _)| *name == column.name);
        if named.any(|(_, number)| *number != column.number) {
            return Some("a column has the name of another one");
        }
        match was {
            None if rewritten || column.hidden => return Some("a column came with values"),
            Some(was)
                if rewritten && (was.type_oid, was.typmod) != (column.type_oid, column.typmod) =>
            {
                return Some("a column has another type");
            }
            Some(was) if rewritten && is_rewritten(was.entry, column.entry) => {
                return Some("a column has other values");
            }
            _ => {}
        }
    }
    None
}

/// Whether a rewrite of the table may have been one of this column's values, and no compaction.
fn is_rewritten(before: Option<Entry>, now: Option<Entry>) -> bool {
    let (Some(before), Some(now)) = (before, now) else {
        return false;
    };
    // Without a default nothing tells a compaction that took the missing values in from a change of the type.
    let compacted =
        before.missing && !now.missing && before.default == now.default && now.default != 0;
    before.xid != now.xid && !compacted
}

#[cfg(test)]
mod tests;
