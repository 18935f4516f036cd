//! A batch's steps as statements with their parameters.

use std::collections::{BTreeMap, HashMap, HashSet};

use millrace_event::{TableName, Version};
use tokio_postgres::Statement;

use super::inserts::Inserts;
use super::load::Format;
use super::parameters::{
    BinaryColumn, KeyColumn, Parameter, Text, TextColumn, Uuid, VersionColumn, cells,
};
use super::session::{Forms, Kind, Session};
use crate::batch::{Action, Move, RowOp, Step, TableRows};
use crate::load::Load;
use crate::row::{Cell, TableLayout, is_full};
use crate::sink::SinkError;
use crate::sql::{self, Form, Present};

/// What a statement's row count means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Counts {
    /// Rows inserted, updated or moved.
    Upserted,
    /// Rows deleted.
    Deleted,
    /// Rows set aside.
    Letters,
    /// Nothing that is reported.
    Nothing,
}

/// One statement to run.
pub(super) struct Command<'a> {
    pub(super) layout: &'a TableLayout,
    pub(super) statement: Statement,
    pub(super) parameters: Vec<Parameter<'a>>,
    pub(super) counts: Counts,
    /// The rows that follow a COPY.
    pub(super) load: Option<(&'a Load, Format)>,
}

/// Rows of one table that one set of statements writes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Group<'a> {
    /// Rows that are gone.
    Delete,
    /// Rows of which only these columns are known.
    Partial(&'a Present),
    /// Whole rows.
    Full,
    /// Whole rows of keys that the target should not have. Always behind a [`Group::Full`] of the same table,
    /// be it empty: its statement fails where the key has no unique index, which an insert would not notice.
    New,
}

/// Makes the text of a statement that writes full rows.
type FullRowsSql = fn(&TableLayout, &[Form]) -> String;

/// One table's rows of a step, by how they are written. In this order: a delete frees a key that another
/// spelling of it (`1.0` and `1.00`) may take.
#[derive(Default)]
pub(super) struct Sorted<'a> {
    pub(super) deletes: Vec<&'a RowOp>,
    pub(super) partials: BTreeMap<Present, Vec<&'a RowOp>>,
    pub(super) full: Vec<&'a RowOp>,
    pub(super) new: Vec<&'a RowOp>,
    /// Rows at or below the truncate floor.
    pub(super) stale: u64,
}

impl<'a> Sorted<'a> {
    pub(super) fn new(table: &'a TableRows, floors: &HashMap<String, Version>) -> Self {
        let floor = floors
            .get(&table.layout.relation())
            .copied()
            .unwrap_or(Version::ZERO);
        let mut sorted = Self::default();
        for op in &table.rows {
            match &op.action {
                _ if op.version <= floor => sorted.stale += 1,
                Action::Delete { .. } => sorted.deletes.push(op),
                Action::Put(row) if is_full(row) => sorted.full.push(op),
                Action::Put(row) => sorted.partials.entry(present(row)).or_default().push(op),
            }
        }
        sorted
    }

    /// Takes the rows that the source made apart, if they may be written by a plain insert.
    pub(super) fn with_inserts(mut self, layout: &TableLayout, inserts: &mut Inserts) -> Self {
        let created = self.full.iter().filter(|op| op.created).count();
        if inserts.may(&layout.relation(), created) {
            (self.new, self.full) = self.full.iter().partition(|op| op.created);
        }
        self
    }

    /// The groups that are not empty, in order.
    pub(super) fn groups(&self) -> Vec<(Group<'_>, &[&'a RowOp])> {
        let mut groups: Vec<(Group<'_>, &[&'a RowOp])> = vec![(Group::Delete, &self.deletes)];
        groups.extend(
            self.partials
                .iter()
                .map(|(present, ops)| (Group::Partial(present), &**ops)),
        );
        groups.retain(|(_, ops)| !ops.is_empty());
        if !(self.full.is_empty() && self.new.is_empty()) {
            groups.push((Group::Full, &self.full));
        }
        if !self.new.is_empty() {
            groups.push((Group::New, &self.new));
        }
        groups
    }
}

/// The columns of a row that are known.
pub(super) fn present(row: &[Cell]) -> Present {
    (0..row.len())
        .filter(|column| row[*column] != Cell::Missing)
        .collect()
}

/// Makes commands, preparing their statements.
pub(super) struct Commands<'a, 's> {
    pub(super) session: &'s mut Session,
    pub(super) sink: &'a str,
    pub(super) list: Vec<Command<'a>>,
    /// Relations that may have got a dead letter in this batch.
    pub(super) touched: HashSet<String>,
}

impl<'a, 's> Commands<'a, 's> {
    pub(super) fn new(session: &'s mut Session, sink: &'a str) -> Self {
        session.end_step();
        Self {
            session,
            sink,
            list: Vec::new(),
            touched: HashSet::new(),
        }
    }

    async fn add(
        &mut self,
        layout: &'a TableLayout,
        counts: Counts,
        kind: Kind,
        sql: impl FnOnce() -> String,
        parameters: Vec<Parameter<'a>>,
    ) -> Result<(), SinkError> {
        let statement = self.session.prepare(layout, kind, sql).await?;
        self.list.push(Command {
            layout,
            statement,
            parameters,
            counts,
            load: None,
        });
        Ok(())
    }

    /// The statements that take a load's rows.
    pub(super) async fn load(&mut self, load: &'a Load) -> Result<(), SinkError> {
        let layout = &*load.layout;
        // Writes nothing, and fails where the key has no unique index: COPY would not notice.
        if !self.session.keyless.has(&layout.relation()) {
            self.group(layout, Group::Full, &[]).await?;
        }
        let format = match self.session.load_texts.contains(&layout.relation()) {
            true => Format::Text,
            false => Format::of(layout),
        };
        let (kind, binary) = (Kind::Load(format.is_binary()), format.is_binary());
        let sql = || sql::copy(layout, binary);
        self.add(layout, Counts::Upserted, kind, sql, Vec::new())
            .await?;
        if let Some(command) = self.list.last_mut() {
            command.load = Some((load, format));
        }
        Ok(())
    }

    /// The statements that write a group of rows.
    pub(super) async fn group(
        &mut self,
        layout: &'a TableLayout,
        group: Group<'_>,
        ops: &'a [&'a RowOp],
    ) -> Result<(), SinkError> {
        let rows = |columns: &[usize]| columns_of(ops, columns);
        match group {
            Group::Delete => {
                let (sql, keys) = (|| sql::delete(layout), rows(&layout.key));
                self.add(layout, Counts::Deleted, Kind::Delete, sql, keys)
                    .await?;
                let sql = || sql::tombstone(layout);
                let keys = keys_of(ops);
                self.add(layout, Counts::Nothing, Kind::Tombstone, sql, keys)
                    .await?;
                let newest = ops.iter().map(|op| op.version).max().unwrap_or_default();
                let buried = self.session.buried.entry(layout.relation()).or_default();
                *buried = newest.max(*buried);
            }
            Group::Partial(present) => {
                self.touched.insert(layout.relation());
                let columns: Vec<_> = present.iter().copied().collect();
                let uncovered = self.session.copied.uncovered_below(&layout.source);
                let mut parameters = rows(&columns);
                parameters.push(Box::new(KeyColumn(ops)));
                parameters.push(Box::new(Uuid(uncovered)));
                parameters.push(Box::new(self.sink));
                let kind = Kind::PartialLetters(present.clone());
                let sql = || sql::partial_letters(layout, present);
                self.add(layout, Counts::Letters, kind, sql, parameters)
                    .await?;
                let kind = Kind::Partial(present.clone());
                let sql = || sql::partial(layout, present);
                let mut parameters = rows(&columns);
                parameters.push(Box::new(KeyColumn(ops)));
                parameters.push(Box::new(Uuid(uncovered)));
                self.add(layout, Counts::Upserted, kind, sql, parameters)
                    .await?;
                return Ok(());
            }
            Group::Full | Group::New => {
                let (forms, mut parameters) = full_rows(layout, ops);
                let is_new = matches!(group, Group::New);
                let (kind, text): (fn(Forms) -> Kind, FullRowsSql) =
                    match (self.are_newest(layout, ops), is_new) {
                        (true, true) => (Kind::Insert, sql::insert),
                        (true, false) => (Kind::UpsertNewest, sql::upsert_newest),
                        (false, _) => {
                            parameters.push(Box::new(KeyColumn(ops)));
                            (Kind::Upsert, sql::upsert)
                        }
                    };
                let (kind, sql) = (kind(forms.clone()), || text(layout, &forms));
                self.add(layout, Counts::Upserted, kind, sql, parameters)
                    .await?;
            }
        }
        let relation = layout.relation();
        let has_letters =
            self.touched.contains(&relation) || self.session.letters.contains(&relation);
        if has_letters && !ops.is_empty() {
            let sql = || sql::resolve(layout);
            self.add(layout, Counts::Nothing, Kind::Resolve, sql, keys_of(ops))
                .await?;
        }
        Ok(())
    }

    /// Whether these rows are newer than every tombstone of their table. In the stream's order every row is
    /// newer than every delete before it, so no look for tombstones is needed.
    fn are_newest(&self, layout: &TableLayout, ops: &[&RowOp]) -> bool {
        let oldest = ops.iter().map(|op| op.version).min();
        let entombed = self.session.tombstones.get(&layout.relation());
        entombed
            .zip(oldest)
            .is_none_or(|(newest, oldest)| *newest < oldest)
    }

    /// The statements that move one row.
    pub(super) async fn move_row(&mut self, moved: &'a Move) -> Result<(), SinkError> {
        let (layout, row) = (&*moved.layout, &moved.row);
        self.touched.insert(layout.relation());
        let present = present(&row.row);
        let uncovered = self.session.copied.uncovered_below(&layout.source);
        let parameters = || {
            let mut all: Vec<Parameter<'a>> = Vec::with_capacity(present.len() + 4);
            all.extend(present.iter().map(|column| text(&row.row[*column])));
            all.extend(layout.key.iter().map(|column| text(&row.old[*column])));
            all.push(Box::new(Uuid(row.version)));
            all.push(Box::new(row.key.text()));
            all.push(Box::new(row.old_key.text()));
            all.push(Box::new(Uuid(uncovered)));
            all
        };
        let mut with_sink = parameters();
        with_sink.push(Box::new(self.sink));
        let kind = Kind::MoveLetter(present.clone());
        let sql = || sql::move_letter(layout, &present);
        self.add(layout, Counts::Letters, kind, sql, with_sink)
            .await?;
        let kind = Kind::Move(present.clone());
        let sql = || sql::move_row(layout, &present);
        self.add(layout, Counts::Upserted, kind, sql, parameters())
            .await
    }

    /// The statements of a truncate or a sweep.
    pub(super) async fn below(
        &mut self,
        layout: &'a TableLayout,
        version: Version,
        below: Below,
    ) -> Result<(), SinkError> {
        // It reads the whole table, however large: no timeout for the rest of this transaction.
        let unbounded = || sql::UNBOUNDED.to_owned();
        self.add(
            layout,
            Counts::Nothing,
            Kind::Unbounded,
            unbounded,
            Vec::new(),
        )
        .await?;
        if below != Below::Records {
            let sql = || sql::delete_below(layout);
            let parameters: Vec<Parameter<'a>> = vec![Box::new(Uuid(version))];
            self.add(layout, Counts::Nothing, Kind::DeleteBelow, sql, parameters)
                .await?;
        }
        let mut general = vec![
            (Kind::TombstonesBelow, sql::TOMBSTONES_BELOW),
            (Kind::LettersBelow, sql::LETTERS_BELOW),
        ];
        if below == Below::Ever {
            general.push((Kind::Floor, sql::TRUNCATE_FLOOR));
            self.session.floors.insert(layout.relation(), version);
        }
        for (kind, text) in general {
            let parameters: Vec<Parameter<'a>> =
                vec![Box::new(layout.relation()), Box::new(Uuid(version))];
            self.add(
                layout,
                Counts::Nothing,
                kind,
                || text.to_owned(),
                parameters,
            )
            .await?;
        }
        Ok(())
    }

    /// The statements of a truncate: nothing where a later one is known.
    pub(super) async fn truncate(
        &mut self,
        layout: &'a TableLayout,
        version: Version,
    ) -> Result<(), SinkError> {
        let floor = self.session.floors.get(&layout.relation());
        if floor.is_some_and(|floor| version <= *floor) {
            return Ok(());
        }
        self.below(layout, version, Below::Ever).await
    }

    /// The statements of a step that is not about single rows; false for one that is.
    pub(super) async fn whole(&mut self, step: &'a Step) -> Result<bool, SinkError> {
        match step {
            Step::Rows(_) | Step::Load(_) | Step::Move(_) => return Ok(false),
            Step::Truncate(tables) => {
                for (layout, version) in tables {
                    self.truncate(layout, *version).await?;
                }
            }
            Step::Sweep {
                table,
                below,
                keeps_rows,
            } => {
                let pure = &self.session.pure;
                let what = if *keeps_rows || pure.has_none_below(&table.relation(), *below) {
                    Below::Records
                } else {
                    Below::Now
                };
                self.below(table, *below, what).await?;
            }
        }
        Ok(true)
    }
}

fn text(cell: &Cell) -> Parameter<'_> {
    Box::new(Text(cell))
}

fn keys_of<'a>(ops: &'a [&'a RowOp]) -> Vec<Parameter<'a>> {
    vec![Box::new(VersionColumn(ops)), Box::new(KeyColumn(ops))]
}

/// An array for each column, in its binary form where all its values have one, then the versions.
fn full_rows<'a>(layout: &TableLayout, ops: &'a [&'a RowOp]) -> (Forms, Vec<Parameter<'a>>) {
    let mut forms = Vec::with_capacity(layout.columns.len());
    let mut parameters: Vec<Parameter<'a>> = Vec::with_capacity(layout.columns.len() + 2);
    for (at, column) in layout.columns.iter().enumerate() {
        let (form, parameter): (_, Parameter<'a>) =
            match BinaryColumn::new(Form::of(&column.cast), ops, at) {
                Some(binary) => (binary.form(), Box::new(binary)),
                None => (Form::Text, Box::new(TextColumn { ops, column: at })),
            };
        forms.push(form);
        parameters.push(parameter);
    }
    parameters.push(Box::new(VersionColumn(ops)));
    (forms, parameters)
}

/// A text array for each of these columns, then the versions.
fn columns_of<'a>(ops: &'a [&'a RowOp], columns: &[usize]) -> Vec<Parameter<'a>> {
    let mut parameters: Vec<Parameter<'a>> = Vec::with_capacity(columns.len() + 2);
    for column in columns {
        parameters.push(Box::new(TextColumn {
            ops,
            column: *column,
        }));
    }
    parameters.push(Box::new(VersionColumn(ops)));
    parameters
}

/// Whether two moves' rows are above their table's floor.
pub(super) fn is_above_floor(floors: &HashMap<String, Version>, moved: &Move) -> bool {
    floors
        .get(&moved.layout.relation())
        .is_none_or(|floor| *floor < moved.row.version)
}

/// A row as a JSON object of texts, under the target's names.
pub(super) fn event(layout: &TableLayout, op: &RowOp) -> serde_json::Value {
    let columns = layout.columns.iter().zip(cells(op).iter());
    columns
        .filter_map(|(column, cell)| {
            let value = match cell {
                Cell::Missing => return None,
                Cell::Null => serde_json::Value::Null,
                Cell::Text(text) => String::from_utf8_lossy(text).into_owned().into(),
            };
            Some((column.target.clone(), value))
        })
        .collect::<serde_json::Map<_, _>>()
        .into()
}

/// What goes of a table below a version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Below {
    /// Tombstones and dead letters.
    Records,
    /// Rows too.
    Now,
    /// And whatever still comes.
    Ever,
}

/// The table a command is about.
pub(super) fn table<'c>(command: &'c Command<'_>) -> &'c TableName {
    &command.layout.source
}
