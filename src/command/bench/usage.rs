//! Processor time and memory of processes, as Linux' /proc tells them; nothing elsewhere.

use std::fs;
use std::time::Duration;

use serde::Serialize;
use tokio::task::JoinHandle;

/// The kernel tells processor time in hundredths of a second to every program, whatever its own clock.
const TICKS_PER_SECOND: f64 = 100.0;

/// How often a process is looked at: what it does after the last look before its end goes unseen.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

const KIB_PER_MIB: f64 = 1024.0;

/// What a process has used until its end.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Usage {
    /// User and system time of all its threads.
    pub(super) cpu_seconds: f64,
    /// The most memory it ever had resident.
    pub(super) peak_rss_mib: f64,
}

/// Processor time of the servers, in seconds.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct ServersCpu {
    pub(super) source: Option<f64>,
    pub(super) target: Option<f64>,
    pub(super) nats: Option<f64>,
}

impl ServersCpu {
    /// What was used since `earlier`.
    pub(super) fn since(self, earlier: Self) -> Self {
        let minus = |now: Option<f64>, then: Option<f64>| Some(now? - then?);
        Self {
            source: minus(self.source, earlier.source),
            target: minus(self.target, earlier.target),
            nats: minus(self.nats, earlier.nats),
        }
    }
}

/// Looks at a process until it has ended; `None` where there is no /proc.
pub(super) fn watch(pid: u32) -> JoinHandle<Option<Usage>> {
    tokio::spawn(async move {
        let mut usage = None;
        while let Some(seen) = look(pid) {
            usage = Some(seen);
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
        usage
    })
}

/// Processor seconds of a process, of its ended children and of those that live.
pub(super) fn tree_cpu(pid: u32) -> Option<f64> {
    let mut ticks: u64 = times(pid)?.iter().sum();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    for child in children.unwrap_or_default().split_whitespace() {
        if let Some([user, system, ..]) = child.parse().ok().and_then(times) {
            ticks += user + system;
        }
    }
    Some(ticks as f64 / TICKS_PER_SECOND)
}

fn look(pid: u32) -> Option<Usage> {
    let [user, system, ..] = times(pid)?;
    // A process that has ended and was not waited for has no memory any more.
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    Some(Usage {
        cpu_seconds: (user + system) as f64 / TICKS_PER_SECOND,
        peak_rss_mib: peak_kib(&status)? as f64 / KIB_PER_MIB,
    })
}

/// User and system time of the process, then of its children that have ended and were waited for.
fn times(pid: u32) -> Option<[u64; 4]> {
    parse_times(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// Fields 14 to 17 of `stat`. The command (field 2) may hold blanks and brackets.
fn parse_times(stat: &str) -> Option<[u64; 4]> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    let mut next = || fields.next()?.parse().ok();
    Some([next()?, next()?, next()?, next()?])
}

fn peak_kib(status: &str) -> Option<u64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_of_proc_are_read_as_the_kernel_writes_them() {
        let stat = "42 (a) b) S 1 42 42 0 -1 4194304 100 0 0 0 31 7 12 3 20 0 9 0 1234 5 6";
        assert_eq!(parse_times(stat), Some([31, 7, 12, 3]));
        assert_eq!(peak_kib("Name:\tx\nVmHWM:\t   20480 kB\n"), Some(20480));
        assert_eq!((parse_times("gone"), peak_kib("Name:\tx\n")), (None, None));
    }

    #[tokio::test]
    async fn a_process_is_watched_to_its_end() {
        let mut child = tokio::process::Command::new("sleep")
            .arg("0.2")
            .spawn()
            .expect("sleep is everywhere");
        let watched = watch(child.id().expect("it has not been waited for"));
        child.wait().await.expect("it can be waited for");
        if fs::exists("/proc/self/stat").unwrap_or(false) {
            let usage = watched.await.expect("it does not panic").expect("seen");
            assert!(usage.peak_rss_mib > 0.1, "{usage:?}");
            assert!(tree_cpu(std::process::id()).is_some());
        }
    }
}
