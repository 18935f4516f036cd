//! What others tell a sink in the bucket of copies, read beside the sink's loop: the broker may be far.

use std::time::Duration;

use async_nats::jetstream::kv;
use millrace_event::work::{BackfillOrder, CopyStatus, orders_key};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// How often it is read.
const READ_INTERVAL: Duration = Duration::from_millis(300);

/// What was read last.
#[derive(Clone, Debug, Default)]
pub(super) struct Told {
    /// What operators and capture have ordered.
    pub(super) orders: Vec<BackfillOrder>,
    /// What capture says about the request that it answers.
    pub(super) status: Option<CopyStatus>,
}

/// Reads it for as long as it lives.
#[derive(Debug)]
pub(super) struct Telling {
    task: JoinHandle<()>,
    told: watch::Receiver<Option<Told>>,
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
        let task = tokio::spawn(async move {
            let mut ticks = tokio::time::interval(READ_INTERVAL);
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            while !sender.is_closed() {
                ticks.tick().await;
                match read(&copies, &keys.0, &keys.1).await {
                    Ok(told) => {
                        sender.send_replace(Some(told));
                    }
                    // The stream's own reader notices a broker that is away, and tells of it.
                    Err(error) => tracing::debug!(%error, "the bucket of copies cannot be read"),
                }
            }
        });
        Self { task, told }
    }

    /// What was read last; `None` before anything was.
    pub(super) fn latest(&self) -> Option<Told> {
        self.told.borrow().clone()
    }
}

async fn read(copies: &kv::Store, orders: &str, status: &str) -> Result<Told, kv::EntryError> {
    let (orders, status) = tokio::try_join!(copies.get(orders), copies.get(status))?;
    // What cannot be understood is no order, and no answer.
    let orders = orders.and_then(|value| serde_json::from_slice(&value).ok());
    Ok(Told {
        orders: orders.unwrap_or_default(),
        status: status.and_then(|value| serde_json::from_slice(&value).ok()),
    })
}
