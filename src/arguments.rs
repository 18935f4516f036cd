//! The command line.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::LazyLock;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use millrace_config::{Config, LogFormat, LogLevel};

/// The release, and the commit where the build was told (`MILLRACE_COMMIT` in its environment).
pub(crate) static VERSION: LazyLock<String> = LazyLock::new(|| {
    let release = env!("CARGO_PKG_VERSION");
    match option_env!("MILLRACE_COMMIT").filter(|commit| !commit.is_empty()) {
        Some(commit) => format!("{release} ({commit})"),
        None => release.to_owned(),
    }
});

/// How the process ends, for `--help`.
const EXIT_CODES: &str = "\
Exit codes: 0 done, or drained after a signal; 1 a bug; 2 the command line is wrong, or nobody can be asked;
3 a check found something, or with --once a table is parked; 4 a precondition failed at the start, or a time
limit passed; 5 halted (--exit-on-halt, --once); 78 the configuration is wrong; 128+n a second signal n";

/// Every committed row change of a Postgres database, in the databases of other services.
#[derive(Debug, Parser)]
#[command(name = "millrace", version = VERSION.as_str(), max_term_width = 110, after_help = EXIT_CODES)]
pub(crate) struct Arguments {
    /// The configuration: the directory of millrace.toml and tables/
    #[arg(
        short,
        long,
        global = true,
        value_name = "DIR",
        default_value = ".",
        env = "MILLRACE_CONFIG"
    )]
    pub(crate) config: PathBuf,
    /// How the log is written, instead of what the configuration says
    #[command(flatten)]
    pub(crate) log: LogArguments,
    /// The verb.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What the command line says about the log.
#[derive(Clone, Copy, Debug, Default, Args)]
pub(crate) struct LogArguments {
    /// The least important level to log; wins over RUST_LOG and the configuration
    #[arg(long, global = true, value_name = "LEVEL", value_parser = log_level)]
    pub(crate) log_level: Option<LogLevel>,
    /// The form of a log line; auto is pretty on a terminal, else JSON
    #[arg(long, global = true, value_name = "FORMAT", value_parser = log_format)]
    pub(crate) log_format: Option<LogFormat>,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Capture the source and keep the targets equal to it
    #[command(after_help = EXIT_CODES)]
    Run(RunArguments),
    /// Check the configuration without connecting to anything
    Validate,
    /// Show the source, the stream and the targets, whether or not a process runs
    Status(StatusArguments),
    /// Read rows of a table again for a sink, beside its changes: to repair a replica
    Backfill(BackfillArguments),
    /// Let a running process take over what has changed in the configuration
    ///
    /// With mistakes, all of which are printed, the process goes on with the old one. SIGHUP does the same.
    #[command(after_help = EXIT_CODES)]
    Reload,
    /// Remove what `run` created at the source and on the stream
    Drop(DropArguments),
    /// Print the least-privilege roles and grants, and the NATS permissions
    InitSql(InitSqlArguments),
    /// Explain a code such as E1104, or list them all
    Explain {
        /// The code
        code: Option<String>,
    },
    /// Show it all with throwaway servers, live traffic, and a kill in the middle
    Demo(DemoArguments),
    /// Measure against pg_recvlogical and native logical replication
    Bench(BenchArguments),
    /// Measure the initial copy against that of native logical replication
    BenchBackfill(BenchBackfillArguments),
}

/// What `run` is asked to do.
#[derive(Clone, Debug, Args)]
pub(crate) struct RunArguments {
    /// Run only this part: capture, or sink:NAME; may be given several times
    #[arg(long, value_name = "PART")]
    pub(crate) only: Vec<Part>,
    /// End once everything that is committed at the source now has been applied
    #[arg(long)]
    pub(crate) once: bool,
    /// How long --once may take in all
    #[arg(long, value_name = "DURATION", default_value = "60s", requires = "once",
          value_parser = humantime::parse_duration)]
    pub(crate) timeout: Duration,
    /// End with exit code 5 where the process would stay alive, halted
    #[arg(long)]
    pub(crate) exit_on_halt: bool,
}

/// A part of the pipeline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// From the source to the stream.
    Capture,
    /// From the stream to the sink of that name.
    Sink(String),
}

impl Part {
    /// Every part that a configuration has.
    pub(crate) fn all(config: &Config) -> Vec<Self> {
        let sinks = config.sinks.iter();
        let sinks = sinks.map(|sink| Self::Sink(sink.name.clone()));
        std::iter::once(Self::Capture).chain(sinks).collect()
    }
}

impl RunArguments {
    /// Whether the process is to work for a part.
    pub(crate) fn works_for(&self, part: &Part) -> bool {
        self.only.is_empty() || self.only.contains(part)
    }
}

impl fmt::Display for Part {
    /// As `--only` takes it.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Capture => formatter.write_str("capture"),
            Self::Sink(name) => write!(formatter, "sink:{name}"),
        }
    }
}

impl FromStr for Part {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once(':') {
            None if text == "capture" => Ok(Self::Capture),
            Some(("sink", name)) if !name.is_empty() => Ok(Self::Sink(name.to_owned())),
            _ => Err("expected capture or sink:NAME"),
        }
    }
}

/// What `status` is asked to do.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct StatusArguments {
    /// The form of the answer
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub(crate) output: Output,
    /// End with exit code 3 when something is wrong: halted, retrying, parked, stopped, new, unreachable, or a
    /// lag of more than 300 s, or of more than twice source.heartbeat_interval where that is longer
    #[arg(long)]
    pub(crate) check: bool,
}

/// The form of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people.
    Table,
    /// One JSON object.
    Json,
}

/// What `backfill` is asked to do.
#[derive(Clone, Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub(crate) struct BackfillArguments {
    /// The verb.
    #[command(subcommand)]
    pub(crate) verb: BackfillVerb,
}

/// What is done about backfills.
#[derive(Clone, Debug, Subcommand)]
pub(crate) enum BackfillVerb {
    /// Read a table's rows again; the replica takes part in the stream meanwhile
    ///
    /// Without --where the replica is equal to the source at the end: rows that are wrong or missing come, and
    /// rows that the source does not have go. With --where the rows for which it holds are written, and nothing
    /// is removed.
    #[command(after_help = EXIT_CODES)]
    Start(BackfillStart),
    /// Show how far each table is, whether or not a process runs
    Status(BackfillStatus),
    /// Read no more rows until it is resumed; changes flow on
    Pause(BackfillTables),
    /// Go on with what was paused, or at another pace
    Resume(BackfillResume),
    /// End it where it is: rows that came are right, the others stay as they were
    Cancel(BackfillTables),
}

/// Which tables of which sinks a verb is for.
#[derive(Clone, Debug, Args)]
pub(crate) struct BackfillTables {
    /// The table at the source: schema.table, or table in the schema public
    pub(crate) table: Option<String>,
    /// Every configured table
    #[arg(long, conflicts_with = "table")]
    pub(crate) all: bool,
    /// Only for this sink; default: every sink that receives the table
    #[arg(long, value_name = "NAME")]
    pub(crate) sink: Option<String>,
}

/// What `backfill start` is asked to do.
#[derive(Clone, Debug, Args)]
pub(crate) struct BackfillStart {
    /// Of which tables and sinks.
    #[command(flatten)]
    pub(crate) tables: BackfillTables,
    /// Only rows for which this SQL condition holds, over the source's columns
    #[arg(long = "where", value_name = "SQL", conflicts_with = "all")]
    pub(crate) filter: Option<String>,
    /// At most so many rows a second
    #[arg(long, value_name = "ROWS/s", value_parser = rows_per_second)]
    pub(crate) rate: Option<u32>,
    /// Follow it to its end: exit code 0 when all is done, 3 when one was cancelled or its table is parked
    #[arg(long)]
    pub(crate) wait: bool,
}

/// What `backfill status` is asked to show.
#[derive(Clone, Debug, Args)]
pub(crate) struct BackfillStatus {
    /// Only this table; default: every configured one
    pub(crate) table: Option<String>,
    /// Only of this sink; default: every sink
    #[arg(long, value_name = "NAME")]
    pub(crate) sink: Option<String>,
    /// The form of the answer
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub(crate) output: Output,
}

/// What `backfill resume` is asked to do.
#[derive(Clone, Debug, Args)]
pub(crate) struct BackfillResume {
    /// Of which tables and sinks.
    #[command(flatten)]
    pub(crate) tables: BackfillTables,
    /// From now on at most so many rows a second, or `unlimited`; default: as before
    #[arg(long, value_name = "ROWS/s", value_parser = Pace::from_str)]
    pub(crate) rate: Option<Pace>,
}

/// How fast rows are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pace {
    /// As fast as the sink takes them.
    Unlimited,
    /// At most so many rows a second.
    RowsPerSecond(u32),
}

impl Pace {
    /// Rows a second, where they are limited.
    pub(crate) fn limit(self) -> Option<u32> {
        match self {
            Self::Unlimited => None,
            Self::RowsPerSecond(rows) => Some(rows),
        }
    }
}

impl FromStr for Pace {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "unlimited" => Ok(Self::Unlimited),
            text => match rows_per_second(text) {
                Ok(rows) => Ok(Self::RowsPerSecond(rows)),
                Err(error) => Err(format!("{error}, or `unlimited`")),
            },
        }
    }
}

fn rows_per_second(text: &str) -> Result<u32, String> {
    let rows: Option<u32> = text.parse().ok().filter(|rows| *rows > 0);
    rows.ok_or_else(|| format!("expected a number of rows from 1 to {}", u32::MAX))
}

/// What `drop` is asked to do.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct DropArguments {
    /// Do not ask
    #[arg(long)]
    pub(crate) yes: bool,
}

/// What `init-sql` is asked to print.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct InitSqlArguments {
    /// Only this part; default: all of them
    #[arg(value_enum)]
    pub(crate) part: Option<InitPart>,
}

/// Whose roles and grants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum InitPart {
    /// The source database.
    Source,
    /// The databases of the sinks.
    Target,
    /// The NATS server.
    Nats,
}

/// What `demo` is asked to do.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct DemoArguments {
    /// How long the traffic runs; default: until Ctrl-C on a terminal, else 20
    #[arg(long, value_name = "N")]
    pub(crate) seconds: Option<u64>,
    /// Plain lines instead of a screen
    #[arg(long)]
    pub(crate) plain: bool,
}

/// What `bench` is asked to measure.
#[derive(Clone, Debug, Args)]
pub(crate) struct BenchArguments {
    /// Rows of the bulk loads
    #[arg(long, value_name = "N", default_value_t = 1_000_000)]
    pub(crate) rows: u64,
    /// Single-row transactions of the backlog
    #[arg(long, value_name = "N", default_value_t = 100_000)]
    pub(crate) transactions: u64,
    /// Runs of each contender; the median counts
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub(crate) runs: u32,
    /// Where the numbers are written
    #[arg(long, value_name = "FILE", default_value = "target/bench/line.json")]
    pub(crate) output: PathBuf,
}

/// What `bench-backfill` is asked to measure.
#[derive(Clone, Debug, Args)]
pub(crate) struct BenchBackfillArguments {
    /// Rows that are there before the replica is
    #[arg(long, value_name = "N", default_value_t = 1_000_000)]
    pub(crate) rows: u64,
    /// Runs of each contender; the median counts
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub(crate) runs: u32,
    /// Where the numbers are written
    #[arg(
        long,
        value_name = "FILE",
        default_value = "target/bench/backfill.json"
    )]
    pub(crate) output: PathBuf,
}

fn log_level(text: &str) -> Result<LogLevel, String> {
    let levels = [
        LogLevel::Error,
        LogLevel::Warn,
        LogLevel::Info,
        LogLevel::Debug,
        LogLevel::Trace,
    ];
    let found = levels.into_iter().find(|level| level.as_str() == text);
    found.ok_or_else(|| "expected error, warn, info, debug or trace".to_owned())
}

fn log_format(text: &str) -> Result<LogFormat, String> {
    match text {
        "auto" => Ok(LogFormat::Auto),
        "pretty" => Ok(LogFormat::Pretty),
        "json" => Ok(LogFormat::Json),
        _ => Err("expected pretty, json or auto".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;
    use millrace_config::limits::ONCE_TIMEOUT_DEFAULT;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn the_default_timeout_is_the_named_limit() {
        let arguments = Arguments::try_parse_from(["millrace", "run", "--once"]).expect("valid");
        let Command::Run(run) = arguments.command else {
            panic!("{arguments:?}")
        };
        assert_eq!(run.timeout, ONCE_TIMEOUT_DEFAULT);
    }

    #[test]
    fn backfills_are_asked_for() {
        let parse = |line: &str| Arguments::try_parse_from(line.split(' '));
        let line = "millrace backfill start orders --sink wh --where id>3 --rate 500 --wait -c etc";
        let Command::Backfill(asked) = parse(line).expect("valid").command else {
            panic!("{line}")
        };
        let BackfillVerb::Start(start) = asked.verb else {
            panic!("{asked:?}")
        };
        assert_eq!(start.tables.table.as_deref(), Some("orders"));
        assert_eq!(start.tables.sink.as_deref(), Some("wh"));
        assert_eq!(start.filter.as_deref(), Some("id>3"));
        assert_eq!((start.rate, start.wait), (Some(500), true));
        for wrong in [
            "start orders --all",
            "start --all --where true",
            "start orders --rate 0",
            "start orders --rate -5",
            "start orders --rate fast",
            "resume orders --rate 0",
            "cancel orders --rate 5",
            "status --all",
            "stop orders",
        ] {
            assert!(
                parse(&format!("millrace backfill {wrong}")).is_err(),
                "{wrong}"
            );
        }
        for (text, limit) in [("unlimited", None), ("7", Some(7))] {
            assert_eq!(text.parse::<Pace>().expect("valid").limit(), limit);
        }
    }

    #[test]
    fn parts_and_global_options_are_read_anywhere() {
        let line = "millrace run -c etc --only capture --only sink:warehouse --log-format json";
        let arguments = Arguments::try_parse_from(line.split(' ')).expect("valid");
        assert_eq!(arguments.config, PathBuf::from("etc"));
        assert_eq!(arguments.log.log_format, Some(LogFormat::Json));
        let Command::Run(run) = arguments.command else {
            panic!("{arguments:?}")
        };
        assert_eq!(
            run.only,
            [Part::Capture, Part::Sink("warehouse".to_owned())]
        );
        for wrong in [
            "millrace run --only sink",
            "millrace run --only sink:",
            "millrace run --timeout 5s",
        ] {
            assert!(
                Arguments::try_parse_from(wrong.split(' ')).is_err(),
                "{wrong}"
            );
        }
    }
}
