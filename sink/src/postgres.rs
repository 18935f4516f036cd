//! The Postgres sink.

mod apply;
mod commands;
mod fault;
mod inserts;
mod isolate;
mod keys;
mod labels;
mod load;
mod parameters;
mod session;
mod tables;
mod types;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use millrace_config::{Code, Condition, Create, OnRowError, Table};
use millrace_connect::postgres::{ConnectError, Dsn};
use millrace_event::{TableName, TableSchema, Version};

pub use session::{Connect, Connecting, migration_sql, status};

use self::parameters::Uuid;
use self::session::{PARTITION, Session, Transaction};
use crate::batch::Batch;
use crate::sink::{Applied, Elected, Ensured, Sink, SinkError};
use crate::sql;

/// What one statement may take unless the settings say otherwise.
pub const STATEMENT_TIMEOUT: Duration = Duration::from_secs(60);

/// A sink that keeps replicas in a Postgres database.
pub struct PostgresSink {
    name: String,
    connect: Connect,
    create: Create,
    statement_timeout: Duration,
    /// New rows of one table and batch that are worth a plain insert.
    plain_insert_rows: usize,
    /// What becomes of a refused row, by table at the source.
    on_row_error: HashMap<TableName, OnRowError>,
    session: Option<Session>,
}

impl PostgresSink {
    /// A sink of this name that connects when it is opened.
    #[must_use]
    pub fn new(name: impl Into<String>, connect: Connect, create: Create) -> Self {
        Self {
            name: name.into(),
            connect,
            create,
            statement_timeout: STATEMENT_TIMEOUT,
            plain_insert_rows: inserts::ROWS_MIN,
            on_row_error: HashMap::new(),
            session: None,
        }
    }

    /// Bounds each statement.
    #[must_use]
    pub fn with_statement_timeout(mut self, limit: Duration) -> Self {
        self.statement_timeout = limit;
        self
    }

    /// Writes so many new rows of one table and batch, at least one, by a plain insert. The default is where
    /// that pays; a test sets it low, so that small batches take this path too.
    #[must_use]
    pub fn with_plain_inserts_of(mut self, rows: usize) -> Self {
        self.plain_insert_rows = rows;
        self
    }

    /// Forgets what the bookkeeping knows of a table's keys: they are of an old kind, and every row comes again.
    pub(crate) async fn forget_keys(&mut self, target: &TableName) -> Result<(), SinkError> {
        let relation = target.to_string();
        let client = &self.session()?.client;
        for sql in [
            "DELETE FROM millrace.tombstone WHERE relation = $1",
            "UPDATE millrace.dead_letter SET resolved_at = now() WHERE relation = $1 AND resolved_at IS NULL",
        ] {
            let done = client.execute(sql, &[&relation]).await;
            done.map_err(|error| fault::general("forgetting old keys", error))?;
        }
        Ok(())
    }

    /// Drops dead letters of this sink that were resolved so long ago: at most `max`. Returns how many.
    ///
    /// # Errors
    /// The target failed: open the sink again.
    pub async fn drop_letters(
        &mut self,
        resolved_for: Duration,
        max: u32,
    ) -> Result<u64, SinkError> {
        let (name, max) = (self.name.clone(), i64::from(max));
        let seconds = resolved_for.as_secs_f64();
        let client = &self.session()?.client;
        let dropped = client
            .execute(sql::DROP_LETTERS, &[&name, &seconds, &max])
            .await;
        match dropped {
            // Nothing else depends on it.
            Err(error) if error.code().is_some() => {
                tracing::warn!(sink = %name, reason = %millrace_config::chain(&error), "resolved dead letters stay");
                Ok(0)
            }
            dropped => {
                dropped.map_err(|error| fault::general("dropping resolved dead letters", error))
            }
        }
    }

    fn session(&mut self) -> Result<&mut Session, SinkError> {
        self.session.as_mut().ok_or_else(apply::broken)
    }
}

/// Makes connections from a URL that is read anew each time, because a secret may have been rotated.
#[must_use]
pub fn connector<F>(sink: &str, dsn: F) -> Connect
where
    F: Fn() -> Result<Dsn, crate::sink::Cause> + Send + Sync + 'static,
{
    let application_name = format!("millrace sink {sink}");
    Arc::new(move || {
        let dsn = dsn();
        let session = millrace_connect::postgres::Session {
            application_name: application_name.clone(),
            options: Vec::new(),
        };
        Box::pin(async move {
            let dsn = dsn.map_err(|source| SinkError::Transient {
                what: "reading the URL",
                condition: Some(Box::new(Condition::new(
                    Code::SecretUnreadable,
                    "the sink's URL cannot be read",
                    "put the secret where the settings refer to, and check its text",
                ))),
                source,
            })?;
            millrace_connect::postgres::connect(&dsn, session)
                .await
                .map_err(|error| {
                    let (code, remedy) = match &error {
                        ConnectError::Auth { .. } => (
                            Code::TargetAuth,
                            "check user and password of the sink's URL",
                        ),
                        _ => (
                            Code::SinkUnreachable,
                            "check the address and whether the server runs",
                        ),
                    };
                    SinkError::Transient {
                        what: "connecting",
                        condition: Some(Box::new(Condition::new(code, error.to_string(), remedy))),
                        source: error.into(),
                    }
                })
        })
    })
}

impl Sink for PostgresSink {
    async fn open(&mut self) -> Result<Elected, SinkError> {
        // The old connection must be gone before the new one can win the election.
        self.session = None;
        let opened = session::open(
            &self.connect,
            &self.name,
            self.create,
            self.statement_timeout,
        )
        .await?;
        let Some((mut session, position)) = opened else {
            return Ok(Elected::No);
        };
        session.inserts = inserts::Inserts::of_at_least(self.plain_insert_rows);
        self.session = Some(session);
        Ok(Elected::Yes(position))
    }

    async fn ensure_table(
        &mut self,
        schema: &TableSchema,
        before: Option<&TableSchema>,
        settings: &Table,
    ) -> Result<Ensured, SinkError> {
        let session = self.session.as_mut().ok_or_else(apply::broken)?;
        let ensured =
            tables::ensure(session, &self.name, schema, before, settings, self.create).await?;
        self.on_row_error
            .insert(schema.name.clone(), settings.on_row_error);
        Ok(ensured)
    }

    async fn apply(&mut self, batch: &Batch) -> Result<Applied, SinkError> {
        let Self {
            session,
            name,
            on_row_error,
            ..
        } = self;
        let session = session.as_mut().ok_or_else(apply::broken)?;
        let halt_on = |table: &TableName| matches!(on_row_error.get(table), Some(OnRowError::Halt));
        apply::apply(session, name, batch, &halt_on).await
    }

    async fn roll_back(&mut self) -> Result<(), SinkError> {
        let session = self.session()?;
        match std::mem::replace(&mut session.transaction, Transaction::Broken) {
            Transaction::Closed => session.transaction = Transaction::Closed,
            Transaction::Broken => return Err(apply::broken()),
            Transaction::Open(floors) => {
                let ended = session.client.batch_execute("ROLLBACK").await;
                ended.map_err(|error| fault::general("rolling back", error))?;
                session.floors = floors;
                session.transaction = Transaction::Closed;
            }
        }
        Ok(())
    }

    async fn incomplete(
        &mut self,
        target: &TableName,
        after: &str,
        max: usize,
    ) -> Result<Vec<String>, SinkError> {
        let session = self.session()?;
        let relation = target.to_string();
        if !session.letters.contains(&relation) {
            return Ok(Vec::new());
        }
        let failed = |error| fault::general("looking for incomplete rows", error);
        let max = i64::try_from(max).unwrap_or(i64::MAX);
        let rows = session
            .client
            .query(
                sql::INCOMPLETE_KEYS,
                &[&relation, &sql::INCOMPLETE, &after, &max],
            )
            .await
            .map_err(failed)?;
        rows.iter()
            .map(|row| row.try_get(0).map_err(failed))
            .collect()
    }

    async fn clean_up(
        &mut self,
        up_to: &BTreeMap<TableName, Version>,
        kept: Duration,
        max: u32,
    ) -> Result<u64, SinkError> {
        let name = self.name.clone();
        let session = self.session.as_mut().ok_or_else(apply::broken)?;
        let up_to = up_to
            .iter()
            .map(|(table, up_to)| (table.to_string(), Uuid(*up_to)));
        let (relations, versions): (Vec<String>, Vec<Uuid>) = up_to
            .filter(|(relation, _)| session.tombstones.contains_key(relation))
            .unzip();
        if relations.is_empty() {
            return Ok(0);
        }
        if !matches!(session.transaction, Transaction::Closed) {
            return Err(apply::broken());
        }
        let fence = session.fence;
        let transaction = session
            .client
            .transaction()
            .await
            .map_err(|error| fault::general("cleaning up tombstones", error))?;
        let result = async {
            let mine = transaction
                .execute(
                    "UPDATE millrace.position SET applied_at = applied_at \
                     WHERE sink = $1 AND partition = $2 AND fence = $3",
                    &[&name, &PARTITION, &fence],
                )
                .await?;
            if mine == 0 {
                return Ok(None);
            }
            let kept = kept.as_secs_f64();
            let rows = transaction
                .query(
                    sql::FORGET_DELETES,
                    &[&relations, &versions, &kept, &i64::from(max)],
                )
                .await?;
            let mut forgotten = Vec::new();
            let mut deleted = 0;
            for row in &rows {
                forgotten.push((row.try_get(0)?, row.try_get::<_, Uuid>(1)?.0));
                deleted += row.try_get::<_, i64>(2)?.unsigned_abs();
            }
            Ok(Some((deleted, forgotten)))
        };
        let result = result.await;
        let ended = match &result {
            Ok(Some(_)) => transaction.commit().await,
            _ => transaction.rollback().await,
        };
        let (deleted, forgotten) = result
            .and_then(|cleaned| ended.map(|()| cleaned))
            .map_err(|error| fault::general("cleaning up tombstones", error))?
            .ok_or(SinkError::Fenced)?;
        session.forgotten.extend(forgotten);
        Ok(deleted)
    }
}
