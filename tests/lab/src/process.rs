//! A child process that cannot outlive its owner's normal end, and whose pid a later run can find.

use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const POLL: Duration = Duration::from_millis(5);

/// How long a process may take to stop where it is. Beyond, a test meets one that still answers.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);

/// One child process in a process group of its own: a Ctrl-C meant for us does not reach it.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    pid_file: PathBuf,
    ended: Option<ExitStatus>,
}

impl Process {
    /// Starts `command` and writes `<dir>/<name>.<pid>.pid`, which the sweep of a later run reads.
    pub(crate) fn spawn(command: &mut Command, dir: &Path, name: &str) -> io::Result<Self> {
        let child = command.process_group(0).spawn()?;
        let pid = child.id();
        let pid_file = dir.join(format!("{name}.{pid}.pid"));
        let mut process = Self {
            child,
            pid_file,
            ended: None,
        };
        if let Err(error) = std::fs::write(&process.pid_file, identity(pid)) {
            process.kill_now();
            return Err(error);
        }
        Ok(process)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, or `None` while it runs.
    pub(crate) fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait()?;
            if self.ended.is_some() {
                let _ = std::fs::remove_file(&self.pid_file);
            }
        }
        Ok(self.ended)
    }

    /// Sends a signal; nothing happens when the process has ended.
    pub(crate) fn signal(&mut self, signal: Signal) -> io::Result<()> {
        if self.ended()?.is_some() {
            return Ok(());
        }
        kill(pid_of(self.child.id()), signal).map_err(io::Error::from)?;
        if signal == Signal::SIGSTOP {
            self.wait_until_stopped();
        }
        Ok(())
    }

    /// A signal takes a moment, in which a thread may still answer.
    fn wait_until_stopped(&self) {
        let deadline = Instant::now() + STOP_TIMEOUT;
        while !is_stopped(self.child.id()) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until the process has ended; `None` when `timeout` passed first.
    pub(crate) async fn wait(&mut self, timeout: Duration) -> io::Result<Option<ExitStatus>> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.ended()? {
                return Ok(Some(status));
            }
            if Instant::now() >= deadline {
                return Ok(None);
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Ends it by a signal that lets it clean up after itself, or by SIGKILL where that takes too long.
    pub(crate) fn end_by(&mut self, signal: Signal, within: Duration) {
        let deadline = Instant::now() + within;
        if self.signal(signal).is_ok() {
            while matches!(self.ended(), Ok(None)) && Instant::now() < deadline {
                std::thread::sleep(POLL);
            }
        }
        self.kill_now();
    }

    /// SIGKILL to the process and to every child it has, then reaps it. Postgres' backends lead
    /// sessions of their own, so the process group alone would miss them.
    pub(crate) fn kill_now(&mut self) {
        if self.ended.is_some() {
            return;
        }
        let children = children_of(self.child.id());
        let _ = self.child.kill();
        for child in children {
            let _ = kill(pid_of(child), Signal::SIGKILL);
        }
        self.ended = self.child.wait().ok();
        let _ = std::fs::remove_file(&self.pid_file);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill_now();
    }
}

/// The exit code as a shell gives it: 128 + the signal for a process that a signal ended.
pub(crate) fn exit_code(status: ExitStatus) -> i32 {
    status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// A process's pid and start time: a pid alone is given out again.
pub(crate) fn identity(pid: u32) -> String {
    format!("{pid} {}", start_time(pid).unwrap_or_default())
}

/// Whether the process of that [`identity`] still runs; its pid if so.
pub(crate) fn running(identity: &str) -> Option<u32> {
    let (pid, started) = identity.trim_end_matches('\n').split_once(' ')?;
    let pid: u32 = pid.parse().ok()?;
    kill(pid_of(pid), None).ok()?;
    (start_time(pid).unwrap_or_default() == started).then_some(pid)
}

/// Kills the process of that [`identity`] and its children; nothing happens when it is gone.
pub(crate) fn kill_stale(identity: &str) {
    if let Some(pid) = running(identity) {
        let children = children_of(pid);
        let _ = kill(pid_of(pid), Signal::SIGKILL);
        for child in children {
            let _ = kill(pid_of(child), Signal::SIGKILL);
        }
    }
}

fn pid_of(pid: u32) -> Pid {
    Pid::from_raw(i32::try_from(pid).expect("the kernel's pids fit an i32"))
}

/// Field 22 of `/proc/<pid>/stat`; `None` where there is no `/proc`.
fn start_time(pid: u32) -> Option<String> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command (field 2) may hold blanks and brackets: count from the last bracket.
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(19).map(str::to_owned)
}

fn children_of(pid: u32) -> Vec<u32> {
    std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))
        .map(|list| {
            list.split_whitespace()
                .filter_map(|p| p.parse().ok())
                .collect()
        })
        .unwrap_or_default()
}

/// Whether all threads of a process are held; where the system does not tell, they are taken to be.
fn is_stopped(pid: u32) -> bool {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else {
        return true;
    };
    threads.flatten().all(|thread| {
        let stat = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        // The state comes behind the name, which is in parentheses and may have any character.
        let state = stat
            .rsplit_once(") ")
            .and_then(|(_, rest)| rest.chars().next());
        matches!(state, None | Some('T'))
    })
}
