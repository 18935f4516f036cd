//! One connection to the target: migrations, the election, and what the worker keeps in memory.

use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use millrace_config::{Code, Condition, Create};
use millrace_event::{Position, TableName, Version};
use tokio_postgres::{Client, Row, Statement};

use super::fault::{self, general};
use super::inserts::Inserts;
use super::keys::{Keyless, Pure};
use super::parameters::Uuid;
use crate::batch::{Checkpoint, PositionRow};
use crate::progress::CopyProgress;
use crate::row::TableLayout;
use crate::sink::SinkError;
use crate::sql::{Form, Present};

/// A connection to the target that is being made.
pub type Connecting = Pin<Box<dyn Future<Output = Result<Client, SinkError>> + Send>>;

/// Makes connections to the target, with the secret read anew each time.
pub type Connect = Arc<dyn Fn() -> Connecting + Send + Sync>;

/// The partition of a sink with one worker.
pub(super) const PARTITION: i32 = 0;

/// Prepared statements kept at most; beyond, all are forgotten and prepared again.
const STATEMENTS_MAX: usize = 2_000;

/// What every session of a sink is set to. Values travel as text, so how the server reads text is pinned; the
/// planner may not choose anything but index probes, because it cannot know how long parameter arrays are.
const SETTINGS: &str = "SET datestyle = 'ISO, YMD'; SET intervalstyle = 'postgres'; \
    SET timezone = 'UTC'; SET extra_float_digits = 3; SET bytea_output = 'hex'; \
    SET client_encoding = 'UTF8'; SET lc_monetary = 'C'; SET search_path = ''; SET xmloption = 'content'; \
    SET array_nulls = on; \
    SET enable_hashjoin = off; SET enable_mergejoin = off; SET enable_seqscan = off; \
    SET enable_material = off; SET jit = off; SET plan_cache_mode = 'force_generic_plan'; \
    SET idle_in_transaction_session_timeout = 0; SET default_transaction_isolation = 'read committed'; \
    SET default_transaction_read_only = off; SET check_function_bodies = off";

const MIGRATIONS: &[(i32, &str, &str)] = &[(
    1,
    "bookkeeping",
    include_str!("../../../migrations/target/postgres/0001_bookkeeping.sql"),
)];

const MIGRATION_TABLE: &str = "CREATE TABLE IF NOT EXISTS millrace.migration (\n    \
    version    integer     PRIMARY KEY,\n    name       text        NOT NULL,\n    \
    applied_at timestamptz NOT NULL DEFAULT now()\n)";

const POSITION: &str = "stream_seq, position, epoch, \
    (extract(epoch FROM source_ts) * 1000000)::bigint AS source_ts_us, fence, copy::text AS copy";

/// The form of each column of a layout.
pub(super) type Forms = Vec<Form>;

/// Which statement of a table.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    Upsert(Forms),
    UpsertNewest(Forms),
    Insert(Forms),
    Delete,
    Tombstone,
    Resolve,
    DeleteBelow,
    Unbounded,
    TombstonesBelow,
    LettersBelow,
    Floor,
    /// Whether in the binary format.
    Load(bool),
    Partial(Present),
    PartialLetters(Present),
    Move(Present),
    MoveLetter(Present),
}

/// Whether a target transaction is open.
#[derive(Debug)]
pub(super) enum Transaction {
    /// None is.
    Closed,
    /// One is, and a roll-back returns to these floors.
    Open(HashMap<String, Version>),
    /// Unknown: a call was abandoned half way or the connection failed. Only a new session helps.
    Broken,
}

/// An elected worker's connection.
pub(super) struct Session {
    pub(super) client: Client,
    pub(super) fence: i64,
    pub(super) transaction: Transaction,
    /// Truncate floors by relation; one worker at a time makes the copy in memory true.
    pub(super) floors: HashMap<String, Version>,
    /// Up to which version tombstones were dropped, by relation.
    pub(super) forgotten: HashMap<String, Version>,
    /// Relations with open dead letters; may hold too many, never too few.
    pub(super) letters: HashSet<String>,
    /// The newest tombstone by relation; may be too new (of a transaction that was rolled back), never too old.
    pub(super) tombstones: HashMap<String, Version>,
    /// Tombstones of the step under way: none of its other rows has one of these keys.
    pub(super) buried: HashMap<String, Version>,
    /// Which tables' new rows may be written without a guard.
    pub(super) inserts: Inserts,
    /// Tables that get their key behind the rows of their load.
    pub(super) keyless: Keyless,
    /// Those of them that the batch under way finds pure.
    pub(super) pure: Pure,
    /// Relations of which a load had a value without a known binary form.
    pub(super) load_texts: HashSet<String>,
    /// The tables of which this sink has begun a copy.
    pub(super) copied: CopyProgress,
    /// The tables whose enums may be given labels that they lack.
    pub(super) evolving: HashSet<TableName>,
    /// Makes a connection beside this one.
    pub(super) connect: Connect,
    pub(super) cas: Statement,
    statements: HashMap<(TableName, String), HashMap<Kind, Statement>>,
}

impl Session {
    /// Prepares a statement of a table, once for each of its shapes.
    pub(super) async fn prepare(
        &mut self,
        layout: &TableLayout,
        kind: Kind,
        sql: impl FnOnce() -> String,
    ) -> Result<Statement, SinkError> {
        if self.statements.values().map(HashMap::len).sum::<usize>() > STATEMENTS_MAX {
            self.statements.clear();
        }
        let table = (layout.source.clone(), layout.shape.clone());
        if let Some(statement) = self.statements.get(&table).and_then(|of| of.get(&kind)) {
            return Ok(statement.clone());
        }
        let statement = self
            .client
            .prepare(&sql())
            .await
            .map_err(|error| fault::of_table("preparing a statement", &layout.source, error))?;
        self.statements
            .entry(table)
            .or_default()
            .insert(kind, statement.clone());
        Ok(statement)
    }

    /// Ends a step: what it buried counts for the rows of later ones.
    pub(super) fn end_step(&mut self) {
        for (relation, version) in self.buried.drain() {
            let newest = self.tombstones.entry(relation).or_default();
            *newest = version.max(*newest);
        }
    }

    /// Forgets the statements of a table whose shape in the target may have changed.
    pub(super) fn forget(&mut self, table: &TableName) {
        self.statements.retain(|(name, _), _| name != table);
    }
}

/// Connects, migrates and tries to become the worker.
pub(super) async fn open(
    connect: &Connect,
    sink: &str,
    create: Create,
    statement_timeout: Duration,
) -> Result<Option<(Session, PositionRow)>, SinkError> {
    let client = connect().await?;
    let timeout = statement_timeout.as_millis();
    client
        .batch_execute(&format!("{SETTINGS}; SET statement_timeout = {timeout}"))
        .await
        .map_err(|error| general("pinning the session's settings", error))?;
    migrate(&client, create).await?;
    let name = format!("millrace.sink.{sink}");
    let elected: bool = client
        .query_one(
            "SELECT pg_try_advisory_lock(hashtextextended($1::text, 0))",
            &[&name],
        )
        .await
        .and_then(|row| row.try_get(0))
        .map_err(|error| general("electing the worker", error))?;
    if !elected {
        return Ok(None);
    }
    let row = client
        .query_one(
            &format!(
                "INSERT INTO millrace.position AS p (sink, partition, fence) VALUES ($1, $2, 1) \
                 ON CONFLICT (sink, partition) DO UPDATE SET fence = p.fence + 1 RETURNING {POSITION}"
            ),
            &[&sink, &PARTITION],
        )
        .await
        .map_err(|error| general("raising the fence", error))?;
    let position = read_position(&row)?;
    let session = load(client, connect, &position)
        .await
        .map_err(|error| general("loading floors", error))?;
    Ok(Some((session, position)))
}

async fn load(
    client: Client,
    connect: &Connect,
    position: &PositionRow,
) -> Result<Session, tokio_postgres::Error> {
    let (mut floors, mut forgotten) = (HashMap::new(), HashMap::new());
    let both = "SELECT relation, truncate_floor, cleanup_floor FROM millrace.table_floor";
    for row in client.query(both, &[]).await? {
        let relation: String = row.try_get(0)?;
        floors.insert(relation.clone(), row.try_get::<_, Uuid>(1)?.0);
        forgotten.insert(relation, row.try_get::<_, Uuid>(2)?.0);
    }
    let mut tombstones = HashMap::new();
    // The version's text has the version's order; uuid itself has no maximum before Postgres 18.
    let newest = "SELECT relation, max(version::text COLLATE \"C\")::uuid FROM millrace.tombstone GROUP BY relation";
    for row in client.query(newest, &[]).await? {
        tombstones.insert(row.try_get(0)?, row.try_get::<_, Uuid>(1)?.0);
    }
    let mut letters = HashSet::new();
    let open = "SELECT DISTINCT relation FROM millrace.dead_letter WHERE resolved_at IS NULL";
    for row in client.query(open, &[]).await? {
        letters.insert(row.try_get(0)?);
    }
    // Without a row to divide by, the statement fails: everything pipelined behind it, the commit included,
    // then does nothing.
    let cas = client
        .prepare(
            "WITH moved AS (UPDATE millrace.position SET stream_seq = $1, position = $2, epoch = $3, \
             source_ts = 'epoch'::timestamptz + $4::bigint * interval '1 microsecond', \
             copy = coalesce($5::text::jsonb, copy), applied_at = now() \
             WHERE sink = $6 AND partition = $7 AND fence = $8 AND stream_seq = $9 AND position = $10 \
             RETURNING 1) SELECT 1 / count(*)::integer FROM moved",
        )
        .await?;
    Ok(Session {
        client,
        fence: position.fence,
        transaction: Transaction::Closed,
        floors,
        forgotten,
        letters,
        tombstones,
        buried: HashMap::new(),
        inserts: Inserts::default(),
        keyless: Keyless::default(),
        pure: Pure::default(),
        load_texts: HashSet::new(),
        copied: position.copy.clone(),
        evolving: HashSet::new(),
        connect: Connect::clone(connect),
        cas,
        statements: HashMap::new(),
    })
}

/// Reads a sink's position without becoming its worker; `None` where it never ran.
///
/// # Errors
/// The target cannot be reached or refuses to answer.
pub async fn status(connect: &Connect, sink: &str) -> Result<Option<PositionRow>, SinkError> {
    let client = connect().await?;
    let exists: bool = client
        .query_one("SELECT to_regclass('millrace.position') IS NOT NULL", &[])
        .await
        .and_then(|row| row.try_get(0))
        .map_err(|error| general("looking for the position", error))?;
    if !exists {
        return Ok(None);
    }
    let row = client
        .query_opt(
            &format!("SELECT {POSITION} FROM millrace.position WHERE sink = $1 AND partition = $2"),
            &[&sink, &PARTITION],
        )
        .await
        .map_err(|error| general("reading the position", error))?;
    row.as_ref().map(read_position).transpose()
}

fn read_position(row: &Row) -> Result<PositionRow, SinkError> {
    let unreadable = |what: String| {
        let condition = Condition::new(
            Code::TargetWentBack,
            format!("the sink's row in millrace.position is unreadable: {what}"),
            "restore the row, or drop the schema millrace and the sink's tables to copy anew",
        );
        SinkError::Fatal {
            condition: Box::new(condition),
            source: None,
        }
    };
    let get = || -> Result<(i64, Uuid, i64, i64, i64, String), tokio_postgres::Error> {
        Ok((
            row.try_get("stream_seq")?,
            row.try_get("position")?,
            row.try_get("epoch")?,
            row.try_get("source_ts_us")?,
            row.try_get("fence")?,
            row.try_get("copy")?,
        ))
    };
    let (stream_seq, position, epoch, source_ts_us, fence, copy) =
        get().map_err(|error| unreadable(error.to_string()))?;
    Ok(PositionRow {
        checkpoint: Checkpoint {
            stream_seq: u64::try_from(stream_seq)
                .map_err(|_| unreadable(stream_seq.to_string()))?,
            position: Position(position.0),
            source_ts_us,
        },
        epoch: u32::try_from(epoch).map_err(|_| unreadable(epoch.to_string()))?,
        fence,
        copy: serde_json::from_str(&copy).map_err(|error| unreadable(error.to_string()))?,
    })
}

/// All migrations as one script, for an operator to run.
#[must_use]
pub fn migration_sql() -> String {
    let mut text = format!("CREATE SCHEMA IF NOT EXISTS millrace;\n{MIGRATION_TABLE};\n");
    for (version, name, sql) in MIGRATIONS {
        text.push_str(&format!(
            "\n{sql}\nINSERT INTO millrace.migration (version, name) VALUES ({version}, '{name}');\n"
        ));
    }
    text
}

async fn migrate(client: &Client, create: Create) -> Result<(), SinkError> {
    let failed = |error| general("migrating the schema millrace", error);
    let known: bool = client
        .query_one("SELECT to_regclass('millrace.migration') IS NOT NULL", &[])
        .await
        .and_then(|row| row.try_get(0))
        .map_err(failed)?;
    let applied = if known {
        applied(client).await.map_err(failed)?
    } else {
        HashSet::new()
    };
    if let Some(newer) = applied
        .iter()
        .find(|version| **version > MIGRATIONS.len() as i32)
    {
        let condition = Condition::new(
            Code::TargetWentBack,
            format!("the target's schema millrace was made by a newer release (migration {newer})"),
            "run that release or a later one",
        );
        return Err(SinkError::Fatal {
            condition: Box::new(condition),
            source: None,
        });
    }
    if MIGRATIONS
        .iter()
        .all(|(version, ..)| applied.contains(version))
    {
        return Ok(());
    }
    if create == Create::Never {
        let condition = Condition::new(
            Code::TargetTableMissing,
            "the target has no schema millrace of this release, and `create` is \"never\"",
            migration_sql(),
        );
        return Err(SinkError::Fatal {
            condition: Box::new(condition),
            source: None,
        });
    }
    client.batch_execute("BEGIN").await.map_err(failed)?;
    let result = migrate_locked(client).await;
    let end = if result.is_ok() { "COMMIT" } else { "ROLLBACK" };
    let ended = client.batch_execute(end).await;
    result.and(ended).map_err(failed)
}

async fn applied(client: &Client) -> Result<HashSet<i32>, tokio_postgres::Error> {
    let rows = client
        .query("SELECT version FROM millrace.migration", &[])
        .await?;
    rows.iter().map(|row| row.try_get(0)).collect()
}

async fn migrate_locked(client: &Client) -> Result<(), tokio_postgres::Error> {
    client
        .batch_execute("SELECT pg_advisory_xact_lock(hashtextextended('millrace.migration', 0))")
        .await?;
    let schema: bool = client
        .query_one("SELECT to_regnamespace('millrace') IS NOT NULL", &[])
        .await?
        .try_get(0)?;
    if !schema {
        client.batch_execute("CREATE SCHEMA millrace").await?;
    }
    client.batch_execute(MIGRATION_TABLE).await?;
    let applied = applied(client).await?;
    for (version, name, sql) in MIGRATIONS {
        if !applied.contains(version) {
            client.batch_execute(sql).await?;
            client
                .execute(
                    "INSERT INTO millrace.migration (version, name) VALUES ($1, $2)",
                    &[version, name],
                )
                .await?;
        }
    }
    Ok(())
}
