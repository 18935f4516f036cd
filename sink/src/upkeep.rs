//! What a sink does for its target from time to time, between batches: it forgets old deletes, drops old dead letters,
//! and asks whether parked tables are taken again.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use millrace_event::{TableName, Version};

use crate::error::Error;
use crate::life::Life;
use crate::progress::CopyState;
use crate::rejoin;
use crate::sink::Sink;

/// How often the target is asked whether it takes a parked table again.
const PROBE_INTERVAL: Duration = Duration::from_secs(5);

/// How often deletes are forgotten that no older row can follow.
const CLEAN_UP_INTERVAL: Duration = Duration::from_secs(60);

/// A delete is remembered for so long after it was applied, by the target's clock: for those who look into a fault, and
/// so that the next copy of its table, whose rows are a little older than the stream, need not be read again.
const DELETES_KEPT: Duration = Duration::from_secs(600);

/// So many deletes are forgotten at once, while changes wait. More go right after the next batch.
const DELETES_MAX: u32 = 50_000;

/// How often resolved dead letters are looked through: nothing but a search of all letters finds the old ones.
const LETTERS_INTERVAL: Duration = Duration::from_secs(3600);

/// A dead letter is kept for so long after it was resolved, for those who look into a fault.
const LETTERS_KEPT: Duration = Duration::from_secs(7 * 24 * 3600);

/// So many letters are dropped at once, while changes wait. More go with the next clean-up.
const LETTERS_MAX: u32 = 10_000;

/// When what was done last, over all lives of a process.
pub(crate) struct Upkeep {
    /// Up to where deletes of each target table may be forgotten, and since when: what stands still is not searched again
    /// once all of its deletes are old.
    forgettable: BTreeMap<TableName, (Version, Instant)>,
    /// `None` before the first, with which a process begins: it may not live for long.
    cleaned_at: Option<Instant>,
    probed_at: Instant,
    /// `None` before all old letters were dropped once.
    letters_at: Option<Instant>,
}

impl Upkeep {
    pub(crate) fn begin(now: Instant) -> Self {
        Self {
            forgettable: BTreeMap::new(),
            cleaned_at: None,
            probed_at: now,
            letters_at: None,
        }
    }

    /// Whether there is something to do. It is done between two batches, also while changes come without a pause.
    pub(crate) fn is_due(&self, life: &Life<'_>, now: Instant) -> bool {
        self.cleans(now) || self.probes(life, now)
    }

    fn cleans(&self, now: Instant) -> bool {
        self.cleaned_at
            .is_none_or(|at| now - at >= CLEAN_UP_INTERVAL)
    }

    fn probes(&self, life: &Life<'_>, now: Instant) -> bool {
        now - self.probed_at >= PROBE_INTERVAL && !life.progress.parked().is_empty()
    }

    /// Does what is due. Nothing may be in flight and no transaction open. Returns whether there is something to do
    /// about a parked table.
    ///
    /// # Errors
    /// A server is away.
    pub(crate) async fn perform(
        &mut self,
        life: &mut Life<'_>,
        now: Instant,
    ) -> Result<bool, Error> {
        if self.cleans(now) && self.forget_deletes(life, now).await? {
            self.cleaned_at = Some(now);
            self.drop_letters(life, now).await?;
        }
        if self.probes(life, now) {
            self.probed_at = now;
            return rejoin::is_wanted(life).await;
        }
        Ok(false)
    }

    /// Forgets old deletes, of each table as far as nothing older is to come of it. Returns whether those were all.
    async fn forget_deletes(&mut self, life: &mut Life<'_>, now: Instant) -> Result<bool, Error> {
        let passed = life.passed();
        let mut up_to: BTreeMap<TableName, Version> = BTreeMap::new();
        let is_ours = |table: &TableName| {
            life.progress
                .tables
                .get(table)
                .is_some_and(CopyState::is_begun)
        };
        for (table, settings) in life.tables.iter().filter(|(table, _)| is_ours(table)) {
            let forgettable = life.progress.forgettable(table, passed);
            let least = up_to.entry(settings.target.clone()).or_insert(forgettable);
            *least = forgettable.min(*least);
        }
        up_to.retain(|target, up_to| self.searches(target, *up_to, now));
        if up_to.is_empty() {
            return Ok(true);
        }
        let forgotten = life.sink().clean_up(&up_to, DELETES_KEPT, DELETES_MAX);
        let forgotten = forgotten.await?;
        tracing::debug!(sink = %life.settings.name, forgotten, "old deletes forgotten");
        Ok(forgotten < u64::from(DELETES_MAX))
    }

    /// Whether a table has old deletes up to this version that were not seen yet.
    fn searches(&mut self, target: &TableName, up_to: Version, now: Instant) -> bool {
        let known = self.forgettable.entry(target.clone());
        let (version, since) = known.or_insert((up_to, now));
        if *version != up_to {
            (*version, *since) = (up_to, now);
        }
        // With the interval twice: once for the look that comes just too early, once for the clocks.
        now - *since <= DELETES_KEPT + 2 * CLEAN_UP_INTERVAL
    }

    async fn drop_letters(&mut self, life: &mut Life<'_>, now: Instant) -> Result<(), Error> {
        if self
            .letters_at
            .is_some_and(|at| now - at < LETTERS_INTERVAL)
        {
            return Ok(());
        }
        let dropped = life.sink().drop_letters(LETTERS_KEPT, LETTERS_MAX).await?;
        tracing::debug!(sink = %life.settings.name, dropped, "old dead letters dropped");
        if dropped < u64::from(LETTERS_MAX) {
            self.letters_at = Some(now);
        }
        Ok(())
    }
}
