//! How far the answer to a sink's request is.

use millrace_consumer::{Delivery, ReadError, Reader};
use millrace_event::TableName;
use millrace_event::work::{CopyStatus, Wanted};

use super::quiet::Brought;
use crate::asking;
use crate::copying::Copying;
use crate::progress::CopyProgress;

/// The answer to one request.
pub(super) struct Answer {
    pub(super) machine: Copying,
    /// `None` until capture has taken the request up: then its stream exists.
    pub(super) reader: Option<Reader>,
    pub(super) status: Option<CopyStatus>,
    /// Read, and not taken yet: its rows wait for the stream.
    pub(super) next: Option<Delivery>,
    /// Whether the copy stream does not hold what comes next.
    pub(super) lost: bool,
    /// The sequence of the last message that was taken.
    pub(super) taken_seq: u64,
    /// The same of what was handed out, of what is committed in the target, and of what capture was told.
    pub(super) handed_seq: u64,
    pub(super) applied_seq: u64,
    pub(super) told_seq: u64,
}

impl Answer {
    /// The tables of which rows of single keys are still awaited.
    pub(super) fn awaited_keys(&self) -> Vec<TableName> {
        let status = self.status.as_ref();
        let copied = status.map_or(&[][..], |status| &status.copied);
        let is_read = status.is_some_and(|status| self.applied_seq >= status.last_seq);
        asking::awaited_keys(&self.machine.request().tables, copied, is_read)
    }

    /// What has come for it so far, for tables that stand as `progress` says; `None` before capture has taken it up.
    pub(super) fn brought(&self, progress: &CopyProgress) -> Option<Brought> {
        let status = self.status.as_ref()?;
        let tables = &self.machine.request().tables;
        let mut asked = tables.iter();
        // Chunks go on for hours, and say nothing about keys.
        let chunks = asked.any(|asked| matches!(asked.rows, Wanted::Chunks { .. }));
        Some(Brought {
            tables: status.copied.len(),
            applied_seq: if chunks { 0 } else { self.applied_seq },
            load: asking::load_under_way(tables, progress, status),
        })
    }

    pub(super) fn lose(&mut self, gap: &ReadError) {
        tracing::warn!(%gap, "copied rows are missing");
        self.lost = true;
    }
}
