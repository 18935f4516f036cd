//! What each relation id means: which table, which columns, which key, which subjects.

use std::collections::HashMap;
use std::sync::Arc;

use millrace_event::{ColumnShape, Op, Relation, TableName, subject};

use crate::pgoutput::{self, ReplicaIdentity};
use crate::selection::{Binding, Selection};

/// A subject that messages are published on, by its place in [`Relations::subjects`]: a name that is
/// built once and referred to per message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SubjectId(pub u32);

/// A table that is published.
#[derive(Clone, Debug)]
pub(crate) struct Published {
    /// What its events look like.
    pub relation: Arc<Relation>,
    /// How many columns the WAL's rows have.
    pub wal_columns: usize,
    /// What makes the WAL's rows the published ones; `None` where they are.
    pub binding: Option<Binding>,
    described: Described,
    subjects: [SubjectId; Op::ALL.len()],
    /// Changes published since they were last asked for, by operation.
    counts: [u64; Op::ALL.len()],
}

/// How far a table is described to those who read its events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Described {
    /// No change of it came since it was announced. Left to either of the others.
    No,
    /// Only changes came that the stream has: an earlier life has described it. Left to `Here`, or to `No` where its
    /// rows have other columns.
    Earlier,
    /// A change came that the stream does not have: this life describes it. Left to `No` where its rows have other
    /// columns.
    Here,
}

impl Published {
    /// The subject of the table's events of this kind.
    #[must_use]
    pub(crate) fn subject(&self, op: Op) -> SubjectId {
        self.subjects[op as usize]
    }
}

/// What is done with the changes of a relation.
#[derive(Debug)]
pub(crate) enum Announced {
    /// They are published.
    Published(Published),
    /// Nobody wants them: the table is not configured.
    NotConfigured,
    /// They cannot be told apart by the table's key, so they are left out, and its rows are read again.
    LeftOut(RelationError),
}

/// Why the changes of a table cannot be told apart by its key. It has another one now than when they were made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RelationError {
    /// A key column is not among the published columns any more.
    #[error("changes of table {table} do not have its key column {column:?}")]
    KeyMissing {
        /// The table.
        table: TableName,
        /// The column.
        column: String,
    },
    /// A key column is NULL: it was in no key then.
    #[error("changes of table {table} have NULL in a key column")]
    KeyNull {
        /// The table.
        table: TableName,
    },
    /// Old rows would not carry the key: updates and deletes could not be told apart.
    #[error(
        "replica identity of changes of table {table} does not cover its key column {column:?}"
    )]
    KeyNotInIdentity {
        /// The table.
        table: TableName,
        /// The column.
        column: String,
    },
}

impl RelationError {
    /// The table.
    #[must_use]
    pub fn table(&self) -> &TableName {
        match self {
            Self::KeyMissing { table, .. }
            | Self::KeyNotInIdentity { table, .. }
            | Self::KeyNull { table } => table,
        }
    }
}

/// The relations that the WAL has announced.
#[derive(Debug)]
pub(crate) struct Relations {
    source: String,
    db: String,
    /// The configured tables with their key columns.
    keys: HashMap<TableName, Vec<String>>,
    /// What is done about columns of some of them.
    selections: HashMap<TableName, Arc<Selection>>,
    by_oid: HashMap<u32, Announced>,
    subjects: Vec<String>,
    subject_ids: HashMap<String, SubjectId>,
}

impl Relations {
    /// Begins with no relation announced.
    #[must_use]
    pub(crate) fn new(
        source: String,
        db: String,
        keys: HashMap<TableName, Vec<String>>,
        selections: HashMap<TableName, Arc<Selection>>,
    ) -> Self {
        let (by_oid, subjects, subject_ids) = (HashMap::new(), Vec::new(), HashMap::new());
        Self {
            source,
            db,
            keys,
            selections,
            by_oid,
            subjects,
            subject_ids,
        }
    }

    /// Every subject that a [`SubjectId`] refers to.
    #[must_use]
    pub(crate) fn subjects(&self) -> &[String] {
        &self.subjects
    }

    /// The id of a subject.
    pub(crate) fn subject(&mut self, name: String) -> SubjectId {
        let next = SubjectId(u32::try_from(self.subjects.len()).expect("five subjects a table"));
        *self.subject_ids.entry(name).or_insert_with_key(|name| {
            self.subjects.push(name.clone());
            next
        })
    }

    /// Takes an announcement.
    pub(crate) fn announce(&mut self, announced: &pgoutput::Relation<'_>) {
        // An empty schema stands for pg_catalog, which no publication can contain.
        let name = TableName::new(announced.schema, announced.table);
        let left_out = match self.key_of(&name, announced) {
            Ok(Some(key)) => return self.publish(name, key, announced),
            Ok(None) => Announced::NotConfigured,
            Err(error) => Announced::LeftOut(error),
        };
        self.by_oid.insert(announced.relid, left_out);
    }

    /// The places of a table's key columns among those that are published; `None` where it is not configured.
    fn key_of(
        &self,
        name: &TableName,
        announced: &pgoutput::Relation<'_>,
    ) -> Result<Option<Vec<usize>>, RelationError> {
        let Some(key_names) = self.keys.get(name) else {
            return Ok(None);
        };
        // The table had another primary key then, or has another one now: its rows are told apart by that.
        let identity = primary_key(announced).filter(|identity| {
            let covers = |name: &String| identity.contains(name);
            !key_names.iter().all(covers)
        });
        let key_names = identity.as_ref().unwrap_or(key_names);
        let selection = self.selections.get(name).map(Arc::as_ref);
        let published = |column: &pgoutput::RelationColumn<'_>| {
            let leaves_out = |selection: &Selection| selection.excludes(column.name);
            !selection.is_some_and(leaves_out)
        };
        let mut key = Vec::with_capacity(key_names.len());
        for column in key_names {
            let found = announced
                .columns
                .iter()
                .filter(|column| published(column))
                .enumerate()
                .find(|(_, known)| known.name == column);
            let Some((index, known)) = found else {
                return Err(RelationError::KeyMissing {
                    table: name.clone(),
                    column: column.clone(),
                });
            };
            if announced.identity != ReplicaIdentity::Full && !known.key {
                return Err(RelationError::KeyNotInIdentity {
                    table: name.clone(),
                    column: column.clone(),
                });
            }
            key.push(index);
        }
        Ok(Some(key))
    }

    fn publish(&mut self, name: TableName, key: Vec<usize>, announced: &pgoutput::Relation<'_>) {
        let selection = self.selections.get(&name).map(Arc::as_ref);
        let columns: Vec<_> = announced
            .columns
            .iter()
            .map(|column| ColumnShape {
                name: column.name,
                type_oid: column.type_oid,
                typmod: column.typmod,
            })
            .filter_map(|shape| match selection {
                Some(selection) => selection.published(shape),
                None => Some(shape),
            })
            .collect();
        let names = announced.columns.iter().map(|column| column.name);
        let binding = selection.and_then(|selection| selection.bind(names));
        let wal_columns = announced.columns.len();
        let relation = Arc::new(Relation::new(&self.source, &self.db, name, &columns, key));
        let known = self.by_oid.get_mut(&announced.relid);
        let mut counts = None;
        if let Some(Announced::Published(known)) = known {
            if known.relation == relation {
                // What is left out may have changed all the same, and a column may have come under its name.
                if (known.wal_columns, &known.binding) != (wal_columns, &binding) {
                    known.described = Described::No;
                }
                (known.wal_columns, known.binding) = (wal_columns, binding);
                return;
            }
            counts = Some(known.counts);
        }
        let subjects = Op::ALL.map(|op| {
            let name = subject::change(&self.source, relation.name(), op);
            self.subject(name)
        });
        let published = Published {
            relation,
            wal_columns,
            binding,
            described: Described::No,
            subjects,
            counts: counts.unwrap_or_default(),
        };
        self.by_oid
            .insert(announced.relid, Announced::Published(published));
    }

    /// The shape of a relation, at the first change of it that the stream does not have.
    pub(crate) fn take_new(&mut self, relid: u32) -> Option<Arc<Relation>> {
        let published = self.published_mut(relid)?;
        let before = std::mem::replace(&mut published.described, Described::Here);
        (before != Described::Here).then(|| Arc::clone(&published.relation))
    }

    /// The shape of a relation, at its first change, where the stream has that one.
    pub(crate) fn take_skipped(&mut self, relid: u32) -> Option<Arc<Relation>> {
        let published = self.published_mut(relid)?;
        if published.described != Described::No {
            return None;
        }
        published.described = Described::Earlier;
        Some(Arc::clone(&published.relation))
    }

    fn published_mut(&mut self, relid: u32) -> Option<&mut Published> {
        match self.by_oid.get_mut(&relid) {
            Some(Announced::Published(published)) => Some(published),
            _ => None,
        }
    }

    /// Counts a change that was published.
    pub(crate) fn count(&mut self, relid: u32, op: Op) {
        if let Some(published) = self.published_mut(relid) {
            published.counts[op as usize] += 1;
        }
    }

    /// Takes the changes published since the last time, by table and operation; zeros are left out.
    pub(crate) fn take_counts(&mut self) -> Vec<(TableName, Op, u64)> {
        let published = self
            .by_oid
            .values_mut()
            .filter_map(|announced| match announced {
                Announced::Published(published) => Some(published),
                Announced::NotConfigured | Announced::LeftOut(_) => None,
            });
        published
            .flat_map(|published| {
                let name = published.relation.name().clone();
                let counts = std::mem::take(&mut published.counts);
                Op::ALL
                    .into_iter()
                    .zip(counts)
                    .map(move |(op, count)| (name.clone(), op, count))
            })
            .filter(|(_, _, count)| *count > 0)
            .collect()
    }

    /// A relation, where it was announced.
    #[must_use]
    pub(crate) fn get(&self, relid: u32) -> Option<&Announced> {
        self.by_oid.get(&relid)
    }
}

/// The primary key as the WAL announces it; `None` where it announces none.
fn primary_key(announced: &pgoutput::Relation<'_>) -> Option<Vec<String>> {
    let columns = announced.columns.iter().filter(|column| column.key);
    let names: Vec<_> = columns.map(|column| column.name.to_owned()).collect();
    (announced.identity == ReplicaIdentity::Default && !names.is_empty()).then_some(names)
}

#[cfg(test)]
mod tests {
    use millrace_event::Column;

    use super::*;

    fn announced(identity: ReplicaIdentity, key: &'static [bool]) -> pgoutput::Relation<'static> {
        let columns = ["id", "name"]
            .into_iter()
            .zip(key)
            .map(|(name, key)| pgoutput::RelationColumn {
                key: *key,
                name,
                type_oid: 23,
                typmod: -1,
            })
            .collect();
        pgoutput::Relation {
            relid: 7,
            schema: "public",
            table: "t",
            identity,
            columns,
        }
    }

    fn relations(key: &str) -> Relations {
        selected(key, Selection::default())
    }

    fn selected(key: &str, selection: Selection) -> Relations {
        let table = TableName::new("public", "t");
        let keys = HashMap::from([(table.clone(), vec![key.to_owned()])]);
        let selections = HashMap::from([(table, Arc::new(selection))]);
        Relations::new("shop".to_owned(), "db".to_owned(), keys, selections)
    }

    fn published(relations: &Relations) -> &Published {
        let Some(Announced::Published(published)) = relations.get(7) else {
            panic!("it is published");
        };
        published
    }

    /// The shape that an announcement brings, if it is new.
    fn announce(
        relations: &mut Relations,
        message: &pgoutput::Relation<'_>,
    ) -> Option<Arc<Relation>> {
        relations.announce(message);
        relations.take_new(message.relid)
    }

    fn left_out(mut relations: Relations, message: &pgoutput::Relation<'_>) -> RelationError {
        assert!(announce(&mut relations, message).is_none());
        let Some(Announced::LeftOut(error)) = relations.get(7) else {
            panic!("it is left out");
        };
        error.clone()
    }

    #[test]
    fn a_shape_is_new_once() {
        let mut relations = relations("id");
        let message = announced(ReplicaIdentity::Default, &[true, false]);
        assert!(announce(&mut relations, &message).is_some());
        assert!(announce(&mut relations, &message).is_none());
        published(&relations);
        assert!(relations.get(8).is_none());
    }

    #[test]
    fn a_shape_of_skipped_changes_is_told_once_and_again_before_the_first_of_the_others() {
        let mut relations = relations("id");
        relations.announce(&announced(ReplicaIdentity::Default, &[true, false]));
        assert!(relations.take_skipped(7).is_some());
        assert!(relations.take_skipped(7).is_none());
        assert!(relations.take_new(7).is_some());
        assert!(relations.take_new(7).is_none());
        assert!(relations.take_skipped(7).is_none());
    }

    #[test]
    fn another_primary_key_tells_rows_apart() {
        let message = announced(ReplicaIdentity::Default, &[true, false]);
        let mut relations = relations("name");
        let relation = announce(&mut relations, &message).expect("new");
        assert_eq!(relation.key(), [0]);
        let both = announced(ReplicaIdentity::Default, &[true, true]);
        let relation = announce(&mut relations, &both).expect("new");
        assert_eq!(relation.key(), [1]);
    }

    #[test]
    fn changes_that_the_key_does_not_tell_apart_are_left_out() {
        let message = announced(ReplicaIdentity::Index, &[true, false]);
        let error = left_out(relations("name"), &message);
        assert!(
            matches!(error, RelationError::KeyNotInIdentity { .. }),
            "{error}"
        );
        let error = left_out(relations("gone"), &message);
        assert!(matches!(error, RelationError::KeyMissing { .. }), "{error}");
        assert_eq!(error.table(), &TableName::new("public", "t"));
        let message = announced(ReplicaIdentity::Full, &[true, true]);
        assert!(announce(&mut relations("name"), &message).is_some());
    }

    #[test]
    fn what_is_left_out_is_no_column_and_may_come_and_go() {
        let mut selection = Selection::default();
        selection.exclude("id");
        let mut relations = selected("name", selection);
        let full = announced(ReplicaIdentity::Full, &[true, true]);
        let shape = announce(&mut relations, &full).expect("new");
        let columns: Vec<_> = shape.columns().iter().map(Column::name).collect();
        assert_eq!((columns, shape.key()), (vec!["name"], &[0][..]));
        let found = published(&relations);
        assert_eq!(found.wal_columns, 2);
        assert!(!found.binding.as_ref().unwrap().keeps(0));

        // The column is gone: the shape is the same, the rows are not. Whether another has come under its name is
        // looked at before they are published.
        let mut narrow = full.clone();
        narrow.columns.remove(0);
        assert_eq!(announce(&mut relations, &narrow), Some(shape));
        assert_eq!(announce(&mut relations, &narrow), None);
        let found = published(&relations);
        assert_eq!((found.wal_columns, &found.binding), (1, &None));

        let mut relations = selected("id", Selection::default());
        announce(&mut relations, &full);
        let mut selection = Selection::default();
        selection.exclude("id");
        let error = left_out(selected("id", selection), &full);
        assert!(matches!(error, RelationError::KeyMissing { .. }), "{error}");
    }

    #[test]
    fn a_table_that_is_not_configured_is_known_and_not_published() {
        let (shop, db) = ("shop".to_owned(), "db".to_owned());
        let mut relations = Relations::new(shop, db, HashMap::new(), HashMap::new());
        let message = announced(ReplicaIdentity::Nothing, &[false, false]);
        assert!(announce(&mut relations, &message).is_none());
        assert!(matches!(relations.get(7), Some(Announced::NotConfigured)));
    }
}
