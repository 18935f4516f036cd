//! What others tell a sink in the bucket of copies, read beside the sink's loop: the broker may be far. What is there
//! and is not understood is never taken for none.

use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::kv;
use millrace_config::understood;
use millrace_event::work::{BackfillOrder, CopyStatus, orders_key};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

use super::unread::Unread;

/// How often it is read.
const READ_INTERVAL: Duration = Duration::from_millis(300);

/// The same just after something was asked for; each time it takes twice as long, up to the usual.
const HURRIED_INTERVAL: Duration = Duration::from_millis(10);

/// What was read last.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Told {
    /// What operators and capture have ordered.
    pub(super) orders: Word<Vec<BackfillOrder>>,
    /// What capture says about the request that it answers.
    pub(super) status: Word<Option<CopyStatus>>,
}

/// One of the things that a sink is told.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Word<T> {
    /// It says this; where there is none, the default.
    Said(T),
    /// It is there, and nobody knows what it says: what was done last stays so, and it is left as it is.
    Unread,
}

impl<T: Default> Default for Word<T> {
    fn default() -> Self {
        Self::Said(T::default())
    }
}

/// Reads it for as long as it lives.
#[derive(Debug)]
pub(super) struct Telling {
    task: JoinHandle<()>,
    told: watch::Receiver<Option<Told>>,
    hurried: Arc<Notify>,
}

impl Drop for Telling {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Telling {
    pub(super) fn begin(copies: kv::Store, sink: &str) -> Self {
        let (sender, told) = watch::channel(None);
        let keys = (orders_key(sink), format!("status.{sink}"));
        let unread = (Unread::default(), Unread::default());
        let hurried = Arc::new(Notify::new());
        let hurries = Arc::clone(&hurried);
        let task = tokio::spawn(async move {
            let mut interval = READ_INTERVAL;
            while !sender.is_closed() {
                let told = async {
                    let orders = word(&copies, &keys.0, &unread.0);
                    let status = word(&copies, &keys.1, &unread.1);
                    let (orders, status) = tokio::try_join!(orders, status)?;
                    Ok::<_, kv::EntryError>(Told { orders, status })
                };
                match told.await {
                    Ok(now) => {
                        sender.send_if_modified(|told| {
                            let news = told.as_ref() != Some(&now);
                            *told = Some(now);
                            news
                        });
                    }
                    // The stream's own reader notices a broker that is away, and tells of it.
                    Err(error) => tracing::debug!(%error, "the bucket of copies cannot be read"),
                }
                tokio::select! {
                    () = tokio::time::sleep(interval) => interval = (interval * 2).min(READ_INTERVAL),
                    () = hurries.notified() => interval = HURRIED_INTERVAL,
                }
            }
        });
        Self {
            task,
            told,
            hurried,
        }
    }

    /// Reads at once, and for a while more often: an answer is awaited.
    pub(super) fn hurry(&self) {
        self.hurried.notify_one();
    }

    /// Whether something was read that [`Telling::latest`] has not given yet.
    pub(super) fn has_news(&self) -> bool {
        self.told.has_changed().unwrap_or(false)
    }

    /// Waits for that. Safe to cancel.
    pub(super) async fn news(&mut self) {
        if self.told.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
        self.told.mark_changed();
    }

    /// What was read last; `None` before anything was.
    pub(super) fn latest(&mut self) -> Option<Told> {
        self.told.borrow_and_update().clone()
    }
}

/// Reads the value of a key, and warns once of one that is not understood.
async fn word<T: serde::de::DeserializeOwned + Default>(
    copies: &kv::Store,
    key: &str,
    unread: &Unread,
) -> Result<Word<T>, kv::EntryError> {
    let entry = copies.entry(key).await?;
    let Some(entry) = entry.filter(|entry| entry.operation == kv::Operation::Put) else {
        return Ok(Word::default());
    };
    Ok(match understood(&copies.name, key, &entry.value) {
        Ok(value) => Word::Said(value),
        Err(condition) => {
            unread.warn(entry.revision, &condition);
            Word::Unread
        }
    })
}
