//! A throwaway nats-server with JetStream.

mod operator;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::error::LabError;
use crate::place::{Place, copy_tree, tail, tools};
use crate::process::Process;

pub use operator::Operator;

const VERSION_MIN: (u32, u32) = (2, 14);
const START_TIMEOUT: Duration = Duration::from_secs(30);
const STOP_TIMEOUT: Duration = Duration::from_secs(30);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(10);
const LOG_TAIL_LINES: usize = 20;
const REMEDY: &str = "run `make setup`, or set MILLRACE_NATS_BIN to a nats-server 2.14 or later";
const OLD_REMEDY: &str =
    "run `make setup-tests`, or set MILLRACE_OLD_NATS_BIN to a nats-server before 2.14";

/// What a broker starts with.
#[derive(Clone, Debug)]
pub struct NatsOptions {
    /// The binary; by default `MILLRACE_NATS_BIN`, then `.tools/nats-server`, then `PATH`.
    pub bin: Option<PathBuf>,
    /// Starts a broker that the product must refuse instead: `MILLRACE_OLD_NATS_BIN`, then
    /// `.tools/nats-server-too-old`.
    pub too_old: bool,
    /// How often the broker flushes to disk: a duration, or `always`. Its own default is `2m`.
    pub sync_interval: String,
    /// Whether JetStream is on.
    pub jetstream: bool,
    /// How much JetStream may store on disk, such as `1G`; by default what the disk has.
    pub max_file_store: Option<String>,
    /// Further lines of its configuration file: `max_payload: 65536`, users, TLS.
    pub config: String,
}

impl Default for NatsOptions {
    fn default() -> Self {
        Self {
            bin: None,
            too_old: false,
            sync_interval: "2m".into(),
            jetstream: true,
            max_file_store: None,
            config: String::new(),
        }
    }
}

/// One running (or stopped) broker on 127.0.0.1; stopped and removed on drop.
#[derive(Debug)]
pub struct Nats {
    // Declared before the folder: the server ends first.
    process: Option<Process>,
    bin: PathBuf,
    /// What its configuration file says of JetStream.
    jetstream: String,
    port: u16,
    place: Place,
}

impl Nats {
    /// Starts a broker on a free port, with an empty store.
    ///
    /// # Errors
    ///
    /// Fails when no server of at least 2.14 is found (with `too_old`: of less), or it does not come up.
    pub async fn start(options: NatsOptions) -> Result<Self, LabError> {
        let bin = if options.too_old {
            find_too_old()?
        } else {
            find(options.bin.as_deref())?
        };
        check_version(&bin, options.too_old)?;
        let place = Place::new()?;
        fs::create_dir(place.path().join("store")).map_err(LabError::io("make the store"))?;
        let jetstream = options.jetstream.then(|| {
            let most = options.max_file_store;
            let most = most.map_or(String::new(), |most| format!(", max_file_store: {most}"));
            format!(
                "\njetstream {{ store_dir: \"{}\", sync_interval: {}{most} }}\n",
                place.path().join("store").display(),
                options.sync_interval
            )
        });
        // The broker itself takes a free port the first time.
        let mut broker = Self {
            process: None,
            bin,
            jetstream: jetstream.unwrap_or_default(),
            port: 0,
            place,
        };
        broker.configure(&options.config)?;
        broker.start_again().await?;
        Ok(broker)
    }

    /// `nats://127.0.0.1:<port>`.
    #[must_use]
    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    /// The port, the same for the broker's whole life.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The process id; `None` while the broker is stopped.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Process::pid)
    }

    /// A client without credentials.
    ///
    /// # Errors
    ///
    /// Fails when the broker does not answer within 5 s.
    pub async fn client(&self) -> Result<async_nats::Client, LabError> {
        async_nats::ConnectOptions::new()
            .connection_timeout(CONNECT_TIMEOUT)
            .connect(self.url())
            .await
            .map_err(LabError::Nats)
    }

    /// Gives it other further lines of its configuration file, which it reads when it starts again.
    ///
    /// # Errors
    ///
    /// Fails when the file cannot be written.
    pub fn configure(&self, config: &str) -> Result<(), LabError> {
        let text = format!("{config}{}", self.jetstream);
        fs::write(self.place.path().join("nats.conf"), text)
            .map_err(LabError::io("write the broker's configuration"))
    }

    /// SIGKILL.
    pub fn kill9(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill_now();
        }
    }

    /// An orderly shutdown (SIGTERM).
    ///
    /// # Errors
    ///
    /// Fails when it still runs after 30 s.
    pub async fn stop(&mut self) -> Result<(), LabError> {
        let Some(process) = &mut self.process else {
            return Ok(());
        };
        process
            .signal(Signal::SIGTERM)
            .map_err(LabError::io("stop nats-server"))?;
        let ended = process
            .wait(STOP_TIMEOUT)
            .await
            .map_err(LabError::io("await its end"))?;
        if ended.is_none() {
            return Err(self.timeout("nats-server's shutdown", STOP_TIMEOUT));
        }
        self.process = None;
        Ok(())
    }

    /// Starts the stopped broker on the same port with what its store holds.
    ///
    /// # Errors
    ///
    /// Fails with the end of its log when it does not come up.
    pub async fn start_again(&mut self) -> Result<(), LabError> {
        self.kill9();
        let dir = self.place.path().to_path_buf();
        let log = fs::OpenOptions::new()
            .append(true)
            .create(true)
            .open(self.log())
            .map_err(LabError::io("open the broker's log"))?;
        let err = log
            .try_clone()
            .map_err(LabError::io("share the broker's log"))?;
        let port = if self.port == 0 {
            "-1".to_owned()
        } else {
            self.port.to_string()
        };
        let mut command = Command::new(&self.bin);
        command
            .args(["-a", "127.0.0.1", "-p", &port, "--ports_file_dir"])
            .arg(&dir)
            .arg("-c")
            .arg(dir.join("nats.conf"))
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(err);
        let process = Process::spawn(&mut command, &dir, "nats")
            .map_err(LabError::io(format!("start {}", self.bin.display())))?;
        // The broker names the file after its binary.
        let name = self.bin.file_name().unwrap_or_default().to_string_lossy();
        let ports = dir.join(format!("{name}_{}.ports", process.pid()));
        self.process = Some(process);
        self.port = self.wait_until_ready(&ports).await?;
        Ok(())
    }

    /// Stops the process where it is (SIGSTOP): connections stay open and nothing answers.
    ///
    /// # Errors
    ///
    /// Fails when the signal cannot be sent.
    pub fn pause(&mut self) -> Result<(), LabError> {
        self.signal(Signal::SIGSTOP)
    }

    /// Undoes [`Nats::pause`].
    ///
    /// # Errors
    ///
    /// Fails when the signal cannot be sent.
    pub fn resume(&mut self) -> Result<(), LabError> {
        self.signal(Signal::SIGCONT)
    }

    /// Remembers the store as it is now. The process is held for the moment of the copy, so that
    /// this is the state a crash of the machine would leave if everything until now were flushed.
    ///
    /// # Errors
    ///
    /// Fails when the store cannot be copied.
    pub async fn snapshot_store(&mut self) -> Result<(), LabError> {
        let _ = fs::remove_dir_all(self.snapshot());
        self.pause()?;
        let (store, snapshot) = (self.store(), self.snapshot());
        let copied = tokio::task::spawn_blocking(move || copy_tree(&store, &snapshot))
            .await
            .map_err(|error| LabError::Unexpected(format!("copying the store: {error}")));
        self.resume()?;
        copied?
    }

    /// Kills the broker and puts the remembered store back: it has lost the tail that it had
    /// acknowledged and not flushed. Stays down until [`Nats::start_again`]; can be repeated.
    ///
    /// # Errors
    ///
    /// Fails when there is no snapshot or it cannot be put back.
    pub fn roll_back_store(&mut self) -> Result<(), LabError> {
        if !self.snapshot().is_dir() {
            return Err(LabError::Unexpected(
                "no snapshot of the broker's store was taken".into(),
            ));
        }
        self.kill9();
        fs::remove_dir_all(self.store()).map_err(LabError::io("remove the broker's store"))?;
        copy_tree(&self.snapshot(), &self.store())
    }

    /// The end of its log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        tail(&self.log(), LOG_TAIL_LINES)
    }

    async fn wait_until_ready(&mut self, ports: &Path) -> Result<u16, LabError> {
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            let ended = match &mut self.process {
                Some(process) => process.ended().map_err(LabError::io("watch nats-server"))?,
                None => None,
            };
            if ended.is_some() {
                self.process = None;
                return Err(LabError::Process {
                    what: "starting nats-server".into(),
                    output: self.log_tail(),
                });
            }
            if let Some(port) = port_in(ports)
                && tokio::net::TcpStream::connect(("127.0.0.1", port))
                    .await
                    .is_ok()
            {
                let _ = fs::remove_file(ports);
                return Ok(port);
            }
            if Instant::now() >= deadline {
                return Err(self.timeout("nats-server taking connections", START_TIMEOUT));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    fn signal(&mut self, signal: Signal) -> Result<(), LabError> {
        match &mut self.process {
            Some(process) => process
                .signal(signal)
                .map_err(LabError::io("signal nats-server")),
            None => Ok(()),
        }
    }

    fn timeout(&self, what: &str, after: Duration) -> LabError {
        let (what, seconds) = (what.to_owned(), after.as_secs());
        LabError::Timeout {
            what,
            seconds,
            output: self.log_tail(),
        }
    }

    fn store(&self) -> PathBuf {
        self.place.path().join("store")
    }

    fn snapshot(&self) -> PathBuf {
        self.place.path().join("snapshot")
    }

    fn log(&self) -> PathBuf {
        self.place.path().join("nats.log")
    }
}

/// The file is `{"nats":["nats://127.0.0.1:38475"]}`.
fn port_in(ports: &Path) -> Option<u16> {
    let value: serde_json::Value = serde_json::from_slice(&fs::read(ports).ok()?).ok()?;
    value["nats"][0].as_str()?.rsplit(':').next()?.parse().ok()
}

fn find(chosen: Option<&Path>) -> Result<PathBuf, LabError> {
    let named = chosen
        .map(Path::to_path_buf)
        .or_else(|| std::env::var_os("MILLRACE_NATS_BIN").map(PathBuf::from));
    if let Some(bin) = named {
        if bin.is_file() {
            return Ok(bin);
        }
        let what = format!("{} is no file", bin.display());
        return Err(LabError::Missing {
            what,
            remedy: REMEDY.into(),
        });
    }
    in_tools("nats-server")
        .or_else(|| {
            std::env::split_paths(&std::env::var_os("PATH")?)
                .map(|dir| dir.join("nats-server"))
                .find(|bin| bin.is_file())
        })
        .ok_or_else(|| LabError::Missing {
            what: "nats-server is not installed".into(),
            remedy: REMEDY.into(),
        })
}

fn find_too_old() -> Result<PathBuf, LabError> {
    std::env::var_os("MILLRACE_OLD_NATS_BIN")
        .map(PathBuf::from)
        .or_else(|| in_tools("nats-server-too-old"))
        .filter(|bin| bin.is_file())
        .ok_or_else(|| LabError::Missing {
            what: "no nats-server that is too old is installed".into(),
            remedy: OLD_REMEDY.into(),
        })
}

/// A file in `.tools`.
fn in_tools(name: &str) -> Option<PathBuf> {
    tools(name).filter(|bin| bin.is_file())
}

fn check_version(bin: &Path, too_old: bool) -> Result<(), LabError> {
    let output = Command::new(bin)
        .arg("-v")
        .output()
        .map_err(LabError::io(format!("run {}", bin.display())))?;
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    match parse_version(&text) {
        Some(version) if (version < VERSION_MIN) == too_old => Ok(()),
        _ if too_old => Err(LabError::Missing {
            what: format!("{} answers `{text}`, which is not too old", bin.display()),
            remedy: OLD_REMEDY.into(),
        }),
        _ => Err(LabError::Missing {
            what: format!("{} answers `{text}` and 2.14 is needed", bin.display()),
            remedy: REMEDY.into(),
        }),
    }
}

/// `nats-server: v2.15.1` is (2, 15).
fn parse_version(text: &str) -> Option<(u32, u32)> {
    let (_, version) = text.rsplit_once('v')?;
    let mut parts = version.split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use async_nats::jetstream::{self, stream};

    use super::*;

    #[test]
    fn versions_compare_as_numbers() {
        assert_eq!(parse_version("nats-server: v2.15.1"), Some((2, 15)));
        assert!(parse_version("nats-server: v2.9.10").unwrap() < VERSION_MIN);
        assert_eq!(parse_version("hello"), None);
    }

    async fn last_sequence(broker: &Nats) -> u64 {
        let context = jetstream::new(broker.client().await.unwrap());
        context
            .get_stream("T")
            .await
            .unwrap()
            .get_info()
            .await
            .unwrap()
            .state
            .last_sequence
    }

    #[tokio::test]
    async fn a_rolled_back_store_has_lost_its_acknowledged_tail() {
        let mut broker = Nats::start(NatsOptions::default()).await.unwrap();
        let url = broker.url();
        let context = jetstream::new(broker.client().await.unwrap());
        let subjects = vec!["t".to_owned()];
        let config = stream::Config {
            name: "T".into(),
            subjects,
            ..Default::default()
        };
        context.create_stream(config).await.unwrap();
        for _ in 0..3 {
            context
                .publish("t", "x".into())
                .await
                .unwrap()
                .await
                .unwrap();
        }
        broker.snapshot_store().await.unwrap();
        for _ in 0..4 {
            context
                .publish("t", "x".into())
                .await
                .unwrap()
                .await
                .unwrap();
        }
        broker.kill9();
        broker.start_again().await.unwrap();
        assert_eq!(last_sequence(&broker).await, 7);

        broker.roll_back_store().unwrap();
        broker.start_again().await.unwrap();
        assert_eq!(last_sequence(&broker).await, 3);
        assert_eq!(broker.url(), url);
        broker.stop().await.unwrap();
    }
}
