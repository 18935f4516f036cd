//! How the publication stands to what was published before: which tables left it, and which are back. Pure.

use std::collections::HashMap;

use millrace_config::{Code, Condition, Create};
use millrace_event::TableName;
use serde::{Deserialize, Serialize};

use super::{Earlier, Remembered};
use crate::Error;
use crate::source::{self, Inspected, Member, Refused, SourceTable};

/// How a table stands to the publication.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Standing {
    /// Configured and published: entered when capture begins with it. Left to `Lost`, `Leaving` or `Beside`.
    #[default]
    Published,
    /// Configured, and somebody else took it out of the publication: entered when that is noticed. Left to `Published`
    /// once it is back and a backfill is ordered, or to `Leaving`. It outlasts every crash.
    Lost {
        /// When it was noticed: this machine's clock, microseconds since 1970.
        since_us: i64,
    },
    /// Configured, and it cannot be captured as it is, such as without its key: entered when that is noticed. Taken
    /// out of the publication where it would keep the application from its own rows. Left to `Published` once it can
    /// be captured and a backfill is ordered, to `Lost` where only an operator can put it back then, or to
    /// `Leaving`. It outlasts every crash.
    Refused {
        /// When it was noticed: this machine's clock, microseconds since 1970.
        since_us: i64,
    },
    /// Not configured any more, and about to be taken out of the publication: entered once its backfill is ordered.
    /// Left to `Beside` when it is out or must stay, or to `Published` where it is configured again, put back by us.
    Leaving,
    /// Not configured, or locked while it is to be published otherwise: entered when capture begins without it, and
    /// in the latter case with its backfill ordered. Left to `Published`.
    Beside,
}

impl Standing {
    pub(super) fn is_published(&self) -> bool {
        *self == Self::Published
    }

    /// Whether the table is parked, because changes of it are missing.
    pub(super) fn is_parked(&self) -> bool {
        matches!(self, Self::Lost { .. } | Self::Refused { .. })
    }
}

/// What has become of the tables that were published.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Drift {
    /// Tables that the publication does not have, or not as they must be, and why that parks them.
    pub(crate) lost: Vec<(TableName, Condition)>,
    /// Tables that cannot be captured as they are.
    pub(crate) refused: Vec<TableName>,
    /// Tables that left it, or could not be captured, and are back: they must be read again.
    pub(crate) back: Vec<TableName>,
    /// Tables that are not configured any more, and cannot be taken out of it yet.
    pub(crate) leaving: Vec<TableName>,
}

impl Drift {
    /// Whether a table is not in the publication as it must be.
    pub(crate) fn has_lost(&self, table: &TableName) -> bool {
        self.lost.iter().any(|(lost, _)| lost == table)
    }

    /// Whether a table is parked, for whatever reason.
    pub(super) fn has_parked(&self, table: &TableName) -> bool {
        self.has_lost(table) || self.refused.contains(table)
    }

    /// Whether a table is back.
    pub(super) fn has_back(&self, table: &TableName) -> bool {
        self.back.contains(table)
    }
}

impl Earlier {
    /// Finds out whether every table that was published still is, and was all the time. One that left the
    /// publication has lost the changes made meanwhile, even if it is back.
    ///
    /// # Errors
    /// A table is published with other columns or rows than before, and the change was not ours.
    pub(crate) fn check(
        &self,
        publication: &str,
        tables: &[SourceTable],
        now: &HashMap<TableName, Member>,
        create: Create,
    ) -> Result<Drift, Error> {
        let (mut drift, mut changed) = (Drift::default(), Vec::new());
        for table in tables {
            let Some(before) = self.members.get(&table.name) else {
                continue;
            };
            let member = now.get(&table.name);
            match judge(before, member, table, create) {
                Verdict::Same => {}
                Verdict::Lost => {
                    let condition = source::left_publication(publication, table, member.is_some());
                    drift.lost.push((table.name.clone(), condition));
                }
                Verdict::Back => drift.back.push(table.name.clone()),
                Verdict::Changed => changed.push(table.name.to_string()),
            }
        }
        if changed.is_empty() {
            return Ok(drift);
        }
        Err(Error::halt(Condition::new(
            Code::PublicationDrift,
            format!(
                "publication \"{publication}\" publishes other columns or rows of {} than before",
                changed.join(", ")
            ),
            "changes made meanwhile are lost: run `millrace drop`, then `millrace run`, \
             which copies the tables again",
        )))
    }
}

impl Earlier {
    /// Parks the tables that cannot be captured, if they were: the others go on. `unchanged` says whether a table's
    /// settings are those that it was captured with, as far as that is known.
    ///
    /// # Errors
    /// A table was never captured, or it is its settings that it cannot be captured with.
    pub(crate) fn admit(
        &self,
        inspected: Inspected,
        now: &HashMap<TableName, Member>,
        unchanged: impl Fn(&TableName) -> bool,
    ) -> Result<(Vec<SourceTable>, Vec<Refused>), Error> {
        let parks = |table: &&Refused| {
            let before = self.members.get(&table.name);
            before.is_some_and(|before| parks(before, table, now.get(&table.name)))
                && unchanged(&table.name)
        };
        let Inspected { tables, refused } = inspected;
        match source::together(refused.iter().filter(|table| !parks(table))) {
            None => Ok((tables, refused)),
            Some(condition) => Err(Error::halt(condition)),
        }
    }
}

fn parks(before: &Remembered, table: &Refused, now: Option<&Member>) -> bool {
    match (before.standing, table.condition.code) {
        (Standing::Lost { .. } | Standing::Refused { .. }, _) => true,
        (Standing::Published, Code::NoKey | Code::NoReplicaIdentity | Code::TableMissing) => true,
        // What is published is what is configured: it is the table that has changed. Or a process took it out for that
        // while the broker was away, and ended before it could store it.
        (Standing::Published, Code::SelectionIdentity) => now.is_none_or(|now| table.harms(now)),
        _ => false,
    }
}

/// What has become of one table.
enum Verdict {
    Same,
    Lost,
    Back,
    Changed,
}

fn judge(
    before: &Remembered,
    now: Option<&Member>,
    table: &SourceTable,
    create: Create,
) -> Verdict {
    match (before.standing, now) {
        // Not configured until now: it is new. Or we took it out ourselves, with a backfill ordered, and it is put back.
        (Standing::Beside | Standing::Leaving, _) => Verdict::Same,
        // Nobody can read now what it publishes: a later look judges it.
        (Standing::Lost { .. }, Some(now)) if now.unread => Verdict::Lost,
        (Standing::Published | Standing::Refused { .. }, Some(now)) if now.unread => Verdict::Same,
        (Standing::Published | Standing::Lost { .. }, None) => Verdict::Lost,
        (Standing::Lost { .. }, Some(now)) if now.clause == table.clause() => Verdict::Back,
        (Standing::Lost { .. }, Some(_)) => Verdict::Lost,
        // We took it out, or nobody did: where we may, we publish it as it must be.
        (Standing::Refused { .. }, now)
            if create == Create::Auto || now.is_some_and(|now| now.clause == table.clause()) =>
        {
            Verdict::Back
        }
        (Standing::Refused { .. }, _) => Verdict::Lost,
        (Standing::Published, Some(now)) if now.oid == before.oid => Verdict::Same,
        // A crash came between our own change and its remembrance.
        (Standing::Published, Some(now)) if Some(&now.clause) == before.intended.as_ref() => {
            Verdict::Same
        }
        // It left as it was, or somebody has made it what it is to be, as we say where we may not do so.
        (Standing::Published, Some(now))
            if now.clause == before.clause || now.clause == table.clause() =>
        {
            Verdict::Back
        }
        (Standing::Published, Some(_)) => Verdict::Changed,
    }
}
