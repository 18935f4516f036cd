//! Who is measured, and what each is given before the load: its slot, its publication, its database.

use millrace_event::quote_literal;
use millrace_lab::{ConfigDir, ConfigFolder, LabError, Pipeline, Postgres, shop};
use serde::Serialize;
use tokio_postgres::Client;

use super::stage::{DATABASE, Stage, TABLE, execute};

/// What setting up a pipeline with nothing to do may take.
const PREPARE_TIMEOUT: &str = "60s";

/// How many changes a message of the packed contenders holds at most.
const PACKED: u32 = 100;

/// One who is measured. Each reads the same WAL through a slot of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Contender {
    /// Postgres' own client with the pgoutput plugin, to /dev/null.
    PgRecvlogical,
    /// WAL -> JetStream, one change a message.
    Capture,
    /// WAL -> JetStream, up to [`PACKED`] changes a message.
    CapturePacked,
    /// Postgres' own logical replication: publication and subscription.
    Native,
    /// Source -> JetStream -> target, one change a message.
    Replica,
    /// Source -> JetStream -> target, up to [`PACKED`] changes a message.
    ReplicaPacked,
    /// Postgres' own initial table synchronization, from `CREATE SUBSCRIPTION` on.
    NativeSync,
    /// A pipeline's first start with rows at the source: they travel through its copy stream.
    Load,
}

impl Contender {
    /// The name in the output file, of its database at the target, and of a pipeline's source.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::PgRecvlogical => "pg_recvlogical",
            Self::Capture => "capture",
            Self::CapturePacked => "capture_packed",
            Self::Native => "native",
            Self::Replica => "replica",
            Self::ReplicaPacked => "replica_packed",
            Self::NativeSync => "native_sync",
            Self::Load => "load",
        }
    }

    /// The name for people.
    pub(super) fn label(self) -> String {
        match self {
            Self::PgRecvlogical => "pg_recvlogical to /dev/null".to_owned(),
            Self::Native => "native logical replication".to_owned(),
            Self::NativeSync => "native initial table sync".to_owned(),
            Self::Capture | Self::Replica | Self::Load => "millrace".to_owned(),
            Self::CapturePacked | Self::ReplicaPacked => {
                format!("millrace, {PACKED} changes a message")
            }
        }
    }

    /// The slot and the publication.
    pub(super) fn slot(self) -> String {
        match self {
            Self::PgRecvlogical | Self::Native | Self::NativeSync => {
                format!("bench_{}", self.name())
            }
            _ => format!("millrace_{}", self.name()),
        }
    }

    /// What `run` is asked to do by a pipeline of this kind.
    pub(super) fn parts(self) -> &'static [&'static str] {
        match self {
            Self::Capture | Self::CapturePacked => &["--only", "capture"],
            _ => &[],
        }
    }

    fn is_packed(self) -> bool {
        matches!(self, Self::CapturePacked | Self::ReplicaPacked)
    }

    /// Makes its slot and what else it needs, so that it has seen nothing of the load and misses nothing; for
    /// an initial copy only what has to be there before it. Returns the configuration of a pipeline.
    pub(super) async fn prepare(self, stage: &Stage) -> Result<Option<ConfigFolder>, LabError> {
        match self {
            Self::PgRecvlogical => self.make_slot(stage).await.map(|()| None),
            Self::Native => {
                self.make_slot(stage).await?;
                self.subscribe(stage).await.map(|()| None)
            }
            Self::Capture | Self::CapturePacked => self.pipeline(stage).await.map(Some),
            Self::Replica | Self::ReplicaPacked => {
                stage.target.create_database(self.name()).await?;
                self.pipeline(stage).await.map(Some)
            }
            Self::NativeSync => {
                self.publish(stage).await?;
                self.make_target(stage).await.map(|_| None)
            }
            Self::Load => {
                stage.target.create_database(self.name()).await?;
                self.configure(stage).map(Some)
            }
        }
    }

    async fn make_slot(self, stage: &Stage) -> Result<(), LabError> {
        self.publish(stage).await?;
        let slot = quote_literal(&self.slot());
        let slot = format!("SELECT pg_create_logical_replication_slot({slot}, 'pgoutput')");
        execute(&stage.client, &slot).await
    }

    async fn publish(self, stage: &Stage) -> Result<(), LabError> {
        let publication = format!("CREATE PUBLICATION {} FOR TABLE {TABLE}", self.slot());
        execute(&stage.client, &publication).await
    }

    /// A database with empty tables, and a session in it.
    async fn make_target(self, stage: &Stage) -> Result<Client, LabError> {
        stage.target.create_database(self.name()).await?;
        let client = stage.target.connect(self.name()).await?;
        shop::create(&client).await?;
        Ok(client)
    }

    /// A subscription that waits to be enabled.
    async fn subscribe(self, stage: &Stage) -> Result<(), LabError> {
        let client = self.make_target(stage).await?;
        let slot = self.slot();
        let url = quote_literal(&stage.source.url(DATABASE));
        let statement = format!(
            "CREATE SUBSCRIPTION {slot} CONNECTION {url} PUBLICATION {slot} \
             WITH (create_slot = false, slot_name = {slot}, copy_data = false, enabled = false)"
        );
        execute(&client, &statement).await
    }

    /// A subscription that copies what is there; its server makes the slot.
    pub(super) async fn synchronize(self, stage: &Stage) -> Result<(), LabError> {
        let client = stage.target.connect(self.name()).await?;
        let slot = self.slot();
        let url = quote_literal(&stage.source.url(DATABASE));
        let statement = format!(
            "CREATE SUBSCRIPTION {slot} CONNECTION {url} PUBLICATION {slot} WITH (copy_data = true)"
        );
        execute(&client, &statement).await
    }

    /// A pipeline that has run once: slot, stream, publication and target table are there.
    async fn pipeline(self, stage: &Stage) -> Result<ConfigFolder, LabError> {
        let folder = self.configure(stage)?;
        let mut arguments = vec!["run", "--once", "--timeout", PREPARE_TIMEOUT];
        arguments.extend(self.parts());
        let mut run = Pipeline::spawn(&stage.bin, folder.path(), &arguments)?;
        stage.succeed(&mut run, self.name()).await?;
        Ok(folder)
    }

    fn configure(self, stage: &Stage) -> Result<ConfigFolder, LabError> {
        let source = stage.source.url(DATABASE);
        let mut dir = ConfigDir::new(self.name(), &source, &stage.nats.url())
            // The broker sets aside what each of the streams may take.
            .stream("retention = { max_bytes = \"4GiB\" }")
            .table(TABLE, "");
        if self.is_packed() {
            dir = dir.stream(&format!("events_per_message = {PACKED}"));
        }
        if self.parts().is_empty() {
            dir = dir.sink("target", &self.target_url(&stage.target));
        }
        dir.write()
    }

    /// Its database at the target.
    pub(super) fn target_url(self, target: &Postgres) -> String {
        target.url(self.name())
    }
}
