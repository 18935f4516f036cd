//! A throwaway Postgres cluster.

mod backup;
mod binaries;
mod next_xid;
mod template;

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use millrace_event::{quote_identifier, quote_literal};
use nix::sys::signal::Signal;
use tokio_postgres::{Client, NoTls};

use crate::error::LabError;
use crate::place::{Account, Place, tail};
use crate::process::Process;
use binaries::Binaries;

const START_TIMEOUT: Duration = Duration::from_secs(60);
const STOP_TIMEOUT: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(10);
const PORT_ATTEMPTS: u32 = 10;
const LOG_TAIL_LINES: usize = 20;
/// What a server says while processes of the one before it hold its shared memory.
const STILL_IN_USE: &str = "is still in use";

/// What a cluster starts with.
#[derive(Clone, Debug, Default)]
pub struct PostgresOptions {
    /// The folder of the binaries; by default `MILLRACE_PG_BIN`, then the newest that is installed.
    pub bin: Option<PathBuf>,
    /// Where no folder is chosen, the major version: in `MILLRACE_PG<major>_BIN`, else where `make setup-tests`
    /// puts it. A start without that version fails.
    pub major: Option<u32>,
    /// Whether commits are flushed to disk; off, because a killed server loses nothing either way.
    pub fsync: bool,
    /// Runs initdb instead of copying a prepared cluster. Copies share one system identifier: a
    /// test in which the source is replaced by another cluster needs this.
    pub own_identity: bool,
    /// Further settings, which win over the laboratory's own.
    pub settings: Vec<(String, String)>,
}

/// One running (or stopped) cluster with the superuser `postgres`; stopped and removed on drop.
#[derive(Debug)]
pub struct Postgres {
    // Declared before the folder: the server ends first.
    process: Option<Process>,
    binaries: Binaries,
    account: Option<Account>,
    port: u16,
    password: String,
    place: Place,
}

/// How long an immediate shutdown may take.
const QUIT_DEADLINE: Duration = Duration::from_secs(5);

impl Drop for Postgres {
    fn drop(&mut self) {
        // By SIGKILL it would leave its shared memory behind, of which a machine has only so many pieces.
        if let Some(process) = &mut self.process {
            process.end_by(Signal::SIGQUIT, QUIT_DEADLINE);
        }
    }
}

impl Postgres {
    /// Makes a cluster and starts it on a free port of 127.0.0.1.
    ///
    /// # Errors
    ///
    /// Fails when no server is installed (the error says what to install) or it does not start.
    pub async fn start(options: PostgresOptions) -> Result<Self, LabError> {
        let account = Account::for_servers()?;
        let binaries =
            Binaries::find(options.bin.as_deref(), options.major)?.within_reach_of(account)?;
        let place = Place::new()?;
        let data = place.path().join("data");
        let password = template::provide(&binaries, account, &data, options.own_identity).await?;
        Account::make_dir(account, &place.path().join("socket"))?;
        let mut cluster = Self {
            process: None,
            binaries,
            account,
            port: 0,
            password,
            place,
        };
        cluster.write_settings(&options)?;
        for _ in 0..PORT_ATTEMPTS {
            cluster.port = free_port()?;
            match cluster.start_again().await {
                Err(LabError::Process { output, .. }) if output.contains("could not bind") => {}
                other => return other.map(|()| cluster),
            }
        }
        Err(LabError::Unexpected(
            "found no free port for postgres".into(),
        ))
    }

    /// The TCP port, the same for the cluster's whole life.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The postmaster's process id; `None` while the server is stopped.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Process::pid)
    }

    /// The superuser's password.
    #[must_use]
    pub fn password(&self) -> &str {
        &self.password
    }

    /// The folder of the unix socket, for `host=`.
    #[must_use]
    pub fn socket_dir(&self) -> PathBuf {
        self.place.path().join("socket")
    }

    /// The data folder.
    #[must_use]
    pub fn data_dir(&self) -> PathBuf {
        self.place.path().join("data")
    }

    /// A binary of this server's version: `pg_recvlogical`, `psql`, ...
    #[must_use]
    pub fn bin(&self, name: &str) -> PathBuf {
        self.binaries.path(name)
    }

    /// The server's major version.
    #[must_use]
    pub fn major(&self) -> u32 {
        self.binaries.major()
    }

    /// A URL of the superuser for that database, password included.
    #[must_use]
    pub fn url(&self, database: &str) -> String {
        format!(
            "postgres://postgres:{}@127.0.0.1:{}/{database}",
            self.password, self.port
        )
    }

    /// A plain connection to that database.
    ///
    /// # Errors
    ///
    /// Fails when the server does not answer or the database does not exist.
    pub async fn connect(&self, database: &str) -> Result<Client, LabError> {
        connect(&self.url(database)).await
    }

    /// Creates a database.
    ///
    /// # Errors
    ///
    /// Fails when it exists or the server is down.
    pub async fn create_database(&self, name: &str) -> Result<(), LabError> {
        self.execute(&format!("CREATE DATABASE {}", quote_identifier(name)))
            .await
    }

    /// Sets a server setting and reloads; one that needs a restart takes effect at the next start.
    ///
    /// # Errors
    ///
    /// Fails when the server refuses the setting or is down.
    pub async fn set(&self, setting: &str, value: &str) -> Result<(), LabError> {
        let (setting, value) = (quote_identifier(setting), quote_literal(value));
        self.execute(&format!("ALTER SYSTEM SET {setting} = {value}"))
            .await?;
        self.execute("SELECT pg_reload_conf()").await
    }

    /// Kills the server and all its backends with SIGKILL: a crash of the machine's process tree.
    pub fn kill9(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill_now();
        }
    }

    /// A fast shutdown: sessions end with 57P01, the server waits for its walsenders.
    ///
    /// # Errors
    ///
    /// Fails when the server still runs after 30 s.
    pub async fn stop_fast(&mut self) -> Result<(), LabError> {
        self.stop(Signal::SIGINT).await
    }

    /// An immediate shutdown: no checkpoint, recovery at the next start.
    ///
    /// # Errors
    ///
    /// Fails when the server still runs after 30 s.
    pub async fn stop_immediate(&mut self) -> Result<(), LabError> {
        self.stop(Signal::SIGQUIT).await
    }

    /// Begins a fast shutdown and returns at once.
    ///
    /// # Errors
    ///
    /// Fails when the signal cannot be sent.
    pub fn begin_stop_fast(&mut self) -> Result<(), LabError> {
        match &mut self.process {
            Some(process) => process
                .signal(Signal::SIGINT)
                .map_err(LabError::io("stop postgres")),
            None => Ok(()),
        }
    }

    /// Starts the stopped cluster on the same port and waits until it takes connections.
    ///
    /// # Errors
    ///
    /// Fails with the end of the server's log when it does not come up.
    pub async fn start_again(&mut self) -> Result<(), LabError> {
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            match self.launch().await {
                // A backend that a killed server had just forked ends a moment after it.
                Err(LabError::Process { output, .. })
                    if output.contains(STILL_IN_USE) && Instant::now() < deadline =>
                {
                    tokio::time::sleep(POLL).await;
                }
                other => return other,
            }
        }
    }

    async fn launch(&mut self) -> Result<(), LabError> {
        self.stop_immediate().await?;
        let log_start = fs::metadata(self.log()).map_or(0, |meta| meta.len());
        let log = append(&self.log())?;
        let err = log.try_clone().map_err(LabError::io("share the log"))?;
        let mut command = Command::new(self.bin("postgres"));
        command
            .arg("-D")
            .arg(self.data_dir())
            .args(["-p", &self.port.to_string()])
            .arg("-k")
            .arg(self.socket_dir())
            .env("LC_ALL", "C")
            .current_dir(self.place.path())
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(err);
        if let Some(account) = self.account {
            command.uid(account.uid).gid(account.gid);
        }
        let process = Process::spawn(&mut command, self.place.path(), "postgres").map_err(
            LabError::io(format!("start {}", self.bin("postgres").display())),
        )?;
        self.process = Some(process);
        self.wait_until_ready(log_start).await
    }

    /// The end of the server's log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        tail(&self.log(), LOG_TAIL_LINES)
    }

    async fn wait_until_ready(&mut self, log_start: u64) -> Result<(), LabError> {
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            // Asked first: another server's answer on a port we lost is not ours.
            let ended = match &mut self.process {
                Some(process) => process.ended().map_err(LabError::io("watch postgres"))?,
                None => None,
            };
            if ended.is_some() {
                self.process = None;
                let text = fs::read(self.log()).unwrap_or_default();
                let from = usize::try_from(log_start).unwrap_or(0).min(text.len());
                let output = String::from_utf8_lossy(&text[from..]).into_owned();
                return Err(LabError::Process {
                    what: "starting postgres".into(),
                    output,
                });
            }
            if self.pid_file_says_ready() && self.connect("postgres").await.is_ok() {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(LabError::Timeout {
                    what: "postgres taking connections".into(),
                    seconds: START_TIMEOUT.as_secs(),
                    output: self.log_tail(),
                });
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// The postmaster writes its state in line 8 of its pid file, its pid in line 1.
    fn pid_file_says_ready(&self) -> bool {
        let text = fs::read_to_string(self.data_dir().join("postmaster.pid")).unwrap_or_default();
        let mut lines = text.lines();
        let own = self.process.as_ref().is_some_and(|process| {
            lines
                .next()
                .is_some_and(|line| line.trim() == process.pid().to_string())
        });
        own && lines
            .nth(6)
            .is_some_and(|state| matches!(state.trim(), "ready" | "standby"))
    }

    async fn stop(&mut self, signal: Signal) -> Result<(), LabError> {
        let Some(process) = &mut self.process else {
            return Ok(());
        };
        process
            .signal(signal)
            .map_err(LabError::io("stop postgres"))?;
        let ended = process
            .wait(STOP_TIMEOUT)
            .await
            .map_err(LabError::io("await postgres' end"))?;
        if ended.is_none() {
            return Err(LabError::Timeout {
                what: "postgres' shutdown".into(),
                seconds: STOP_TIMEOUT.as_secs(),
                output: self.log_tail(),
            });
        }
        self.process = None;
        Ok(())
    }

    async fn execute(&self, statement: &str) -> Result<(), LabError> {
        let client = self.connect("postgres").await?;
        client
            .batch_execute(statement)
            .await
            .map_err(LabError::postgres(statement))
    }

    fn log(&self) -> PathBuf {
        self.place.path().join("postgres.log")
    }

    fn write_settings(&self, options: &PostgresOptions) -> Result<(), LabError> {
        let mut text = String::from(
            "\nlisten_addresses = '127.0.0.1'\nwal_level = logical\nmax_wal_senders = 20\n\
             max_replication_slots = 20\nshared_buffers = '32MB'\nlog_timezone = 'UTC'\n\
             log_line_prefix = '%m [%p] %a '\nmax_connections = 100\njit = off\n",
        );
        if !options.fsync {
            text.push_str("fsync = off\n");
        }
        for (setting, value) in &options.settings {
            text.push_str(&format!("{setting} = '{}'\n", value.replace('\'', "''")));
        }
        let path = self.data_dir().join("postgresql.conf");
        append(&path)?
            .write_all(text.as_bytes())
            .map_err(LabError::io(format!("write {}", path.display())))
    }
}

/// A plain connection by URL; its task ends with the client.
pub(crate) async fn connect(url: &str) -> Result<Client, LabError> {
    let (client, connection) = tokio_postgres::connect(url, NoTls)
        .await
        .map_err(LabError::postgres("connect"))?;
    // The client's own calls report what ends the connection.
    tokio::spawn(connection);
    Ok(client)
}

fn append(path: &Path) -> Result<File, LabError> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .open(path)
        .map_err(LabError::io(format!("open {}", path.display())))
}

fn free_port() -> Result<u16, LabError> {
    TcpListener::bind(("127.0.0.1", 0))
        .and_then(|listener| listener.local_addr())
        .map(|address| address.port())
        .map_err(LabError::io("find a free port"))
}

#[cfg(test)]
mod tests;
