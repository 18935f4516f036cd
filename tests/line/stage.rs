//! The stage of a scenario: real servers, a configuration folder, the product as a child process.

use std::path::Path;
use std::time::{Duration, Instant};

use millrace_lab::{
    Compared, Comparison, ConfigDir, ConfigFolder, Nats, NatsOptions, Pipeline, Postgres,
    PostgresOptions, compare,
};
use tokio_postgres::Client;

/// The product.
pub(crate) const BIN: &str = env!("CARGO_BIN_EXE_millrace");

/// How long a replica may take to become equal before a scenario counts as failed. Machines are slow.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Servers and settings of one scenario: source and target are two databases of one cluster.
pub(crate) struct Stage {
    pub(crate) postgres: Postgres,
    pub(crate) nats: Nats,
    pub(crate) source: Client,
    pub(crate) target: Client,
    pub(crate) folder: ConfigFolder,
    tables: Vec<&'static str>,
}

/// What a scenario changes about the usual stage.
pub(crate) struct Setting<'s> {
    /// SQL at the source before anything else.
    pub(crate) schema: &'s str,
    /// The configured tables: their file's name and text.
    pub(crate) tables: &'s [(&'static str, &'s str)],
    /// More lines under `[stream]`; by default acknowledged changes are confirmed at once.
    pub(crate) stream: &'s str,
    /// More lines under `[source]`.
    pub(crate) source: &'s str,
    /// More lines under `[sinks.replica]`.
    pub(crate) sink: &'s str,
    /// How the cluster is made.
    pub(crate) postgres: PostgresOptions,
    /// How the broker is made.
    pub(crate) nats: NatsOptions,
}

impl Default for Setting<'_> {
    fn default() -> Self {
        Self {
            schema: "CREATE TABLE t (id int PRIMARY KEY, v text)",
            tables: &[("public.t", "")],
            stream: "confirm = \"acked\"",
            source: "heartbeat_interval = \"500ms\"",
            sink: "",
            postgres: PostgresOptions::default(),
            nats: NatsOptions::default(),
        }
    }
}

impl Stage {
    /// Starts the servers, makes the tables at the source and writes the folder. The product is not started.
    pub(crate) async fn set(setting: Setting<'_>) -> Self {
        let postgres = Postgres::start(setting.postgres)
            .await
            .expect("postgres starts");
        let nats = Nats::start(setting.nats).await.expect("nats starts");
        for database in ["source", "target"] {
            postgres.create_database(database).await.expect("database");
        }
        let source = postgres.connect("source").await.expect("source connects");
        let target = postgres.connect("target").await.expect("target connects");
        source.batch_execute(setting.schema).await.expect("schema");
        let mut dir = ConfigDir::new("shop", &postgres.url("source"), &nats.url())
            .source(setting.source)
            .stream(setting.stream)
            .sink_with("replica", &postgres.url("target"), setting.sink);
        for (name, text) in setting.tables {
            dir = dir.table(name, text);
        }
        let folder = dir.write().expect("folder");
        let tables = setting.tables.iter().map(|(name, _)| *name).collect();
        Self {
            postgres,
            nats,
            source,
            target,
            folder,
            tables,
        }
    }

    /// Starts the product on this stage.
    pub(crate) fn start(&self) -> Pipeline {
        self.start_with(&["run"])
    }

    /// Starts the product with these arguments.
    pub(crate) fn start_with(&self, arguments: &[&str]) -> Pipeline {
        Pipeline::spawn(Path::new(BIN), self.folder.path(), arguments).expect("millrace starts")
    }

    /// Runs SQL at the source.
    pub(crate) async fn sql(&self, sql: &str) {
        self.source
            .batch_execute(sql)
            .await
            .unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }

    /// Compares every configured table now.
    pub(crate) async fn compared(&self) -> Result<Comparison, millrace_lab::LabError> {
        let tables: Vec<_> = self
            .tables
            .iter()
            .map(|name| Compared::same(name))
            .collect();
        compare(
            &self.postgres.url("source"),
            &self.postgres.url("target"),
            &tables,
        )
        .await
    }

    /// Waits until every configured table is equal on both sides.
    pub(crate) async fn equal(&self, pipeline: &Pipeline) -> Comparison {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let compared = self.compared().await;
            match compared {
                Ok(comparison) if comparison.is_equal() => return comparison,
                _ if Instant::now() < deadline => {}
                compared => panic!(
                    "the replica did not become equal: {compared:?}\n{}",
                    pipeline.logs()
                ),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Waits until a query at the target gives this single text.
    pub(crate) async fn target_shows(&self, pipeline: &Pipeline, sql: &str, expected: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let found = self.target.query_opt(sql, &[]).await;
            let text = found
                .as_ref()
                .ok()
                .and_then(|row| row.as_ref()?.get::<_, Option<String>>(0));
            if text.as_deref() == Some(expected) {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "{sql} gives {found:?} instead of {expected:?}\n{}",
                pipeline.logs()
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}
