//! `millrace demo`: the whole line on throwaway servers, with a kill in the middle and a full comparison.

mod screen;

use std::path::Path;
use std::time::{Duration, Instant};

use millrace_config::{Exit, chain};
use millrace_consumer::{Body, Reader, ReaderOptions, Start};
use millrace_event::{ChangeEvent, Columns, Op, subject};
use millrace_lab::{
    Compared, Comparison, ConfigDir, ConfigFolder, LabError, Nats, NatsOptions, Pipeline, Postgres,
    PostgresOptions, Traffic, compare, shop,
};
use tokio::signal::unix::{Signal, SignalKind, signal};

use self::screen::Screen;
use super::say;
use crate::arguments::DemoArguments;

/// The source's name in the demo's configuration.
const SOURCE: &str = "shop";

/// The database's name on both servers.
const DATABASE: &str = "shop";

/// Transactions a second that the traffic aims at.
const RATE: u32 = 400;

/// What the demo runs for without a terminal and without `--seconds`.
const SECONDS_DEFAULT: u64 = 20;

/// When the pipeline is killed on a terminal, where the end is not known.
const KILL_AFTER: Duration = Duration::from_secs(10);

/// How often the numbers are shown.
const SHOW_INTERVAL: Duration = Duration::from_secs(1);

/// How many characters of a value are shown.
const SHOWN_CHARS_MAX: usize = 24;

/// What the pipeline may take to work again after a kill.
const RETURN_LIMIT: Duration = Duration::from_secs(60);

/// How often it is asked whether it does.
const RETURN_POLL: Duration = Duration::from_millis(100);

/// What draining may take.
const DRAIN_LIMIT: Duration = Duration::from_secs(120);

/// Shows it.
pub(crate) async fn run(arguments: DemoArguments) -> Exit {
    let plain = arguments.plain || !Screen::is_terminal();
    let seconds = arguments.seconds.or(plain.then_some(SECONDS_DEFAULT));
    let screen = Screen::new(plain);
    match Box::pin(perform(&screen, seconds.map(Duration::from_secs))).await {
        Ok(comparison) => {
            for example in &comparison.examples {
                say(example);
            }
            screen.end(&comparison.to_string());
            if comparison.is_equal() {
                Exit::Ok
            } else {
                Exit::Finding
            }
        }
        Err(error) => {
            screen.end("the demo could not be finished");
            say(&format!("error: {}", chain(&error)));
            Exit::Environment
        }
    }
}

/// The servers of the demo; dropped, they are gone.
struct Servers {
    source: Postgres,
    target: Postgres,
    nats: Nats,
    folder: ConfigFolder,
}

async fn perform(screen: &Screen, seconds: Option<Duration>) -> Result<Comparison, LabError> {
    // From here on Ctrl-C ends the traffic, however early it comes: what was started is stopped and compared.
    let mut interrupts =
        signal(SignalKind::interrupt()).map_err(LabError::io("listening to signals"))?;
    screen.line("starting two Postgres servers and a NATS server");
    let servers = start().await?;
    let bin = std::env::current_exe().map_err(LabError::io("finding this program"))?;
    screen.line(&format!(
        "configuration: {}",
        servers.folder.path().display()
    ));
    let mut pipeline = spawn(&bin, servers.folder.path(), &["run"])?;
    let traffic = Traffic::start(&servers.source.url(DATABASE), 1, RATE).await?;
    let shown = Shown {
        screen,
        servers: &servers,
        bin: &bin,
        traffic: &traffic,
    };
    shown.show(&mut pipeline, &mut interrupts, seconds).await?;
    returned(&mut pipeline).await?;

    let report = traffic.stop().await?;
    screen.line(&format!(
        "traffic stopped after {} transactions with {} changes; draining",
        report.transactions, report.changes
    ));
    pipeline.terminate()?;
    let code = pipeline.wait(DRAIN_LIMIT).await?;
    screen.line(&format!(
        "SIGTERM: the pipeline ended with exit code {code}"
    ));
    if code != 0 {
        return Err(LabError::Process {
            what: format!("the pipeline, which ended with exit code {code} instead of 0,"),
            output: pipeline.logs(),
        });
    }
    let mut once = spawn(
        &bin,
        servers.folder.path(),
        &["run", "--once", "--timeout", "120s"],
    )?;
    let code = once.wait(DRAIN_LIMIT).await?;
    if code != 0 {
        return Err(LabError::Process {
            what: "millrace run --once".to_owned(),
            output: once.logs(),
        });
    }
    screen.line(
        "millrace run --once: everything committed is applied; comparing every row both ways",
    );
    let tables: Vec<_> = shop::TABLES
        .iter()
        .map(|name| Compared::same(name))
        .collect();
    let (source, target) = (servers.source.url(DATABASE), servers.target.url(DATABASE));
    compare(&source, &target, &tables).await
}

async fn start() -> Result<Servers, LabError> {
    let (source, target, nats) = tokio::try_join!(
        Postgres::start(PostgresOptions::default()),
        Postgres::start(PostgresOptions::default()),
        Nats::start(NatsOptions::default()),
    )?;
    source.create_database(DATABASE).await?;
    target.create_database(DATABASE).await?;
    shop::create(&source.connect(DATABASE).await?).await?;
    let mut dir = ConfigDir::new(SOURCE, &source.url(DATABASE), &nats.url())
        .source("heartbeat_interval = \"1s\"")
        .sink("warehouse", &target.url(DATABASE));
    for table in shop::TABLES {
        dir = dir.table(table, "");
    }
    let folder = dir.write()?;
    Ok(Servers {
        source,
        target,
        nats,
        folder,
    })
}

fn spawn(bin: &Path, dir: &Path, arguments: &[&str]) -> Result<Pipeline, LabError> {
    Pipeline::spawn(bin, dir, arguments)
}

/// What came by since it was last shown.
#[derive(Default)]
struct Seen {
    events: u64,
    by_op: [u64; Op::ALL.len()],
    sample: Option<String>,
}

/// What is shown while traffic runs.
struct Shown<'s> {
    screen: &'s Screen,
    servers: &'s Servers,
    bin: &'s Path,
    traffic: &'s Traffic,
}

impl Shown<'_> {
    /// Shows changes and lag until the time is over or Ctrl-C, and kills the pipeline once: in the middle, or at
    /// Ctrl-C where that comes first.
    async fn show(
        &self,
        pipeline: &mut Pipeline,
        interrupts: &mut Signal,
        seconds: Option<Duration>,
    ) -> Result<(), LabError> {
        let began = Instant::now();
        let kill_at = seconds.map_or(KILL_AFTER, |seconds| seconds / 2);
        let mut killed = false;
        let mut reader = reader(self.servers).await?;
        let mut seen = Seen::default();
        let mut first = true;
        let mut shows = tokio::time::interval(SHOW_INTERVAL);
        shows.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        shows.tick().await;
        loop {
            tokio::select! {
                _ = interrupts.recv() => {
                    if !killed {
                        self.kill(pipeline)?;
                    }
                    return Ok(());
                }
                delivery = reader.next() => {
                    let delivery = delivery.map_err(|error| LabError::Unexpected(error.to_string()))?;
                    if matches!(delivery.body, Body::Control(_)) {
                        continue;
                    }
                    for event in delivery.changes().flatten() {
                        seen.note(&event);
                    }
                    if first && seen.events > 0 {
                        first = false;
                        let sample = seen.sample.as_deref().unwrap_or("");
                        self.screen.line(&format!("first change: {sample}"));
                    }
                }
                _ = shows.tick() => {
                    self.tell(pipeline, std::mem::take(&mut seen)).await;
                    if !killed && began.elapsed() >= kill_at {
                        killed = true;
                        self.kill(pipeline)?;
                    }
                    if seconds.is_some_and(|seconds| began.elapsed() >= seconds) {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// The numbers, and one of the changes.
    async fn tell(&self, pipeline: &mut Pipeline, seen: Seen) {
        let lag = lag(pipeline).await;
        let transactions = self.traffic.progress().transactions;
        let Seen {
            events,
            by_op: [creates, updates, deletes, ..],
            sample,
        } = seen;
        self.screen.status(&format!(
            "{transactions} transactions; {events:>5} changes/s ({creates} c, {updates} u, {deletes} d); \
             lag {lag}"
        ));
        if let Some(sample) = sample {
            self.screen.line(&format!("  {sample}"));
        }
    }

    /// Ends the pipeline as a crash would, and starts it again.
    fn kill(&self, pipeline: &mut Pipeline) -> Result<(), LabError> {
        pipeline.kill9();
        self.screen
            .line("kill -9: the pipeline is dead; traffic goes on; starting it again");
        *pipeline = spawn(self.bin, self.servers.folder.path(), &["run"])?;
        Ok(())
    }
}

/// Waits until the pipeline works after its kill, or has ended: one that does not listen to signals yet would not
/// drain.
async fn returned(pipeline: &mut Pipeline) -> Result<(), LabError> {
    let deadline = Instant::now() + RETURN_LIMIT;
    while pipeline.is_running() && !matches!(pipeline.get("/readyz").await, Ok((200, _))) {
        if Instant::now() >= deadline {
            return Err(LabError::Timeout {
                what: "the pipeline that was started again".to_owned(),
                seconds: RETURN_LIMIT.as_secs(),
                output: pipeline.logs(),
            });
        }
        tokio::time::sleep(RETURN_POLL).await;
    }
    Ok(())
}

async fn reader(servers: &Servers) -> Result<Reader, LabError> {
    let jetstream = async_nats::jetstream::new(servers.nats.client().await?);
    // The stream is made by the pipeline; before that there is nothing to follow.
    while jetstream
        .get_stream(subject::stream_name(SOURCE))
        .await
        .is_err()
    {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(Reader::open(ReaderOptions::new(
        jetstream,
        SOURCE,
        Start::Beginning,
    )))
}

/// The sink's lag as the running pipeline tells it.
async fn lag(pipeline: &mut Pipeline) -> String {
    let Ok((200, body)) = pipeline.get("/status").await else {
        return "unknown".to_owned();
    };
    let status: serde_json::Value = serde_json::from_str(&body).unwrap_or_default();
    let state = status
        .pointer("/sinks/0/state")
        .and_then(serde_json::Value::as_str);
    match status
        .pointer("/sinks/0/lag_seconds")
        .and_then(serde_json::Value::as_f64)
    {
        Some(seconds) => format!("{:.0} ms", seconds * 1e3),
        None => state.unwrap_or("unknown").to_owned(),
    }
}

impl Seen {
    fn note(&mut self, event: &ChangeEvent<'_>) {
        self.events += 1;
        self.by_op[event.op as usize] += 1;
        self.sample = Some(describe(event));
    }
}

/// A change in one line: `u public.orders id=7 status=paid ..`.
fn describe(event: &ChangeEvent<'_>) -> String {
    let columns = |columns: &Option<Columns<'_>>| {
        let shown = |text: Option<&str>| {
            let Some(text) = text else {
                return "null".to_owned();
            };
            let printable = |letter: char| if letter.is_control() { ' ' } else { letter };
            let mut shown: String = text.chars().take(SHOWN_CHARS_MAX).map(printable).collect();
            if text.chars().nth(SHOWN_CHARS_MAX).is_some() {
                shown.push_str("..");
            }
            shown
        };
        let columns = columns.iter().flat_map(Columns::iter);
        columns
            .map(|(name, value)| format!("{name}={}", shown(value.as_text())))
            .collect::<Vec<_>>()
            .join(" ")
    };
    let row = if event.after.is_some() {
        columns(&event.after)
    } else {
        columns(&event.key)
    };
    format!("{} {} {row}", event.op.letter(), event.source.table_name())
}
