//! The servers of one round, with every contender set up and a load that waits in the WAL for each.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use millrace_lab::{
    ConfigFolder, LabError, Nats, NatsOptions, Pipeline, Place, Postgres, PostgresOptions, shop,
};
use tokio_postgres::Client;

use super::contender::Contender;
use super::usage::{self, ServersCpu};

/// The database at the source.
pub(super) const DATABASE: &str = "shop";

/// The table that is loaded.
pub(super) const TABLE: &str = "public.orders";

/// What any one step may take.
pub(super) const LIMIT: Duration = Duration::from_secs(900);

/// The same for `--timeout`.
pub(super) const LIMIT_ARGUMENT: &str = "900s";

/// How often the target is asked whether it has the last row.
const VISIBLE_POLL: Duration = Duration::from_millis(10);

/// Both Postgres servers': room to work in, and neither a checkpoint in the middle of a turn nor the vacuum of another
/// turn's rows.
const SETTINGS: [(&str, &str); 4] = [
    ("shared_buffers", "256MB"),
    ("max_wal_size", "16GB"),
    ("checkpoint_timeout", "1h"),
    ("autovacuum", "off"),
];

/// The servers; dropped, they are gone.
pub(super) struct Stage {
    pub(super) source: Postgres,
    pub(super) target: Postgres,
    pub(super) nats: Nats,
    /// This program.
    pub(super) bin: PathBuf,
    /// A session at the source.
    pub(super) client: Client,
    /// Where the output of processes without a configuration goes.
    place: Place,
    folders: Vec<(Contender, ConfigFolder)>,
}

/// What waits in the WAL.
#[derive(Clone, Copy, Debug)]
pub(super) struct Backlog {
    /// Rows, which are also the ids from 1.
    pub(super) rows: u64,
    /// The WAL's end after them.
    pub(super) end_lsn: tokio_postgres::types::PgLsn,
}

impl Stage {
    /// Starts the servers and sets up the contenders. `settings` go to both Postgres servers.
    pub(super) async fn start(
        contenders: &[Contender],
        settings: &[(&str, &str)],
    ) -> Result<Self, LabError> {
        let settings = SETTINGS.iter().chain(settings);
        let options = PostgresOptions {
            settings: settings
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect(),
            ..PostgresOptions::default()
        };
        let (source, target, nats) = tokio::try_join!(
            Postgres::start(options.clone()),
            Postgres::start(options),
            Nats::start(NatsOptions::default()),
        )?;
        source.create_database(DATABASE).await?;
        let client = source.connect(DATABASE).await?;
        shop::create(&client).await?;
        let mut stage = Self {
            source,
            target,
            nats,
            bin: std::env::current_exe().map_err(LabError::io("find this program"))?,
            client,
            place: Place::new()?,
            folders: Vec::new(),
        };
        for contender in contenders {
            if let Some(folder) = contender.prepare(&stage).await? {
                stage.folders.push((*contender, folder));
            }
        }
        Ok(stage)
    }

    /// Loads orders in transactions of `per_transaction` rows.
    pub(super) async fn load(&self, rows: u64, per_transaction: u64) -> Result<Backlog, LabError> {
        shop::fill_orders(&self.client, 1, rows, per_transaction).await?;
        let row = self
            .client
            .query_one("SELECT pg_current_wal_lsn()", &[])
            .await
            .map_err(LabError::postgres("read the WAL's end"))?;
        Ok(Backlog {
            rows,
            end_lsn: row.get(0),
        })
    }

    /// Writes out what earlier work left dirty, so that no turn pays for another's.
    pub(super) async fn settle(&self) -> Result<(), LabError> {
        execute(&self.client, "CHECKPOINT").await?;
        execute(&self.target.connect("postgres").await?, "CHECKPOINT").await
    }

    /// The folder a contender's process works in.
    pub(super) fn folder(&self, contender: Contender) -> &Path {
        self.folders
            .iter()
            .find(|(owner, _)| *owner == contender)
            .map_or(self.place.path(), |(_, folder)| folder.path())
    }

    /// Processor time that the servers have used so far.
    pub(super) fn cpu(&self) -> ServersCpu {
        ServersCpu {
            source: self.source.pid().and_then(usage::tree_cpu),
            target: self.target.pid().and_then(usage::tree_cpu),
            nats: self.nats.pid().and_then(usage::tree_cpu),
        }
    }

    /// Waits for the end of a process that must end well.
    pub(super) async fn succeed(&self, run: &mut Pipeline, what: &str) -> Result<(), LabError> {
        match run.wait(LIMIT).await? {
            0 => Ok(()),
            code => Err(LabError::Process {
                what: format!("{what} (exit code {code})"),
                output: run.logs(),
            }),
        }
    }

    /// Makes the loaded table what it is after a while: vacuumed and analyzed, so that the first who reads it
    /// does not write to it for all the others.
    pub(super) async fn rest(&self) -> Result<(), LabError> {
        execute(&self.client, &format!("VACUUM (ANALYZE) {TABLE}")).await
    }

    /// Waits until a subscription has copied its tables and follows them.
    pub(super) async fn until_synchronized(&self, contender: Contender) -> Result<(), LabError> {
        let target = self.target.connect(contender.name()).await?;
        let query = "SELECT count(*) > 0 AND bool_and(srsubstate = 'r') FROM pg_subscription_rel";
        let deadline = Instant::now() + LIMIT;
        loop {
            let row = target.query_one(query, &[]).await;
            if row
                .map_err(LabError::postgres("look at a subscription"))?
                .get(0)
            {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(LabError::Timeout {
                    what: format!("{}: its tables synchronized", contender.name()),
                    seconds: LIMIT.as_secs(),
                    output: String::new(),
                });
            }
            tokio::time::sleep(VISIBLE_POLL).await;
        }
    }

    /// Waits until the contender's target has at least `rows` rows from id `first` to `last`: one row is
    /// looked for by its key, which costs nothing.
    pub(super) async fn until_visible(
        &self,
        contender: Contender,
        (first, last): (u64, u64),
        rows: u64,
        mut process: Option<&mut Pipeline>,
    ) -> Result<(), LabError> {
        let target = self.target.connect(contender.name()).await?;
        let query = format!(
            "SELECT (SELECT count(*) FROM {TABLE} WHERE id BETWEEN {first} AND {last}) >= {rows}"
        );
        let deadline = Instant::now() + LIMIT;
        loop {
            let ended = process.as_mut().is_some_and(|run| !run.is_running());
            let row = target.query_one(&query, &[]).await;
            if row
                .map_err(LabError::postgres("look for the last row"))?
                .get(0)
            {
                return Ok(());
            }
            let output = || process.as_ref().map_or_else(String::new, |run| run.logs());
            if ended {
                return Err(LabError::Process {
                    what: format!("{}: it ended without the last row", contender.name()),
                    output: output(),
                });
            }
            if Instant::now() >= deadline {
                return Err(LabError::Timeout {
                    what: format!("{}: the last row in the target", contender.name()),
                    seconds: LIMIT.as_secs(),
                    output: output(),
                });
            }
            tokio::time::sleep(VISIBLE_POLL).await;
        }
    }
}

/// Executes a statement.
pub(super) async fn execute(client: &Client, statement: &str) -> Result<(), LabError> {
    client
        .batch_execute(statement)
        .await
        .map_err(LabError::postgres(statement))
}
