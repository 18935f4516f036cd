//! Which transactions the reader of the WAL has read to their end, for those who ask while they ask.
//!
//! The copier of rows must know who committed lately, and how far the reader is (`copy::rule`). While nobody asks,
//! the loop pays one atomic read a batch and nothing a transaction.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use millrace_event::Lsn;
use tokio::sync::Notify;

use crate::copy::{COMMITS_MAX, Recent};

/// A transaction that was read to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Committed {
    /// Its id's lower 32 bits, as the WAL has it.
    pub xid: u32,
    /// Where its commit record starts.
    pub commit_lsn: Lsn,
    /// The mark that its heartbeat carries, if it has one.
    pub mark: Option<u64>,
}

/// The content of a heartbeat that is a mark: somebody waits for it.
pub(crate) fn mark_content(mark: u64) -> String {
    format!("{mark:016x}")
}

/// The mark that a heartbeat's content is.
pub(crate) fn mark_of(content: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(content).ok()?;
    let digits = text.len() == 16 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    digits.then(|| u64::from_str_radix(text, 16).ok()).flatten()
}

/// What the machine has read since its loop asked last.
#[derive(Debug, Default)]
pub(crate) struct CommitLog {
    recording: bool,
    position: Lsn,
    commits: Vec<Committed>,
}

impl CommitLog {
    /// From now on transactions are noted, or no longer.
    pub(crate) fn record(&mut self, recording: bool) {
        self.recording = recording;
    }

    /// A transaction was read to its end. So was every one whose commit record lies below `end_lsn`.
    pub(crate) fn committed(&mut self, committed: Committed, end_lsn: Lsn) {
        self.read_to(end_lsn);
        if self.recording {
            self.commits.push(committed);
        }
    }

    /// Every transaction whose commit record lies below was read to its end.
    pub(crate) fn read_to(&mut self, position: Lsn) {
        self.position = self.position.max(position);
    }

    /// How far it is, and the transactions since the last time.
    pub(crate) fn take(&mut self) -> (Lsn, Vec<Committed>) {
        (self.position, std::mem::take(&mut self.commits))
    }
}

/// Between the loop, which tells, and those who ask.
#[derive(Debug, Default)]
pub(crate) struct Commits {
    open: AtomicUsize,
    recordings: Mutex<Recordings>,
    told: Notify,
}

#[derive(Debug, Default)]
struct Recordings {
    position: Lsn,
    next_id: u64,
    open: BTreeMap<u64, Recorded>,
}

#[derive(Debug)]
struct Recorded {
    recent: Recent,
    /// The mark that is looked out for, and its commit LSN once it came.
    mark: Option<(u64, Option<Lsn>)>,
}

impl Commits {
    /// Whether anybody asks. The loop looks before it reads a batch: what it reads without recording was in the
    /// WAL before [`Commits::record`] was called.
    pub(crate) fn wanted(&self) -> bool {
        self.open.load(Ordering::SeqCst) > 0
    }

    /// Tells what was read.
    pub(crate) fn tell(&self, position: Lsn, commits: &[Committed]) {
        let mut recordings = self.lock();
        recordings.position = recordings.position.max(position);
        for Recorded { recent, mark } in recordings.open.values_mut() {
            for committed in commits {
                recent.committed(committed.xid, committed.commit_lsn);
                if let Some((expected, seen)) = mark
                    && committed.mark == Some(*expected)
                {
                    *seen = Some(committed.commit_lsn);
                }
            }
            recent.read_to(position);
        }
        drop(recordings);
        self.told.notify_waiters();
    }

    /// Begins to record for one who asks.
    pub(crate) fn record(&self) -> Recording<'_> {
        let mut recordings = self.lock();
        let id = recordings.next_id;
        recordings.next_id += 1;
        let recorded = Recorded {
            recent: Recent::new(recordings.position, COMMITS_MAX),
            mark: None,
        };
        recordings.open.insert(id, recorded);
        self.open.store(recordings.open.len(), Ordering::SeqCst);
        Recording { commits: self, id }
    }

    fn lock(&self) -> MutexGuard<'_, Recordings> {
        // A panic while it was held ends the process anyway; what it left is whole.
        self.recordings
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is recorded for one who asks; ends when it is dropped.
#[derive(Debug)]
pub(crate) struct Recording<'c> {
    commits: &'c Commits,
    id: u64,
}

impl Recording<'_> {
    /// Looks at what was recorded.
    pub(crate) fn with<T>(&self, look: impl FnOnce(&mut Recent) -> T) -> T {
        look(&mut self.recorded(&mut self.commits.lock()).recent)
    }

    /// A mark is about to be written: it is looked out for, and no earlier one any more.
    pub(crate) fn expect(&self, mark: u64) {
        let mut recordings = self.commits.lock();
        self.recorded(&mut recordings).mark = Some((mark, None));
    }

    /// Waits until the reader has seen the mark; returns its commit LSN.
    pub(crate) async fn seen(&self, mark: u64) -> Lsn {
        loop {
            // Armed before it looks, so nothing is told in between.
            let mut told = std::pin::pin!(self.commits.told.notified());
            told.as_mut().enable();
            if let Some(lsn) = self.take_mark(mark) {
                return lsn;
            }
            told.await;
        }
    }

    fn take_mark(&self, mark: u64) -> Option<Lsn> {
        let mut recordings = self.commits.lock();
        let seen = self.recorded(&mut recordings).mark;
        seen.filter(|(seen, _)| *seen == mark)?.1
    }

    fn recorded<'r>(&self, recordings: &'r mut Recordings) -> &'r mut Recorded {
        recordings
            .open
            .get_mut(&self.id)
            .expect("recorded until it is dropped")
    }
}

impl Drop for Recording<'_> {
    fn drop(&mut self) {
        let mut recordings = self.commits.lock();
        recordings.open.remove(&self.id);
        self.commits
            .open
            .store(recordings.open.len(), Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn committed(xid: u32, commit_lsn: u64, mark: Option<u64>) -> Committed {
        Committed {
            xid,
            commit_lsn: Lsn(commit_lsn),
            mark,
        }
    }

    #[test]
    fn a_mark_is_read_back_and_other_contents_are_none() {
        for mark in [0, 1, u64::MAX] {
            assert_eq!(mark_of(mark_content(mark).as_bytes()), Some(mark));
        }
        for content in [
            &b""[..],
            b"1",
            b"+000000000000001",
            b"\xff",
            b"00000000000000000",
        ] {
            assert_eq!(mark_of(content), None, "{content:?}");
        }
    }

    #[test]
    fn transactions_are_noted_only_while_they_are_asked_for() {
        let mut log = CommitLog::default();
        log.committed(committed(1, 10, None), Lsn(20));
        log.record(true);
        log.committed(committed(2, 30, None), Lsn(40));
        log.read_to(Lsn(50));
        // A keepalive may be behind.
        log.read_to(Lsn(45));
        assert_eq!(log.take(), (Lsn(50), vec![committed(2, 30, None)]));
        log.record(false);
        log.committed(committed(3, 60, None), Lsn(70));
        assert_eq!(log.take(), (Lsn(70), Vec::new()));
    }

    #[tokio::test]
    async fn a_mark_is_waited_for_until_the_reader_sees_it() {
        let commits = Commits::default();
        assert!(!commits.wanted());
        let recording = commits.record();
        assert!(commits.wanted());
        recording.expect(7);
        let tell = async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            commits.tell(Lsn(20), &[committed(1, 10, Some(8))]);
            tokio::time::sleep(Duration::from_millis(20)).await;
            commits.tell(Lsn(40), &[committed(2, 30, Some(7))]);
        };
        let (seen, ()) = tokio::join!(recording.seen(7), tell);
        assert_eq!(seen, Lsn(30));
        assert_eq!(recording.with(|recent| recent.position()), Lsn(40));
        drop(recording);
        assert!(!commits.wanted());
    }
}
