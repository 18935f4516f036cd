//! What a sink does beside its stream: its copies, and tables that catch up. Both bring batches of their own, which
//! are applied in between, while the target has no transaction open.

use millrace_consumer::ReadError;
use millrace_event::Position;
use tokio::time::Instant;

use crate::batch::{Batch, Checkpoint};
use crate::copy::{Copies, Looked};
use crate::error::Error;
use crate::life::Life;
use crate::progress::CopyState;
use crate::rejoin::{self, CatchUp};

#[derive(Default)]
pub(crate) struct Beside {
    copies: Copies,
    behind: Option<CatchUp>,
    began: Option<Instant>,
}

impl Beside {
    /// Waits until there may be something to do: where the target `is_idle` a batch, else only to collect. Safe to cancel.
    pub(crate) async fn ready(&mut self, position: Position, is_idle: bool) {
        if !is_idle {
            return self.copies.ready(position).await;
        }
        let now = Instant::now();
        let due = self.copies.due().unwrap_or(now);
        let behind = async {
            match &mut self.behind {
                // Its reader is asked now and again.
                Some(_) => tokio::time::sleep(BEHIND_INTERVAL).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = self.copies.ready(position) => {}
            () = behind => {}
            () = tokio::time::sleep_until(due) => {}
        }
    }

    /// The next batch, if there is one. Nothing may be in flight and no transaction open; the sink stands at
    /// `checkpoint`, and the worker has collected up to `collected`.
    ///
    /// # Errors
    /// A server failed, or the copy stream lacks something.
    pub(crate) async fn next_batch(
        &mut self,
        life: &mut Life<'_>,
        checkpoint: Checkpoint,
        collected: Position,
    ) -> Result<Option<Batch>, Error> {
        if self.is_due() && self.copies.is_at_rest() {
            let looked = self.copies.look(life, collected).await?;
            if let Looked::Changed(progress) = looked {
                return Ok(Some(rejoin::batch(life, progress, Vec::new())));
            }
        }
        if let Some(batch) = self.copies.next_batch(life, checkpoint).await? {
            return Ok(Some(batch));
        }
        self.catch_up(life, collected).await
    }

    fn is_due(&self) -> bool {
        self.copies.due().is_none_or(|due| due <= Instant::now())
    }

    /// Whether something may be collected while a batch of ours is in flight. Not where a look is due, which comes
    /// before what is collected.
    pub(crate) fn has_room(&self) -> bool {
        self.copies.has_room() && !self.is_due()
    }

    /// Whether something is collected that was not handed out.
    pub(crate) fn has_collected(&self) -> bool {
        !self.copies.is_at_rest()
    }

    /// Collects what has come while a batch of ours is in flight.
    ///
    /// # Errors
    /// As [`Beside::next_batch`].
    pub(crate) async fn collect(
        &mut self,
        life: &mut Life<'_>,
        checkpoint: Checkpoint,
    ) -> Result<(), Error> {
        self.copies.collect(life, checkpoint).await.map(|_| ())
    }

    /// The batch that was handed out is applied.
    pub(crate) fn applied(&mut self) {
        self.copies.applied();
    }

    /// Tells capture what of the copy stream is applied, if it is much.
    ///
    /// # Errors
    /// The broker is away.
    pub(crate) async fn tell(&mut self, life: &Life<'_>) -> Result<(), Error> {
        self.copies.tell(life).await
    }

    async fn catch_up(
        &mut self,
        life: &mut Life<'_>,
        collected: Position,
    ) -> Result<Option<Batch>, Error> {
        if self.behind.is_none() {
            let at = life.checkpoint.position;
            let loaded = life
                .progress
                .those(|state| matches!(state, CopyState::Loaded { .. }));
            let missed = life.progress.those(
                |state| matches!(state, CopyState::Loaded { claim, .. } if claim.position < at),
            );
            // Near ones rejoin while nothing else goes on; where nothing was missed, the sink itself is not far enough yet.
            if missed.is_empty() || rejoin::is_near(life) {
                return Ok(None);
            }
            self.behind = CatchUp::begin(life, &loaded);
            self.began = Some(Instant::now());
        }
        let Some(behind) = &mut self.behind else {
            return Ok(None);
        };
        for _ in 0..MESSAGES_MAX {
            if behind.reached.position >= life.checkpoint.position {
                let part = behind.flush();
                let batch = part.map(|part| behind.batch(life, part));
                self.behind = None;
                return Ok(batch);
            }
            let delivery = match behind.reader.try_next() {
                Ok(Some(delivery)) => delivery,
                Ok(None) => {
                    // It connects when it is waited for.
                    let next = tokio::time::timeout(BEHIND_INTERVAL, behind.reader.next()).await;
                    match next {
                        Ok(Ok(delivery)) => delivery,
                        Ok(Err(gap)) => return self.gap(life, &gap, collected).await,
                        Err(_) => return Ok(None),
                    }
                }
                Err(gap) => return self.gap(life, &gap, collected).await,
            };
            if let Some(part) = behind.take(life, &delivery).await? {
                return Ok(Some(behind.batch(life, part)));
            }
        }
        Ok(None)
    }

    async fn gap(
        &mut self,
        life: &mut Life<'_>,
        gap: &ReadError,
        collected: Position,
    ) -> Result<Option<Batch>, Error> {
        tracing::debug!(%gap, "catching up");
        self.behind = None;
        let loaded = life
            .progress
            .those(|state| matches!(state, CopyState::Loaded { .. }));
        let progress = rejoin::given_up(life, &loaded, collected);
        Ok(Some(rejoin::batch(life, progress, Vec::new())))
    }
}

/// So many messages are looked through at once for those of tables that catch up: the stream waits meanwhile.
const MESSAGES_MAX: usize = 5_000;

/// How long the main loop waits for messages of a table that catches up.
const BEHIND_INTERVAL: std::time::Duration = std::time::Duration::from_millis(5);
