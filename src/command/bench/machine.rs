//! Where the numbers were measured: a number without its machine says nothing.

use std::fmt;
use std::fs;

use millrace_lab::LabError;
use serde::Serialize;

use super::stage::Stage;

const KIB_PER_GIB: f64 = 1024.0 * 1024.0;

/// The machine and the servers' releases.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Machine {
    pub(super) cores: usize,
    /// Absent where there is no /proc.
    pub(super) memory_gib: Option<f64>,
    pub(super) cpu: Option<String>,
    pub(super) postgres: String,
    pub(super) nats: String,
    /// `release`, or `debug`, whose numbers mean nothing.
    pub(super) build: &'static str,
}

impl Machine {
    pub(super) async fn read(stage: &Stage) -> Result<Self, LabError> {
        let row = stage.client.query_one("SHOW server_version", &[]).await;
        let row = row.map_err(LabError::postgres("read its version"))?;
        let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        Ok(Self {
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_gib: total_kib(&memory).map(|kib| kib as f64 / KIB_PER_GIB),
            cpu: model(&cpu),
            postgres: row.get(0),
            nats: stage.nats.client().await?.server_info().version,
            build: if cfg!(debug_assertions) {
                "debug"
            } else {
                "release"
            },
        })
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} cores", self.cores)?;
        if let Some(cpu) = &self.cpu {
            write!(f, " of {cpu}")?;
        }
        if let Some(memory) = self.memory_gib {
            write!(f, ", {memory:.0} GiB")?;
        }
        let Self {
            postgres,
            nats,
            build,
            ..
        } = self;
        write!(
            f,
            "; Postgres {postgres}, nats-server {nats}; {build} build"
        )
    }
}

fn total_kib(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.split_whitespace().next()?.parse().ok()
}

fn model(cpuinfo: &str) -> Option<String> {
    let line = cpuinfo
        .lines()
        .find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_of_proc_are_read_as_the_kernel_writes_them() {
        let meminfo = "MemTotal:       24683044 kB\nMemFree:        1 kB\n";
        assert_eq!(total_kib(meminfo), Some(24_683_044));
        let cpuinfo = "processor\t: 0\nmodel\t\t: 1\nmodel name\t: AMD EPYC\n";
        assert_eq!(model(cpuinfo).as_deref(), Some("AMD EPYC"));
        assert_eq!((total_kib(""), model("")), (None, None));
    }
}
