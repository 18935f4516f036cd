//! The product as a child process.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::error::LabError;
use crate::process::{Process, exit_code};

const POLL: Duration = Duration::from_millis(10);
const ADMIN_TIMEOUT: Duration = Duration::from_secs(10);
const HTTP_TIMEOUT: Duration = Duration::from_secs(10);
const ADMIN_MESSAGE: &str = "admin listening";

/// Numbers the output files: every start has its own, so that no log is mistaken for an older one.
static STARTS: AtomicU64 = AtomicU64::new(0);

/// One run of the product's binary; killed when it is dropped.
#[derive(Debug)]
pub struct Pipeline {
    process: Process,
    stdout: PathBuf,
    stderr: PathBuf,
}

impl Pipeline {
    /// Starts `bin` with `args` in `dir`, its output captured to files there.
    ///
    /// # Errors
    ///
    /// Fails when the binary cannot be started or `dir` not be written.
    pub fn spawn(bin: &Path, dir: &Path, args: &[&str]) -> Result<Self, LabError> {
        let number = STARTS.fetch_add(1, Ordering::Relaxed);
        let name = format!("pipeline-{}-{number}", std::process::id());
        let stdout = dir.join(format!("{name}.stdout"));
        let stderr = dir.join(format!("{name}.stderr"));
        let create = |path: &Path| {
            File::create(path).map_err(LabError::io(format!("make {}", path.display())))
        };
        let mut command = Command::new(bin);
        command
            .args(args)
            .current_dir(dir)
            .stdin(Stdio::null())
            .stdout(create(&stdout)?)
            .stderr(create(&stderr)?);
        let process = Process::spawn(&mut command, dir, "pipeline")
            .map_err(LabError::io(format!("start {}", bin.display())))?;
        Ok(Self {
            process,
            stdout,
            stderr,
        })
    }

    /// The process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// SIGKILL; returns when the process is gone.
    pub fn kill9(&mut self) {
        self.process.kill_now();
    }

    /// SIGTERM: asks it to drain and end.
    ///
    /// # Errors
    ///
    /// Fails when the signal cannot be sent.
    pub fn terminate(&mut self) -> Result<(), LabError> {
        self.process
            .signal(Signal::SIGTERM)
            .map_err(LabError::io("terminate the pipeline"))
    }

    /// SIGINT: what Ctrl-C on a terminal sends.
    ///
    /// # Errors
    ///
    /// Fails when the signal cannot be sent.
    pub fn interrupt(&mut self) -> Result<(), LabError> {
        self.process
            .signal(Signal::SIGINT)
            .map_err(LabError::io("interrupt the pipeline"))
    }

    /// SIGHUP: asks it to read its configuration again.
    ///
    /// # Errors
    ///
    /// Fails when the signal cannot be sent.
    pub fn hang_up(&mut self) -> Result<(), LabError> {
        self.process
            .signal(Signal::SIGHUP)
            .map_err(LabError::io("send the pipeline SIGHUP"))
    }

    /// SIGSTOP: holds the process where it is.
    ///
    /// # Errors
    ///
    /// Fails when the signal cannot be sent.
    pub fn pause(&mut self) -> Result<(), LabError> {
        self.process
            .signal(Signal::SIGSTOP)
            .map_err(LabError::io("pause the pipeline"))
    }

    /// Undoes [`Pipeline::pause`].
    ///
    /// # Errors
    ///
    /// Fails when the signal cannot be sent.
    pub fn resume(&mut self) -> Result<(), LabError> {
        self.process
            .signal(Signal::SIGCONT)
            .map_err(LabError::io("resume the pipeline"))
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.process.ended(), Ok(None))
    }

    /// Waits for its end: the exit code, or 128 + the signal that ended it.
    ///
    /// # Errors
    ///
    /// Fails with its output when it still runs after `timeout`.
    pub async fn wait(&mut self, timeout: Duration) -> Result<i32, LabError> {
        let ended = self
            .process
            .wait(timeout)
            .await
            .map_err(LabError::io("await the pipeline's end"))?;
        match ended {
            Some(status) => Ok(exit_code(status)),
            None => Err(self.timeout("the pipeline's end".into(), timeout)),
        }
    }

    /// What it wrote to standard output so far.
    #[must_use]
    pub fn stdout(&self) -> String {
        read(&self.stdout)
    }

    /// What it wrote to standard error so far.
    #[must_use]
    pub fn stderr(&self) -> String {
        read(&self.stderr)
    }

    /// Both outputs, standard error last.
    #[must_use]
    pub fn logs(&self) -> String {
        self.stdout() + &self.stderr()
    }

    /// Waits for a line that contains `text` and returns it.
    ///
    /// # Errors
    ///
    /// Fails with the output when `timeout` passes or the process ends without it.
    pub async fn wait_for_log(
        &mut self,
        text: &str,
        timeout: Duration,
    ) -> Result<String, LabError> {
        let deadline = Instant::now() + timeout;
        loop {
            // Asked first: what it wrote before it ended is then complete.
            let running = self.is_running();
            if let Some(line) = self.logs().lines().find(|line| line.contains(text)) {
                return Ok(line.to_owned());
            }
            if !running {
                let what = format!("waiting for the log line `{text}`: the pipeline");
                return Err(LabError::Process {
                    what,
                    output: self.logs(),
                });
            }
            if Instant::now() >= deadline {
                return Err(self.timeout(format!("the log line `{text}`"), timeout));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// The admin address that it logged, waited for up to 10 s.
    ///
    /// # Errors
    ///
    /// Fails when no such line appears.
    pub async fn admin(&mut self) -> Result<String, LabError> {
        let line = self.wait_for_log(ADMIN_MESSAGE, ADMIN_TIMEOUT).await?;
        address_in(&line)
            .ok_or_else(|| LabError::Unexpected(format!("no address in the log line `{line}`")))
    }

    /// GETs a path of the admin server: status and body.
    ///
    /// # Errors
    ///
    /// Fails when there is no admin server or it does not answer HTTP within 10 s.
    pub async fn get(&mut self, path: &str) -> Result<(u16, String), LabError> {
        let address = self.admin().await?;
        let answer = tokio::time::timeout(HTTP_TIMEOUT, exchange(&address, path))
            .await
            .map_err(|_| self.timeout(format!("an answer to GET {path}"), HTTP_TIMEOUT))?
            .map_err(LabError::io(format!("GET {path} from {address}")))?;
        parse_response(&answer)
            .ok_or_else(|| LabError::Unexpected(format!("GET {path}: not an HTTP response")))
    }

    fn timeout(&self, what: String, after: Duration) -> LabError {
        LabError::Timeout {
            what,
            seconds: after.as_secs(),
            output: self.logs(),
        }
    }
}

fn read(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

/// From a JSON line (`fields.address` or `address`) or a plain one (`address=127.0.0.1:9400`).
fn address_in(line: &str) -> Option<String> {
    if let Ok(json) = serde_json::from_str::<serde_json::Value>(line) {
        let field = json
            .pointer("/fields/address")
            .or_else(|| json.get("address"))?;
        return field.as_str().map(str::to_owned);
    }
    let (_, rest) = line.split_once("address=")?;
    let end = rest.find(char::is_whitespace).unwrap_or(rest.len());
    Some(rest[..end].trim_matches('"').to_owned())
}

async fn exchange(address: &str, path: &str) -> std::io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    Ok(answer)
}

fn parse_response(answer: &[u8]) -> Option<(u16, String)> {
    let split = answer.windows(4).position(|window| window == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&answer[..split]).ok()?;
    let body = &answer[split + 4..];
    let status = head.split_whitespace().nth(1)?.parse().ok()?;
    let chunked = head.lines().any(|line| {
        line.split_once(':').is_some_and(|(name, value)| {
            name.eq_ignore_ascii_case("transfer-encoding")
                && value.trim().eq_ignore_ascii_case("chunked")
        })
    });
    let body = if chunked {
        unchunk(body)?
    } else {
        body.to_vec()
    };
    Some((status, String::from_utf8_lossy(&body).into_owned()))
}

fn unchunk(mut body: &[u8]) -> Option<Vec<u8>> {
    let mut whole = Vec::new();
    loop {
        let line = body.windows(2).position(|window| window == b"\r\n")?;
        let size = std::str::from_utf8(&body[..line]).ok()?.split(';').next()?;
        let size = usize::from_str_radix(size.trim(), 16).ok()?;
        if size == 0 {
            return Some(whole);
        }
        let begin = line + 2;
        let end = begin.checked_add(size)?;
        whole.extend_from_slice(body.get(begin..end)?);
        body = body.get(end + 2..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_is_found_in_either_log_format() {
        let json =
            r#"{"level":"INFO","fields":{"message":"admin listening","address":"127.0.0.1:9"}}"#;
        assert_eq!(address_in(json).as_deref(), Some("127.0.0.1:9"));
        let plain = "INFO millrace: admin listening address=127.0.0.1:9 x=1";
        assert_eq!(address_in(plain).as_deref(), Some("127.0.0.1:9"));
    }

    #[test]
    fn responses_are_read_whole_and_chunked() {
        let plain = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\nno";
        assert_eq!(parse_response(plain), Some((503, "no".into())));
        let chunked =
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n1\r\nd\r\n0\r\n\r\n";
        assert_eq!(parse_response(chunked), Some((200, "abcd".into())));
    }

    #[tokio::test]
    async fn output_exit_codes_and_kills_are_seen() {
        let place = crate::Place::new().unwrap();
        let shell = Path::new("/bin/sh");
        let script = "echo out; echo err >&2; exit 5";
        let mut run = Pipeline::spawn(shell, place.path(), &["-c", script]).unwrap();
        assert_eq!(run.wait(Duration::from_secs(10)).await.unwrap(), 5);
        assert_eq!(run.logs(), "out\nerr\n");
        assert!(
            run.wait_for_log("absent", Duration::from_secs(10))
                .await
                .is_err()
        );

        let mut run = Pipeline::spawn(shell, place.path(), &["-c", "echo up; sleep 60"]).unwrap();
        run.wait_for_log("up", Duration::from_secs(10))
            .await
            .unwrap();
        run.kill9();
        assert_eq!(run.wait(Duration::from_secs(1)).await.unwrap(), 137);
    }
}
