//! The stage of a scenario: real servers, a configuration folder, the product as a child process.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use millrace_lab::{
    Compared, Comparison, ConfigDir, ConfigFolder, Nats, NatsOptions, Pipeline, Postgres,
    PostgresOptions, compare,
};
use tokio::task::JoinHandle;
use tokio_postgres::Client;

/// The product.
pub(crate) const BIN: &str = env!("CARGO_BIN_EXE_millrace");

/// How long a replica may take to become equal before a scenario counts as failed. Machines are slow.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Servers and settings of one scenario: source and target are two databases of one cluster, unless the target
/// has one of its own.
pub(crate) struct Stage {
    pub(crate) postgres: Postgres,
    target_postgres: Option<Postgres>,
    pub(crate) nats: Nats,
    pub(crate) source: Client,
    pub(crate) target: Client,
    pub(crate) folder: ConfigFolder,
    pieces: Pieces,
    tables: Vec<&'static str>,
}

/// What a setting says about the configuration, to write other folders from.
struct Pieces {
    source: String,
    stream: String,
    sink: String,
    tables: Vec<(&'static str, String)>,
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
    /// How the target's own cluster is made, where it is to have one.
    pub(crate) target_postgres: Option<PostgresOptions>,
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
            target_postgres: None,
            nats: NatsOptions::default(),
        }
    }
}

impl Setting<'_> {
    /// The usual table `t`, and `u` of the same shape.
    pub(crate) fn two_tables() -> Self {
        Self {
            schema: "CREATE TABLE t (id int PRIMARY KEY, v text); CREATE TABLE u (id int PRIMARY KEY, v text)",
            tables: &[("public.t", ""), ("public.u", "")],
            ..Self::default()
        }
    }

    /// With a cluster of its own for the target: a sink that is held within a transaction there holds nothing up at
    /// the source.
    pub(crate) fn apart() -> Self {
        Self {
            target_postgres: Some(PostgresOptions::default()),
            ..Self::default()
        }
    }
}

impl Pieces {
    fn config(&self, source: &str, target: &str, nats: &str) -> ConfigDir {
        let dir = ConfigDir::new("shop", source, nats)
            .source(&self.source)
            .stream(&self.stream)
            .sink_with("replica", target, &self.sink);
        let tables = self.tables.iter();
        tables.fold(dir, |dir, (name, text)| dir.table(name, text))
    }
}

impl Stage {
    /// Starts the servers, makes the tables at the source and writes the folder. The product is not started.
    pub(crate) async fn set(setting: Setting<'_>) -> Self {
        let postgres = Postgres::start(setting.postgres)
            .await
            .expect("postgres starts");
        let target_postgres = match setting.target_postgres {
            Some(options) => Some(Postgres::start(options).await.expect("postgres starts")),
            None => None,
        };
        let nats = Nats::start(setting.nats).await.expect("nats starts");
        let beside = target_postgres.as_ref().unwrap_or(&postgres);
        postgres.create_database("source").await.expect("database");
        beside.create_database("target").await.expect("database");
        let source = postgres.connect("source").await.expect("source connects");
        let target = beside.connect("target").await.expect("target connects");
        source.batch_execute(setting.schema).await.expect("schema");
        let text = |(name, text): &(&'static str, &str)| (*name, (*text).to_owned());
        let pieces = Pieces {
            source: setting.source.to_owned(),
            stream: setting.stream.to_owned(),
            sink: setting.sink.to_owned(),
            tables: setting.tables.iter().map(text).collect(),
        };
        let urls = (postgres.url("source"), beside.url("target"), nats.url());
        let folder = pieces.config(&urls.0, &urls.1, &urls.2).write();
        let tables = setting.tables.iter().map(|(name, _)| *name).collect();
        Self {
            postgres,
            target_postgres,
            nats,
            source,
            target,
            folder: folder.expect("folder"),
            pieces,
            tables,
        }
    }

    /// This stage's configuration with other addresses of source, target and broker.
    pub(crate) fn config(&self, source: &str, target: &str, nats: &str) -> ConfigDir {
        self.pieces.config(source, target, nats)
    }

    /// This stage's configuration as it is.
    pub(crate) fn same_config(&self) -> ConfigDir {
        let (source, target) = (self.postgres.url("source"), self.target_url());
        self.config(&source, &target, &self.nats.url())
    }

    /// The target's address.
    pub(crate) fn target_url(&self) -> String {
        let cluster = self.target_postgres.as_ref().unwrap_or(&self.postgres);
        cluster.url("target")
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

    fn replicas(&self) -> Vec<Compared> {
        self.tables
            .iter()
            .map(|name| Compared::same(name))
            .collect()
    }

    /// Compares every configured table now.
    pub(crate) async fn compared(&self) -> Result<Comparison, millrace_lab::LabError> {
        self.compared_as(&self.replicas()).await
    }

    async fn compared_as(&self, tables: &[Compared]) -> Result<Comparison, millrace_lab::LabError> {
        compare(&self.postgres.url("source"), &self.target_url(), tables).await
    }

    /// Waits until every configured table is equal on both sides.
    pub(crate) async fn equal(&self, pipeline: &Pipeline) -> Comparison {
        self.equal_as(pipeline, &self.replicas()).await
    }

    /// Waits until these tables are equal to their replicas.
    pub(crate) async fn equal_as(&self, pipeline: &Pipeline, tables: &[Compared]) -> Comparison {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let begun = Instant::now();
            let compared = self.compared_as(tables).await;
            match compared {
                Ok(comparison) if comparison.is_equal() => {
                    self.keeps_the_password(pipeline);
                    return comparison;
                }
                _ if Instant::now() < deadline => {}
                compared => panic!(
                    "the replica did not become equal: {compared:?}\n{}",
                    pipeline.logs()
                ),
            }
            // Comparing much takes long: the product should have most of the machine.
            tokio::time::sleep(Duration::from_millis(50).max(begun.elapsed())).await;
        }
    }

    /// Runs `run --once`, which must end well; every configured table must then be equal at once.
    pub(crate) async fn once(&self) -> Comparison {
        self.run_once().await;
        let compared = self.compared().await.expect("compare");
        assert!(compared.is_equal(), "{compared:?}");
        compared
    }

    /// Runs `run --once`, which must end well.
    pub(crate) async fn run_once(&self) {
        let mut pipeline = self.start_with(&["run", "--once"]);
        let code = pipeline.wait(PATIENCE).await.expect("ends in time");
        assert_eq!(code, 0, "{}", pipeline.logs());
    }

    /// The single text that a query at the source gives.
    pub(crate) async fn source_text(&self, sql: &str) -> String {
        text_of(&self.source, sql).await
    }

    /// The single text that a query at the target gives.
    pub(crate) async fn target_text(&self, sql: &str) -> String {
        text_of(&self.target, sql).await
    }

    /// Runs SQL at the target.
    pub(crate) async fn target_sql(&self, sql: &str) {
        self.target
            .batch_execute(sql)
            .await
            .unwrap_or_else(|error| panic!("{sql}: {error:?}"));
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

async fn text_of(client: &Client, sql: &str) -> String {
    let row = client
        .query_one(sql, &[])
        .await
        .unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    row.get::<_, Option<String>>(0).unwrap_or_default()
}

impl Stage {
    /// A single text of the source.
    pub(crate) async fn ask(&self, sql: &str) -> Option<String> {
        let row = self.source.query_opt(sql, &[]).await;
        let row = row.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
        row.and_then(|row| row.get(0))
    }

    /// Connects to both databases anew, after the cluster was down.
    pub(crate) async fn reconnect(&mut self) {
        self.source = self.postgres.connect("source").await.expect("source");
        let beside = self.target_postgres.as_ref().unwrap_or(&self.postgres);
        self.target = beside.connect("target").await.expect("target");
    }

    /// Starts the product with another configuration.
    pub(crate) fn start_in(folder: &ConfigFolder, arguments: &[&str]) -> Pipeline {
        Pipeline::spawn(Path::new(BIN), folder.path(), arguments).expect("millrace starts")
    }

    /// Waits until /readyz answers with this status and a body that contains `text`.
    pub(crate) async fn readyz(pipeline: &mut Pipeline, status: u16, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let found = pipeline.get("/readyz").await;
            if let Ok((code, body)) = &found
                && *code == status
                && body.contains(text)
            {
                return body.clone();
            }
            assert!(
                Instant::now() < deadline && pipeline.is_running(),
                "/readyz gives {found:?} instead of {status} with {text:?}\n{}",
                pipeline.logs()
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Waits until a process has logged a text.
    pub(crate) async fn logs(pipeline: &Pipeline, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !pipeline.logs().contains(text) {
            assert!(
                Instant::now() < deadline,
                "{text:?} is not said:\n{}",
                pipeline.logs()
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Gives the configuration other keys of the source and another file of table `t`.
    pub(crate) fn rewrite(&self, source: &str, table: &str) {
        let (url, nats) = (self.postgres.url("source"), self.nats.url());
        let config = ConfigDir::new("shop", &url, &nats)
            .source(source)
            .stream("confirm = \"acked\"")
            .sink("replica", &self.target_url())
            .table("public.t", table);
        config.write_to(self.folder.path()).expect("written");
    }

    /// Ends a process in an orderly way.
    pub(crate) async fn stopped(mut pipeline: Pipeline) {
        pipeline.terminate().expect("signal");
        let code = pipeline.wait(PATIENCE).await.expect("ends");
        assert_eq!(code, 0, "{}", pipeline.logs());
    }

    /// Runs statements at the source, each made from its number, until told to stop.
    pub(crate) async fn traffic(
        &self,
        pause: Duration,
        statement: impl Fn(u64) -> String + Send + 'static,
    ) -> (Arc<AtomicBool>, JoinHandle<()>) {
        let client = self.postgres.connect("source").await.expect("connects");
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let task = tokio::spawn(async move {
            let mut n = 0_u64;
            while !stopped.load(Ordering::Relaxed) {
                n += 1;
                let sql = statement(n);
                client.batch_execute(&sql).await.expect("traffic");
                tokio::time::sleep(pause).await;
            }
        });
        (stop, task)
    }

    /// Waits for the product's end with this exit code, and an output that contains all of these.
    pub(crate) async fn ends(&self, mut pipeline: Pipeline, code: i32, texts: &[&str]) -> String {
        let ended = pipeline.wait(PATIENCE).await.expect("ends in time");
        let logs = pipeline.logs();
        assert_eq!(ended, code, "{logs}");
        for text in texts {
            assert!(logs.contains(text), "{text:?} is not said:\n{logs}");
        }
        self.keeps_the_password(&pipeline);
        logs
    }

    /// Checks that the product has not written the password anywhere.
    pub(crate) fn keeps_the_password(&self, pipeline: &Pipeline) {
        let logs = pipeline.logs();
        for cluster in [Some(&self.postgres), self.target_postgres.as_ref()] {
            let told = cluster.is_some_and(|cluster| logs.contains(cluster.password()));
            assert!(!told, "the password is in the output");
        }
    }
}
