//! A cluster that has lived for long: transaction ids far from the beginning.

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::Command;

use tokio_postgres::SimpleQueryMessage;

use super::{Postgres, connect};
use crate::error::LabError;

/// So many ids share a file of the commit log, which has so many bytes.
const IDS_PER_SEGMENT: u64 = 1 << 20;
const SEGMENT_BYTES: usize = 256 * 1024;

impl Postgres {
    /// Restarts the cluster as one whose next transaction has this 64-bit id: its upper half is the epoch. What is
    /// there is frozen before. The cluster must run with `autovacuum = off`, since its tables' horizons stay behind.
    ///
    /// # Errors
    ///
    /// Fails when the cluster does not run, or does not start again.
    pub async fn restart_at_xid(&mut self, next: u64) -> Result<(), LabError> {
        let (epoch, xid) = (next >> 32, next & u64::from(u32::MAX));
        for database in self.databases().await? {
            connect(&self.url(&database))
                .await?
                .batch_execute("VACUUM FREEZE")
                .await
                .map_err(LabError::postgres("freeze"))?;
        }
        self.stop_fast().await?;
        let segment = format!("{:04X}", xid / IDS_PER_SEGMENT);
        let segment = self.data_dir().join("pg_xact").join(segment);
        if !segment.exists() {
            let what = format!("make {}", segment.display());
            fs::write(&segment, vec![0; SEGMENT_BYTES]).map_err(LabError::io(what.clone()))?;
            if let Some(account) = self.account {
                std::os::unix::fs::chown(&segment, Some(account.uid), Some(account.gid))
                    .map_err(LabError::io(what))?;
            }
        }
        let mut command = Command::new(self.bin("pg_resetwal"));
        command
            .args(["-e", &epoch.to_string(), "-x", &xid.to_string(), "-D"])
            .arg(self.data_dir())
            .env("LC_ALL", "C")
            .current_dir(self.place.path());
        if let Some(account) = self.account {
            command.uid(account.uid).gid(account.gid);
        }
        let output = command
            .output()
            .map_err(LabError::io("start pg_resetwal"))?;
        if !output.status.success() {
            return Err(LabError::Process {
                what: "pg_resetwal".into(),
                output: String::from_utf8_lossy(&output.stderr).into_owned(),
            });
        }
        self.start_again().await
    }

    async fn databases(&self) -> Result<Vec<String>, LabError> {
        let client = self.connect("postgres").await?;
        let sql = "SELECT datname FROM pg_database WHERE datallowconn";
        let messages = client.simple_query(sql).await;
        let messages = messages.map_err(LabError::postgres(sql))?;
        Ok(messages
            .iter()
            .filter_map(|message| match message {
                SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
                _ => None,
            })
            .collect())
    }
}
