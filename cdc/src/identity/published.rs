//! What the publication published of each table, and what was kept back: remembered for the next start, so that it
//! tells a change of our configuration from one that somebody else made.

mod drift;

use std::collections::HashMap;
use std::sync::Arc;

use async_nats::jetstream::kv;
use millrace_config::{Code, Condition, Config};
use millrace_event::{TableName, subject, work};
use serde::{Deserialize, Serialize};

pub(crate) use self::drift::Drift;
use self::drift::Standing;
use super::{read, store};
use crate::life::Stream;
use crate::orders::{order_backfill, order_for_every_sink};
use crate::selection::{Mask, Selection};
use crate::source::{Clause, Member, SourceTable};
use crate::{Error, source};

/// The key of the tables that were in the publication.
const PUBLISHED_KEY: &str = "published";

/// How many names of columns that are kept back are remembered of a table, those it had before a rename included.
const WITHHELD_MAX: usize = 2000;

/// A table as it was published.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Remembered {
    #[serde(flatten)]
    table: TableName,
    /// The membership's OID.
    oid: u32,
    /// The publication's OID; zero where it is not known.
    #[serde(default, skip_serializing_if = "is_zero")]
    publication: u32,
    /// How it stands to the publication.
    #[serde(default, skip_serializing_if = "Standing::is_published")]
    standing: Standing,
    /// The columns and rows that the publication had of it.
    #[serde(default)]
    clause: Clause,
    /// What we were about to change it to. A crash in between leaves it here, and the change done or not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    intended: Option<Clause>,
    /// What did not travel as it is.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    withheld: Vec<Withheld>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn is_zero(oid: &u32) -> bool {
    *oid == 0
}

/// A column that did not travel as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Withheld {
    /// Its number in the catalog, which outlasts its name.
    number: i16,
    /// The name that it had.
    name: String,
    /// What was done about it.
    by: String,
}

/// What becomes of a column that is left out.
const EXCLUDED: &str = "exclude";

/// What an earlier life published.
pub(crate) struct Earlier(HashMap<TableName, Remembered>);

impl Earlier {
    /// Reads what was remembered.
    ///
    /// # Errors
    /// The broker is away, or what it holds is not understood.
    pub(crate) async fn read(stream: &Stream) -> Result<Self, Error> {
        let members: Option<Vec<Remembered>> = read(&stream.state, PUBLISHED_KEY).await?;
        let members = members.unwrap_or_default().into_iter();
        Ok(Self(
            members
                .map(|member| (member.table.clone(), member))
                .collect(),
        ))
    }

    /// Holds the configured columns against those that were kept back before: a column that was renamed is still
    /// kept back under the name that older WAL has for it, and must be named anew for what follows.
    ///
    /// # Errors
    /// A column that is kept back was renamed, or the table's file names a column that never was.
    pub(crate) fn carry_over(&self, tables: &mut [SourceTable]) -> Result<(), Error> {
        for table in tables {
            let withheld = self.0.get(&table.name).map(|member| &*member.withheld);
            carry_over(table, withheld.unwrap_or_default()).map_err(Error::halt)?;
        }
        Ok(())
    }

    /// The publication that was captured, where it is known.
    pub(crate) fn publication(&self) -> Option<u32> {
        let mut members = self.0.values();
        members
            .find(|member| member.standing != Standing::Beside && member.publication != 0)
            .map(|member| member.publication)
    }

    /// Tables that were captured and are not configured any more.
    pub(crate) fn removed<'e>(
        &'e self,
        tables: &'e [SourceTable],
    ) -> impl Iterator<Item = &'e TableName> {
        let removed = self.0.values().filter(|member| {
            member.standing != Standing::Beside
                && !tables.iter().any(|table| table.name == member.table)
        });
        removed.map(|member| &member.table)
    }

    /// Remembers that tables have left the publication.
    ///
    /// # Errors
    /// The broker is away.
    pub(crate) async fn lose(
        &mut self,
        stream: &Stream,
        drift: &Drift,
        now_us: i64,
    ) -> Result<(), Error> {
        let mut news = false;
        for (table, _) in &drift.lost {
            let Some(member) = self.0.get_mut(table) else {
                continue;
            };
            if member.standing.is_published() {
                member.standing = Standing::Lost { since_us: now_us };
                news = true;
            }
        }
        if !news {
            return Ok(());
        }
        let members: Vec<_> = self.0.values().cloned().collect();
        write(stream, &members).await
    }

    /// Remembers what the publication is about to be changed to.
    ///
    /// # Errors
    /// The broker is away.
    pub(crate) async fn intend(
        &self,
        stream: &Stream,
        altered: &[TableName],
        tables: &[SourceTable],
    ) -> Result<(), Error> {
        let mut members: Vec<_> = self.0.values().cloned().collect();
        for member in &mut members {
            if altered.contains(&member.table) {
                let table = tables.iter().find(|table| table.name == member.table);
                member.intended = table.map(SourceTable::clause);
            }
        }
        write(stream, &members).await
    }

    /// Remembers what is published from now on, and orders a backfill of the tables whose rows were captured under
    /// another selection, or not at all for a while.
    ///
    /// # Errors
    /// The broker is away.
    pub(crate) async fn remember(
        &self,
        config: &Config,
        stream: &Stream,
        now: Published,
        tables: &[SourceTable],
        drift: &Drift,
    ) -> Result<(), Error> {
        let mut changes = Vec::new();
        let publication = now.publication;
        let lost = |table: &TableName| drift.has_lost(table);
        let members = now.members.into_iter().filter(|(name, _)| !lost(name));
        let members = members.map(|(name, member)| {
            let before = self.0.get(&name);
            let table = tables.iter().find(|table| table.name == name);
            let withheld = match (table, before) {
                (Some(table), _) => withheld(table, before),
                // Not configured now: what is known of it stays.
                (None, before) => before
                    .map(|before| before.withheld.clone())
                    .unwrap_or_default(),
            };
            let after = Remembered {
                table: name,
                oid: member.oid,
                publication,
                standing: match table {
                    Some(_) => Standing::Published,
                    None => Standing::Beside,
                },
                clause: member.clause,
                intended: None,
                withheld,
            };
            if let (Some(table), Some(before)) = (table, before)
                && before.standing.is_published()
                && !drift.has_back(&after.table)
            {
                changes.extend(change(table, before, &after));
            }
            after
        });
        let mut members: Vec<_> = members.collect();
        // Said and ordered first: a crash must not swallow it. The membership's OID is another after each change.
        for change in &changes {
            change.warn();
            let member = members.iter().find(|member| member.table == change.table);
            let oid = member.map_or(0, |member| member.oid);
            let id = format!("selection-{oid}");
            order_backfill(config, &stream.copies, &change.table, &id).await?;
        }
        for (table, id) in &drift.back {
            tracing::warn!(
                %table, code = Code::PublicationDrift.as_str(),
                "table {table} was out of the publication for a while: its rows are read again"
            );
            order_backfill(config, &stream.copies, table, id).await?;
        }
        for table in self.removed(tables) {
            // A sink that sees it configured without a break, because it did not run meanwhile, must read it again.
            let id = format!(
                "removed-{}",
                self.0.get(table).map_or(0, |member| member.oid)
            );
            order_for_every_sink(config, &stream.copies, table, &id).await?;
            tracing::info!(%table, "the table is not captured any more");
        }
        for before in self.0.values() {
            let kept = match members.iter().any(|member| member.table == before.table) {
                true => None,
                false if lost(&before.table) => Some(before.standing),
                // Older WAL may still have it, once it is configured again.
                false if !before.withheld.is_empty() => Some(Standing::Beside),
                false => None,
            };
            members.extend(kept.map(|standing| Remembered {
                standing,
                intended: None,
                ..before.clone()
            }));
        }
        write(stream, &members).await
    }
}

/// A publication, as it was found.
pub(crate) struct Published {
    /// Its OID.
    pub(crate) publication: u32,
    /// The tables that it publishes.
    pub(crate) members: HashMap<TableName, Member>,
}

/// The tables that somebody took out of the publication, as capture has noticed: their replicas lack changes.
///
/// # Errors
/// The broker is away, or what it holds is not understood.
pub async fn unpublished(
    jetstream: &async_nats::jetstream::Context,
    source: &str,
) -> Result<Vec<TableName>, Error> {
    let bucket = subject::bucket_name(source, work::STATE);
    // Where there is no bucket yet nothing was ever published. Any other answer says nothing about it.
    let found = crate::stream::find_stream(jetstream, &format!("KV_{bucket}")).await?;
    if found.is_none() {
        return Ok(Vec::new());
    }
    let state = jetstream.get_key_value(bucket).await;
    let state = state
        .map_err(|error| Error::retry("what was stored beside the stream cannot be read", error))?;
    let members: Option<Vec<Remembered>> = read(&state, PUBLISHED_KEY).await?;
    let members = members.unwrap_or_default().into_iter();
    let lost = members.filter(|member| matches!(member.standing, Standing::Lost { .. }));
    Ok(lost.map(|member| member.table).collect())
}

/// Forgets that a table was published: another one has its name now, which is published as a new one is.
///
/// # Errors
/// The broker is away.
pub(crate) async fn forget(state: &kv::Store, table: &TableName) -> Result<(), Error> {
    let members: Option<Vec<Remembered>> = read(state, PUBLISHED_KEY).await?;
    let mut members = members.unwrap_or_default();
    members.retain(|member| member.table != *table);
    let value = serde_json::to_vec(&members).expect("plain JSON");
    store(state, PUBLISHED_KEY, value).await
}

async fn write(stream: &Stream, members: &[Remembered]) -> Result<(), Error> {
    let value = serde_json::to_vec(members).expect("plain JSON");
    store(&stream.state, PUBLISHED_KEY, value).await
}

/// A table whose rows in the stream and in the replicas were captured under another selection: they are right again
/// once the table is copied anew.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SelectionChange {
    /// The table.
    pub(crate) table: TableName,
    /// What has changed, in words.
    pub(crate) what: String,
}

impl SelectionChange {
    fn warn(&self) {
        let Self { table, what } = self;
        tracing::warn!(
            %table,
            code = Code::SelectionChanged.as_str(),
            "the selection of table {table} was changed ({what}): its rows are read again"
        );
    }
}

/// What a table withholds, and what is remembered of names that it had.
fn withheld(table: &SourceTable, before: Option<&Remembered>) -> Vec<Withheld> {
    let current = table.known.iter().filter_map(|(number, name)| {
        Some(Withheld {
            number: *number,
            name: name.clone(),
            by: word(&table.selection, name)?,
        })
    });
    let mut withheld: Vec<_> = current.collect();
    let earlier = before.into_iter().flat_map(|before| &before.withheld);
    for earlier in earlier {
        let gone = !table.known.iter().any(|(_, name)| *name == earlier.name);
        let known = withheld.iter().any(|known| known.name == earlier.name);
        if gone && !known && withheld.len() < WITHHELD_MAX {
            withheld.push(earlier.clone());
        }
    }
    withheld
}

/// What is done about a column, so that a change of it is noticed.
fn word(selection: &Selection, name: &str) -> Option<String> {
    if selection.excludes(name) {
        return Some(EXCLUDED.to_owned());
    }
    Some(match selection.mask_of(name)? {
        Mask::Hash(salt) => format!("hash:{}", salt.fingerprint()),
        Mask::Text => "redact".to_owned(),
        Mask::Null => "redact:null".to_owned(),
        Mask::Truncate(characters) => format!("truncate:{characters}"),
    })
}

fn change(table: &SourceTable, before: &Remembered, after: &Remembered) -> Option<SelectionChange> {
    let mut what = Vec::new();
    if before.clause.filter != after.clause.filter {
        what.push("another `where`".to_owned());
    }
    for (number, name) in &table.known {
        let by = |of: &Remembered| {
            let found = of
                .withheld
                .iter()
                .find(|withheld| withheld.number == *number);
            found.map(|withheld| withheld.by.clone())
        };
        let listed = |of: &Remembered| {
            let columns = of.clause.columns.as_ref();
            columns.is_none_or(|columns| columns.contains(number))
        };
        let (was, is) = (by(before), by(after));
        let excluded = |by: &Option<String>| by.as_deref() == Some(EXCLUDED);
        match (excluded(&was), excluded(&is)) {
            (true, false) => what.push(format!("column {name:?} came in")),
            (false, true) => what.push(format!("column {name:?} is left out")),
            (true, true) => {}
            // One that was added at the source, and that the column list kept out until now.
            (false, false) if !listed(before) && listed(after) => {
                what.push(format!("column {name:?} came in"));
            }
            (false, false) if was != is => what.push(format!("another mask of column {name:?}")),
            (false, false) => {}
        }
    }
    let table = table.name.clone();
    (!what.is_empty()).then(|| SelectionChange {
        table,
        what: what.join(", "),
    })
}

fn carry_over(table: &mut SourceTable, before: &[Withheld]) -> Result<(), Condition> {
    let mut selection = Selection::clone(&table.selection);
    for Withheld { number, name, .. } in before {
        // A column of that name is spoken of by the configuration.
        if table.known.iter().any(|(_, known)| known == name) {
            continue;
        }
        match table.name_of(*number) {
            Some(now) if selection.excludes(now) => selection.exclude(name),
            Some(now) => match selection.mask_of(now).cloned() {
                Some(mask) => selection.mask(name, mask),
                None if names(table, name) => {
                    return Err(source::renamed_column(&table.settings, name, now));
                }
                // The configuration speaks of neither: it was let go.
                None => continue,
            },
            // It was dropped: only older WAL has it.
            None => {
                if table.absent.contains(name) {
                    tracing::warn!(table = %table.name, column = name, "a column that the table's file names was dropped");
                }
                selection.exclude(name);
            }
        }
        table.absent.retain(|absent| absent != name);
    }
    table.selection = Arc::new(selection);
    match table.absent.is_empty() {
        true => Ok(()),
        false => Err(source::unknown_columns(&table.settings, &table.absent)),
    }
}

/// Whether a table's settings exclude or mask a column of this name.
fn names(table: &SourceTable, name: &str) -> bool {
    let columns = &table.settings.columns;
    columns.exclude.iter().any(|column| column == name)
        || columns.mask.iter().any(|(column, _)| column == name)
}

#[cfg(test)]
mod tests;
