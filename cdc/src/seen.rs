//! What the source's tables looked like when they were last looked at, remembered durably: rows may change without
//! an event, and then they are read again.
//!
//! A rewrite of a table, an attached or detached partition, and another table of the same name leave no change in
//! the WAL. Each is found in the catalog, remembered together with the backfill that is due, and ordered only once
//! the stream holds everything up to the moment it was found: an older change of a row that was rewritten would
//! otherwise outrank the row that is read.

mod judgement;
mod look;

use std::collections::HashMap;

use async_nats::jetstream::kv;
use millrace_config::Config;
use millrace_event::{Lsn, TableName, work};
use tokio_postgres::Client;

use self::judgement::{Look, Seen, remembered};
use self::look::{look, look_into};
use crate::life::Stream;
use crate::orders::order_backfill;
use crate::source::Refused;
use crate::{Error, identity};

/// A first look at the tables. It comes before anything else about them is found out: whatever changes later is
/// noticed by the next look.
pub(crate) struct FirstLook {
    looks: Vec<Look>,
    lsn: Lsn,
}

impl FirstLook {
    /// Looks at every configured table.
    ///
    /// # Errors
    /// The source is away.
    pub(crate) async fn take(config: &Config, client: &Client) -> Result<Self, Error> {
        let (looks, lsn) = look(client, &config.tables).await?;
        Ok(Self { looks, lsn })
    }
}

/// How the tables stand in this life.
pub(crate) struct Watched {
    seen: Vec<Seen>,
}

impl Watched {
    /// Remembers what has changed about the tables since an earlier life, before this one counts on how they are
    /// now. A table of another OID is taken for new by the publication. Of those that this life goes `without`, what
    /// was known stays.
    ///
    /// # Errors
    /// The source or the broker is away.
    pub(crate) async fn begin(
        first: FirstLook,
        client: &Client,
        without: &[Refused],
        state: &kv::Store,
    ) -> Result<Self, Error> {
        let FirstLook { looks, lsn } = first;
        let mut seen = Vec::with_capacity(looks.len());
        let is_refused = |look: &Look| without.iter().any(|table| table.name == look.seen.table);
        for mut look in looks.into_iter().filter(|look| !is_refused(look)) {
            let key = key(&look.seen.table);
            let before: Option<Seen> = identity::read(state, &key).await?;
            look_into(client, before.as_ref(), &mut look).await?;
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

    /// The tables by their OID.
    pub(crate) fn by_oid(&self) -> HashMap<u32, TableName> {
        let seen = self.seen.iter();
        seen.map(|seen| (seen.oid, seen.table.clone())).collect()
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
        let is_there = |seen: &&Seen| looks.iter().any(|look| look.seen.table == seen.table);
        if let Some(gone) = self.seen.iter().find(|seen| !is_there(seen)) {
            let reason = format!("table {} is gone from the source", gone.table);
            return Err(Error::retry_because(reason));
        }
        for mut look in looks {
            let now = &look.seen;
            let mut seen = self.seen.iter_mut();
            let Some(before) = seen.find(|before| before.table == now.table) else {
                continue;
            };
            if !before.is_alike(now) {
                let reason = format!("table {} was changed at the source", now.table);
                return Err(Error::retry_because(reason));
            }
            look_into(client, Some(before), &mut look).await?;
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

fn key(table: &TableName) -> String {
    format!("seen.{}", work::schema_key(table))
}

async fn store(state: &kv::Store, seen: &Seen) -> Result<(), Error> {
    let value = serde_json::to_vec(seen).expect("plain JSON");
    identity::store(state, &key(&seen.table), value).await
}
