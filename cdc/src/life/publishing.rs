//! How a life makes the publication what it must be.

use std::collections::HashMap;
use std::slice;

use millrace_config::{Code, Condition, Config, Create};
use millrace_connect::clock::now_us;
use millrace_event::TableName;
use tokio_postgres::Client;

use super::Stream;
use crate::Error;
use crate::birth::Plan;
use crate::identity::published::{Drift, Earlier, Published};
use crate::source::{self, Alteration, Member, Refused, SourceTable};

/// Tables that are in the publication and in no file of the configuration.
pub(crate) const NOT_CONFIGURED: &str = "tables that are not configured";

/// Takes tables out of the publication that keep the application from its own rows while they are in it: Postgres
/// refuses to update and delete what it cannot log. They are parked, so nothing is lost by it that is not marked.
/// Each alone: the lock of one keeps no other. Returns those that were taken out, or cannot be.
pub(crate) async fn relieve(
    client: &Client,
    config: &Config,
    refused: &[Refused],
    members: &HashMap<TableName, Member>,
) -> Result<Vec<TableName>, Error> {
    let (name, create) = (
        source::publication_name(&config.source.name),
        config.source.create,
    );
    let mut settled = Vec::new();
    for table in refused {
        let member = members.get(&table.name);
        if create == Create::Never
            || !member.is_some_and(|member| member.own && table.harms(member))
        {
            continue;
        }
        let alone = slice::from_ref(&table.name);
        let what = "tables that the application cannot update or delete while they are published";
        if source::withdraw(client, &name, alone, create, what).await? == Alteration::Settled {
            settled.push(table.name.clone());
        }
    }
    Ok(settled)
}

/// What decides about the publication.
pub(super) struct Publishing<'p> {
    pub(super) config: &'p Config,
    pub(super) client: &'p Client,
    pub(super) version: i32,
    pub(super) tables: &'p [SourceTable],
    /// Tables that were captured, and cannot be as they are now.
    pub(super) refused: &'p [Refused],
    pub(super) stream: &'p Stream,
}

/// Tables that a life goes on without, and why each is parked.
#[derive(Default)]
pub(crate) struct Without {
    /// Somebody took them out of the publication: only an operator puts them back.
    pub(crate) lost: Vec<(TableName, Condition)>,
    /// They are locked, and not published as they must be: capture takes nothing of them, and the life ends once
    /// they can be published.
    pub(crate) locked: Vec<(TableName, Condition)>,
    /// They cannot be captured as they are, such as without a key: the life ends once they can.
    pub(crate) refused: Vec<Refused>,
    /// Why each of them is parked.
    pub(crate) unfit: Vec<(TableName, Condition)>,
}

impl Without {
    /// The tables that are captured. Locked ones are as if they were not configured: their changes are dropped, and
    /// whoever asks for their rows waits.
    pub(super) fn captured(&self, mut tables: Vec<SourceTable>) -> Vec<SourceTable> {
        let locked = |table: &SourceTable| self.locked.iter().any(|(name, _)| *name == table.name);
        tables.retain(|table| !locked(table));
        tables
    }

    /// All of them.
    pub(crate) fn parked(&self) -> Vec<(TableName, Condition)> {
        [&*self.lost, &*self.locked, &*self.unfit].concat()
    }
}

impl Publishing<'_> {
    /// Makes the publication what it should be, where it still is what it was.
    pub(super) async fn ensure(&self, earlier: &mut Earlier, plan: Plan) -> Result<Without, Error> {
        let Self {
            config,
            client,
            version,
            tables,
            refused,
            stream,
        } = *self;
        let name = source::publication_name(&config.source.name);
        let mut drift = Drift {
            refused: refused.iter().map(|table| table.name.clone()).collect(),
            ..Drift::default()
        };
        let mut members = source::published_tables(client, version, &name).await?;
        if plan == Plan::Resume {
            let publication = source::find_publication(client, &name).await?;
            if earlier
                .publication()
                .is_some_and(|known| publication != Some(known))
            {
                return Err(Error::halt(source::publication_gone(&name)));
            }
            earlier.recall(&mut members);
            drift = Drift {
                refused: drift.refused,
                ..earlier.check(&name, tables, &members, config.source.create)?
            };
        }
        // Also where the stream is not begun: a crash may have left the publication behind.
        earlier.lose(stream, &drift, now_us()).await?;
        relieve(client, config, refused, &members).await?;
        if plan == Plan::Resume {
            let removed = earlier.let_go(config, stream).await?;
            let own = |table: &TableName| members.get(table).is_some_and(|member| member.own);
            drift.leaving = self
                .withdraw(removed.into_iter().filter(own).collect())
                .await?;
        }
        let due = tables.iter().filter(|table| !drift.has_lost(&table.name));
        let due: Vec<_> = due.cloned().collect();
        let locked = self.publish(&due, earlier, plan).await?;
        let taken = |table: &&SourceTable| !locked.contains(&table.name);
        let taken: Vec<_> = tables.iter().filter(taken).cloned().collect();
        let mut members = source::published_tables(client, version, &name).await?;
        earlier.recall(&mut members);
        let published = Published {
            publication: source::find_publication(client, &name).await?.unwrap_or(0),
            members,
        };
        let unfit = source::parked_refused(&name, refused, &published.members);
        earlier
            .remember(config, stream, published, &taken, &drift)
            .await?;
        let locked = locked.into_iter().map(|table| {
            let condition = source::locked_out(&name, &table);
            (table, condition)
        });
        Ok(Without {
            lost: drift.lost,
            locked: locked.collect(),
            refused: refused.to_vec(),
            unfit,
        })
    }

    /// Takes tables out of the publication. Returns those that are still to go.
    async fn withdraw(&self, removed: Vec<TableName>) -> Result<Vec<TableName>, Error> {
        let source = &self.config.source;
        let name = source::publication_name(&source.name);
        if removed.is_empty()
            || source::withdraw(self.client, &name, &removed, source.create, NOT_CONFIGURED).await?
                == Alteration::Settled
        {
            return Ok(Vec::new());
        }
        tracing::warn!(
            publication = name, code = Code::PublicationDrift.as_str(), tables = ?removed,
            "tables that are not configured are still published, because one of them is locked, as by VACUUM: \
             it is tried again by itself"
        );
        Ok(removed)
    }

    /// Puts tables into the publication as they must be. Returns those that are locked: others do not wait for them.
    async fn publish(
        &self,
        due: &[SourceTable],
        earlier: &mut Earlier,
        plan: Plan,
    ) -> Result<Vec<TableName>, Error> {
        let Self {
            config,
            client,
            version,
            stream,
            ..
        } = *self;
        let (name, create) = (
            source::publication_name(&config.source.name),
            config.source.create,
        );
        let change = source::publication_change(client, version, &name, due).await?;
        let Some(change) = change else {
            return Ok(Vec::new());
        };
        if !change.altered.is_empty() && create == Create::Auto {
            earlier.intend(stream, &change.altered, due).await?;
        }
        if change.make(client, due, create).await? == Alteration::Settled {
            return Ok(Vec::new());
        }
        let changed = |table: &&SourceTable| {
            change.added.contains(&table.name) || change.altered.contains(&table.name)
        };
        let changed: Vec<_> = due.iter().filter(changed).collect();
        // Nothing is captured yet that would have to go on.
        if plan != Plan::Resume || changed.is_empty() {
            let reason = "the publication cannot be made while a table is locked, as by VACUUM";
            return Err(Error::retry_because(reason));
        }
        let mut locked = Vec::new();
        for table in &changed {
            if changed.len() > 1 && self.publish_alone(table).await? == Alteration::Settled {
                continue;
            }
            locked.push(table.name.clone());
        }
        earlier.go_without(config, stream, &locked).await?;
        Ok(locked)
    }

    async fn publish_alone(&self, table: &SourceTable) -> Result<Alteration, Error> {
        let source = &self.config.source;
        let (name, alone) = (
            source::publication_name(&source.name),
            slice::from_ref(table),
        );
        match source::publication_change(self.client, self.version, &name, alone).await? {
            Some(change) => change.make(self.client, alone, source.create).await,
            None => Ok(Alteration::Settled),
        }
    }
}
