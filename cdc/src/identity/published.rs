//! What the publication published of each table, and what was kept back: remembered for the next start, so that it
//! tells a change of our configuration from one that somebody else made.

mod drift;
mod selected;

use std::collections::HashMap;

use async_nats::jetstream::kv::{self, Operation};
use millrace_config::{Code, Config, Table};
use millrace_event::{TableName, subject, work};
use serde::{Deserialize, Serialize};

pub(crate) use self::drift::Drift;
use self::drift::Standing;
use self::selected::{SelectionChange, Withheld, carry_over, change, withheld};
use super::{read, store};
use crate::Error;
use crate::life::Stream;
use crate::orders::{Cause, order_backfill};
use crate::source::{Clause, Member, SourceTable};
use crate::understood;

/// The key of the tables that were in the publication.
const PUBLISHED_KEY: &str = "published";

/// A table as it was published.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Remembered {
    #[serde(flatten)]
    table: TableName,
    /// The OID of the membership that publishes it.
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

/// What an earlier life published.
pub(crate) struct Earlier {
    members: HashMap<TableName, Remembered>,
    /// The revision of the memory that says so: orders are named after it.
    revision: u64,
}

impl Earlier {
    /// Reads what was remembered.
    ///
    /// # Errors
    /// The broker is away, or what it holds is not understood.
    pub(crate) async fn read(stream: &Stream) -> Result<Self, Error> {
        let entry = crate::stream::entry(&stream.state, PUBLISHED_KEY).await;
        let failed = |error| Error::retry("what was published cannot be read", error);
        let entry = entry.map_err(failed)?;
        let revision = entry.as_ref().map_or(0, |entry| entry.revision);
        let entry = entry.filter(|entry| entry.operation == Operation::Put);
        let members: Vec<Remembered> = match entry {
            Some(entry) => understood(&stream.state.name, PUBLISHED_KEY, &entry.value)?,
            None => Vec::new(),
        };
        let members = members.into_iter();
        let members = members.map(|member| (member.table.clone(), member));
        Ok(Self {
            members: members.collect(),
            revision,
        })
    }

    /// Stores `members` for the next life. From here on orders are named after this revision: a crash that comes
    /// now finds the same one.
    async fn write(&mut self, stream: &Stream, members: &[Remembered]) -> Result<(), Error> {
        let value = serde_json::to_vec(members).expect("plain JSON");
        let put = stream.state.put(PUBLISHED_KEY, value.into()).await;
        self.revision =
            put.map_err(|error| Error::retry("nothing can be stored beside the stream", error))?;
        Ok(())
    }

    /// The same of what this knows.
    async fn write_own(&mut self, stream: &Stream) -> Result<(), Error> {
        let members: Vec<_> = self.members.values().cloned().collect();
        self.write(stream, &members).await
    }

    /// Holds the configured columns against those that were kept back before: a column that was renamed is still
    /// kept back under the name that older WAL has for it, and must be named anew for what follows.
    ///
    /// # Errors
    /// A column that is kept back was renamed, or the table's file names a column that never was.
    pub(crate) fn carry_over(&self, tables: &mut [SourceTable]) -> Result<(), Error> {
        for table in tables {
            let before = self.members.get(&table.name);
            table.published = before.map(|before| (before.oid, before.clause.filter.clone()));
            let withheld = before.map(|member| &*member.withheld);
            carry_over(table, withheld.unwrap_or_default()).map_err(Error::halt)?;
        }
        Ok(())
    }

    /// Says what memberships publish that nobody can read now, where that is known.
    pub(crate) fn recall(&self, members: &mut HashMap<TableName, Member>) {
        for (table, member) in members.iter_mut().filter(|(_, member)| member.unread) {
            let before = self.members.get(table);
            if let Some(before) = before.filter(|before| before.oid == member.oid) {
                member.clause.filter.clone_from(&before.clause.filter);
                member.unread = member.clause.filter.is_none();
            }
        }
    }

    /// The publication that was captured, where it is known.
    pub(crate) fn publication(&self) -> Option<u32> {
        let mut members = self.members.values();
        members
            .find(|member| member.standing != Standing::Beside && member.publication != 0)
            .map(|member| member.publication)
    }

    /// Tables that were captured and are not configured any more.
    fn removed<'e>(&'e self, tables: &'e [Table]) -> impl Iterator<Item = &'e Remembered> {
        self.members.values().filter(|member| {
            member.standing != Standing::Beside
                && !tables.iter().any(|table| table.name == member.table)
        })
    }

    /// Tables that are still to be taken out of the publication.
    pub(crate) fn leaving(&self) -> Vec<TableName> {
        let leaving = self.members.values();
        let leaving = leaving.filter(|member| member.standing == Standing::Leaving);
        leaving.map(|member| member.table.clone()).collect()
    }

    /// Lets the tables go that are not configured any more: says which, and orders that whoever has them reads them
    /// again once they are back. Only then they may be taken out of the publication.
    ///
    /// # Errors
    /// The broker is away.
    pub(crate) async fn let_go(
        &mut self,
        config: &Config,
        stream: &Stream,
    ) -> Result<Vec<TableName>, Error> {
        let removed = self.removed(&config.tables);
        let removed: Vec<_> = removed.map(|member| member.table.clone()).collect();
        let mut news = false;
        for table in &removed {
            let member = self.members.get_mut(table).expect("just found");
            if member.standing == Standing::Leaving {
                continue;
            }
            // A sink that sees it configured without a break, because it did not run meanwhile, must read it again.
            let id = Cause::Removed.order_id(table, self.revision);
            order_backfill(config, stream, table, &id).await?;
            tracing::info!(%table, "the table is not captured any more");
            member.standing = Standing::Leaving;
            news = true;
        }
        if news {
            self.write_own(stream).await?;
        }
        Ok(removed)
    }

    /// Remembers that a table is as far out of the publication as we can take it.
    ///
    /// # Errors
    /// The broker is away.
    pub(crate) async fn has_left(
        &mut self,
        stream: &Stream,
        table: &TableName,
    ) -> Result<(), Error> {
        let Some(member) = self.members.get_mut(table) else {
            return Ok(());
        };
        member.standing = Standing::Beside;
        self.write_own(stream).await
    }

    /// Remembers that tables have left the publication, or cannot be captured any more.
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
            let Some(member) = self.members.get_mut(table) else {
                continue;
            };
            if matches!(
                member.standing,
                Standing::Published | Standing::Refused { .. }
            ) {
                member.standing = Standing::Lost { since_us: now_us };
                news = true;
            }
        }
        for table in &drift.refused {
            let member = self.members.get_mut(table);
            if let Some(member) = member.filter(|member| member.standing.is_published()) {
                member.standing = Standing::Refused { since_us: now_us };
                news = true;
            }
        }
        match news {
            true => self.write_own(stream).await,
            false => Ok(()),
        }
    }

    /// Has tables read again that capture goes on without for a while, though they were captured until now.
    ///
    /// # Errors
    /// The broker is away.
    pub(crate) async fn go_without(
        &self,
        config: &Config,
        stream: &Stream,
        tables: &[TableName],
    ) -> Result<(), Error> {
        for table in tables {
            let member = self.members.get(table);
            if member.is_some_and(|member| member.standing.is_published()) {
                let id = Cause::Selection.order_id(table, self.revision);
                order_backfill(config, stream, table, &id).await?;
            }
        }
        Ok(())
    }

    /// Remembers what the publication is about to be changed to.
    ///
    /// # Errors
    /// The broker is away.
    pub(crate) async fn intend(
        &mut self,
        stream: &Stream,
        altered: &[TableName],
        tables: &[SourceTable],
    ) -> Result<(), Error> {
        let mut members: Vec<_> = self.members.values().cloned().collect();
        for member in &mut members {
            if altered.contains(&member.table) {
                let table = tables.iter().find(|table| table.name == member.table);
                member.intended = table.map(SourceTable::clause);
            }
        }
        self.write(stream, &members).await
    }

    /// Remembers what is published from now on, and orders a backfill of the tables whose rows were captured under
    /// another selection, or not at all for a while.
    ///
    /// # Errors
    /// The broker is away.
    pub(crate) async fn remember(
        &mut self,
        config: &Config,
        stream: &Stream,
        now: Published,
        tables: &[SourceTable],
        drift: &Drift,
    ) -> Result<(), Error> {
        let configured = |name: &TableName| tables.iter().find(|table| table.name == *name);
        let found = now.members.into_iter();
        let found = found.filter(|(name, _)| !drift.has_parked(name));
        let mut members: Vec<_> = found
            .map(|(name, member)| {
                let table = configured(&name);
                self.published_now(table, name, member, now.publication, drift)
            })
            .collect();
        // Said and ordered first: a crash must not swallow it, and has it ordered by the same id again.
        for after in &members {
            let table = configured(&after.table);
            if let Some(change) = table.and_then(|table| self.reselected(table, after, drift)) {
                change.warn();
                let id = Cause::Selection.order_id(&change.table, self.revision);
                order_backfill(config, stream, &change.table, &id).await?;
            }
        }
        for table in &drift.back {
            tracing::warn!(
                %table, code = Code::PublicationDrift.as_str(),
                "changes of table {table} were not captured for a while: its rows are read again"
            );
            let id = Cause::Published.order_id(table, self.revision);
            order_backfill(config, stream, table, &id).await?;
        }
        members.extend(self.kept(&members, drift));
        self.write(stream, &members).await
    }

    /// How a table is published from now on; `table` where it is configured.
    fn published_now(
        &self,
        table: Option<&SourceTable>,
        name: TableName,
        member: Member,
        publication: u32,
        drift: &Drift,
    ) -> Remembered {
        let before = self.members.get(&name);
        let withheld = match (table, before) {
            (Some(table), _) => withheld(table, before),
            // Not configured now: what is known of it stays.
            (None, before) => before
                .map(|before| before.withheld.clone())
                .unwrap_or_default(),
        };
        let standing = match table {
            Some(_) => Standing::Published,
            None if drift.leaving.contains(&name) => Standing::Leaving,
            None => Standing::Beside,
        };
        Remembered {
            table: name,
            oid: member.oid,
            publication,
            standing,
            clause: clause(member, table, before),
            intended: None,
            withheld,
        }
    }

    /// What has changed about the selection of a table whose rows were captured all the time.
    fn reselected(
        &self,
        table: &SourceTable,
        after: &Remembered,
        drift: &Drift,
    ) -> Option<SelectionChange> {
        let before = self.members.get(&after.table)?;
        match before.standing.is_published() && !drift.has_back(&after.table) {
            true => change(table, before, after),
            false => None,
        }
    }

    /// What stays known of tables that are not among those that are published now.
    fn kept(&self, members: &[Remembered], drift: &Drift) -> Vec<Remembered> {
        let gone = self.members.values().filter(|before| {
            let is_same = |member: &Remembered| member.table == before.table;
            !members.iter().any(is_same)
        });
        gone.filter_map(|before| {
            let standing = match drift.has_parked(&before.table) {
                true => before.standing,
                // Older WAL may still have it, once it is configured again.
                false if !before.withheld.is_empty() => Standing::Beside,
                false => return None,
            };
            Some(Remembered {
                standing,
                intended: None,
                ..before.clone()
            })
        })
        .collect()
    }
}

/// What a membership publishes, as far as it is known. Of a configured table that is what is configured, once the
/// publication is made what it must be, whether or not somebody lets it be read just then.
fn clause(member: Member, table: Option<&SourceTable>, before: Option<&Remembered>) -> Clause {
    let Member { clause, unread, .. } = member;
    if !unread {
        return clause;
    }
    let known = match (table, before) {
        (Some(table), _) => table.filter.clone(),
        (None, before) => before.and_then(|before| before.clause.filter.clone()),
    };
    Clause {
        filter: known,
        ..clause
    }
}

/// A publication, as it was found.
pub(crate) struct Published {
    /// Its OID.
    pub(crate) publication: u32,
    /// The tables that it publishes.
    pub(crate) members: HashMap<TableName, Member>,
}

/// A configured table that was captured, as it is remembered beside the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Captured {
    /// The table.
    pub table: TableName,
    /// The OID of the membership that published it: another one says that it left the publication meanwhile.
    pub oid: u32,
    /// Whether capture has noticed that changes of it are missing: somebody took it out of the publication, or it
    /// lost what it is captured by.
    pub parked: bool,
}

/// The tables that capture remembers to have published.
///
/// # Errors
/// The broker is away, or what it holds is not understood.
pub async fn captured(
    jetstream: &async_nats::jetstream::Context,
    source: &str,
) -> Result<Vec<Captured>, Error> {
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
    let captured = members.filter_map(|member| {
        let parked = member.standing.is_parked();
        let (table, oid) = (member.table, member.oid);
        (parked || member.standing.is_published()).then_some(Captured { table, oid, parked })
    });
    Ok(captured.collect())
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

#[cfg(test)]
mod tests;
