//! Tables that are not where their sink is: what the target refuses waits in the stream, and what was loaded
//! catches up with what was changed meanwhile.
//!
//! Such a table keeps a claim on the stream: how far it is by itself. The worker leaves its changes out and goes on
//! with the others. Its changes from there on are applied beside the stream ([`crate::beside`]), and the last few of
//! them here, while nothing else goes on: in their last transaction it rejoins.
//!
//! The stream does not wait for such a table. Once it has let go of what the table needs, the claim lapses: its rows
//! come again, in chunks, when the target takes it.

use std::collections::BTreeMap;

use millrace_config::{Code, Condition};
use millrace_connect::clock::now_us;
use millrace_consumer::{Body, Delivery, ReadError, Reader, ReaderOptions, Start, Token};
use millrace_event::{Lsn, Op, Position, TableName};
use tokio_util::sync::CancellationToken;

use crate::asking;
use crate::batch::{Batch, Step};
use crate::catching::{Catching, Part};
use crate::error::Error;
use crate::life::Life;
use crate::progress::{Claim, CopyProgress, CopyState};

/// A table that is so many messages behind its sink, or fewer, rejoins while the sink waits.
const NEAR_MESSAGES: u64 = 5_000;

/// Parks a table at the sink's checkpoint: everything below it has been applied.
pub(crate) async fn park(
    life: &mut Life<'_>,
    table: &TableName,
    condition: &Condition,
) -> Result<(), Error> {
    let rekeyed = condition.code == Code::KeyChanged;
    // What the stream holds of the old key cannot be applied any more, and what the target lost it does not hold.
    let again = rekeyed || has_lost(condition);
    let state = match life.progress.tables.get(table) {
        Some(state) if again && state.holds_rows() => CopyState::Lapsed { refused_at_us: 0 },
        Some(CopyState::Copied { lsn }) => CopyState::Parked {
            lsn: *lsn,
            claim: life.checkpoint.into(),
        },
        Some(CopyState::Loaded { lsn, claim }) => CopyState::Parked {
            lsn: *lsn,
            claim: *claim,
        },
        // Its rows are what the target refuses: they will come again.
        Some(CopyState::Loading { .. } | CopyState::Chunks(_)) => CopyState::Lapsed {
            refused_at_us: now_us(),
        },
        Some(CopyState::Parked { .. } | CopyState::Lapsed { .. } | CopyState::Refused { .. }) => {
            return Ok(());
        }
        Some(CopyState::Pending { .. }) => CopyState::Refused {
            refused_at_us: now_us(),
        },
        None => return Err(Error::Halt(condition.clone())),
    };
    if rekeyed && let Some(settings) = life.tables.get(table).copied() {
        life.sink().forget_keys(&settings.target).await?;
    }
    tracing::error!(
        sink = %life.settings.name, %table, code = condition.code.as_str(), remedy = %condition.remedy,
        "table parked: {}; the others go on", condition.message
    );
    let mut progress = life.progress.clone();
    progress.tables.insert(table.clone(), state);
    store(life, progress, Vec::new()).await?;
    life.status.set_parked(table, condition.clone());
    Ok(())
}

/// Unparks every table that the target takes again, and has those rejoin that are near.
pub(crate) async fn rejoin(life: &mut Life<'_>, stop: &CancellationToken) -> Result<(), Error> {
    for table in life.progress.parked() {
        let mut laid_out = life.layout(&table, None).await;
        if let Err(Error::Table { condition, .. }) = &laid_out
            && has_lost(condition)
        {
            park(life, &table, condition).await?;
            laid_out = life.layout(&table, None).await;
        }
        match laid_out {
            Ok(_) => take_back(life, &table).await?,
            Err(Error::Table { condition, .. }) => {
                if has_lapsed(life, &table).await? {
                    let lapsed = CopyState::Lapsed { refused_at_us: 0 };
                    lapse(life, &table, lapsed).await?;
                }
                refused(life, &table, condition);
            }
            Err(error) => return Err(error),
        }
    }
    let near = near(life);
    if near.is_empty() {
        return Ok(());
    }
    match Box::pin(catch_up(life, &near, stop)).await {
        // The target has the columns and yet refuses the rows.
        Err(Error::Table { table, condition }) => park(life, &table, &condition).await,
        caught_up => caught_up,
    }
}

/// Whether the target has lost what this sink had put there.
fn has_lost(condition: &Condition) -> bool {
    condition.code == Code::TargetLost
}

/// Says why a table stays parked.
fn refused(life: &Life<'_>, table: &TableName, condition: Condition) {
    tracing::warn!(
        sink = %life.settings.name, %table, code = condition.code.as_str(),
        remedy = %condition.remedy, "table still parked: {}", condition.message
    );
    life.status.set_parked(table, condition);
}

/// Whether there is something to do about one of the parked tables: the target takes it again, or its claim has
/// lapsed.
pub(crate) async fn is_wanted(life: &mut Life<'_>) -> Result<bool, Error> {
    for table in life.progress.parked() {
        let state = life.progress.tables.get(&table);
        let rests = state.is_some_and(|state| {
            let claims = state.claim().is_some();
            !claims && !state.may_copy_again(now_us())
        });
        if rests {
            continue;
        }
        if has_lapsed(life, &table).await? {
            return Ok(true);
        }
        match life.layout(&table, None).await {
            Ok(_) => return Ok(true),
            Err(Error::Table { condition, .. }) if has_lost(&condition) => return Ok(true),
            Err(Error::Table { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}

/// Whether the stream no longer holds what a table needs next.
async fn has_lapsed(life: &Life<'_>, table: &TableName) -> Result<bool, Error> {
    match life.progress.tables.get(table).and_then(CopyState::claim) {
        Some(claim) => Ok(life.stream_start().await? > claim.stream_seq + 1),
        None => Ok(false),
    }
}

/// Gives up what a table claims of the stream.
async fn lapse(life: &mut Life<'_>, table: &TableName, state: CopyState) -> Result<(), Error> {
    tracing::warn!(
        sink = %life.settings.name, %table, code = Code::ParkedTooLong.as_str(),
        "the stream no longer holds what the parked table needs; it is copied again once the target takes it"
    );
    let mut progress = life.progress.clone();
    progress.tables.insert(table.clone(), state);
    store(life, progress, Vec::new()).await
}

/// Unparks a table that the target takes again.
async fn take_back(life: &mut Life<'_>, table: &TableName) -> Result<(), Error> {
    let mut progress = life.progress.clone();
    match progress.tables.get(table) {
        Some(CopyState::Parked { lsn, claim }) => {
            let (lsn, claim) = (*lsn, *claim);
            let loaded = CopyState::Loaded { lsn, claim };
            progress.tables.insert(table.clone(), loaded);
        }
        Some(state @ CopyState::Refused { .. }) if state.may_copy_again(now_us()) => {
            let claim = life.checkpoint.into();
            let pending = CopyState::Pending {
                claim,
                began_us: now_us(),
            };
            progress.tables.insert(table.clone(), pending);
        }
        Some(state @ CopyState::Lapsed { .. }) if state.may_copy_again(now_us()) => {
            tracing::info!(sink = %life.settings.name, %table, "table is copied again");
            let position = life.checkpoint.position;
            let tables = std::slice::from_ref(table);
            asking::begin_chunks(&mut progress, tables, position, now_us());
        }
        _ => return Ok(()),
    }
    life.status.set_begun();
    store(life, progress, Vec::new()).await
}

/// Whether a table can rejoin now.
pub(crate) fn is_near(life: &Life<'_>) -> bool {
    !near(life).is_empty()
}

/// The loaded tables that are near their sink, which has passed the point that their loads show.
fn near(life: &Life<'_>) -> Vec<TableName> {
    let at = life.checkpoint;
    life.progress.those(|state| match state {
        CopyState::Loaded { lsn, claim } => {
            at.position.commit_lsn() >= *lsn && claim.stream_seq + NEAR_MESSAGES >= at.stream_seq
        }
        _ => false,
    })
}

/// Reads what loaded tables have missed.
pub(crate) struct CatchUp {
    pub(crate) reader: Reader,
    catching: Catching,
    /// With the consistent points of their loads, and how far they were at the start.
    tables: BTreeMap<TableName, (Lsn, Claim)>,
    /// Up to where everything was read.
    pub(crate) reached: Token,
}

impl CatchUp {
    /// Begins where the table stands that is furthest behind.
    pub(crate) fn begin(life: &Life<'_>, tables: &[TableName]) -> Option<Self> {
        let loaded = tables.iter().filter_map(|table| {
            let CopyState::Loaded { lsn, claim } = life.progress.tables.get(table)? else {
                return None;
            };
            Some((table.clone(), (*lsn, *claim)))
        });
        let tables: BTreeMap<_, _> = loaded.collect();
        let first = tables.values().map(|(_, claim)| *claim);
        let first = first.min_by_key(|claim| claim.position)?;
        let from = Token {
            stream_seq: first.stream_seq,
            position: first.position,
        };
        tracing::info!(
            sink = %life.settings.name, tables = tables.len(), position = %from.position, "catching up"
        );
        let start = Start::After(from);
        let options = ReaderOptions::new(life.jetstream.clone(), life.source, start);
        Some(Self {
            reader: Reader::open(options),
            catching: Catching::new(life.limits, from),
            tables,
            reached: from,
        })
    }

    /// Takes a message, as far as it lies below the sink's own position. Nothing may be in flight.
    pub(crate) async fn take(
        &mut self,
        life: &mut Life<'_>,
        delivery: &Delivery,
    ) -> Result<Option<Part>, Error> {
        let end = life.checkpoint.position;
        if let Body::Changes(payload) = &delivery.body {
            for event in delivery.changes() {
                let event =
                    event.map_err(|error| Error::retry("a change cannot be understood", error))?;
                let table = event.source.table_name();
                let Some((lsn, claim)) = self.tables.get(&table) else {
                    continue;
                };
                let version = event.source.version;
                let (deletes, truncates) = life.rule(&table);
                let wanted = match event.op {
                    Op::Delete => deletes,
                    Op::Truncate => truncates,
                    _ => true,
                };
                // The last message may reach beyond the sink's own position: what does comes with the others.
                let position = Position::from(version);
                let missed = position > claim.position && position <= end;
                if wanted && missed && version.commit_lsn >= *lsn {
                    let shape = event.source.table_version.as_ref();
                    let layout = life.layout_of(&table, shape).await?;
                    self.catching
                        .push(&layout, &event, payload)
                        .map_err(|error| Error::retry("a change has no key", error))?;
                }
            }
        }
        self.reached = Token {
            stream_seq: delivery.stream_seq,
            position: delivery.position,
        };
        // What reaches beyond the sink's own position is applied in the transaction that has the tables rejoin.
        if delivery.position > end {
            return Ok(None);
        }
        Ok(self.catching.end_message(self.reached))
    }

    /// What was taken and is not applied yet.
    pub(crate) fn flush(&mut self) -> Option<Part> {
        self.catching.flush()
    }

    /// The batch that applies a part, and moves the tables on.
    pub(crate) fn batch(&self, life: &Life<'_>, part: Part) -> Batch {
        let at = Claim {
            stream_seq: part.after.stream_seq,
            position: part.after.position,
        };
        let mut progress = life.progress.clone();
        for table in self.tables.keys() {
            if let Some(CopyState::Loaded { claim, .. }) = progress.tables.get_mut(table)
                && claim.position < at.position
            {
                *claim = at;
            }
        }
        batch(life, progress, part.steps)
    }
}

/// Applies the changes of near tables up to their sink's own position, where they rejoin.
async fn catch_up(
    life: &mut Life<'_>,
    tables: &[TableName],
    stop: &CancellationToken,
) -> Result<(), Error> {
    let Some(mut behind) = CatchUp::begin(life, tables) else {
        return Ok(());
    };
    while behind.reached.position < life.checkpoint.position {
        let delivery = tokio::select! {
            biased;
            () = stop.cancelled() => return Ok(()),
            delivery = behind.reader.next() => match delivery {
                Err(ReadError::Gap { .. }) => {
                    let progress = given_up(life, tables, life.checkpoint.position);
                    return store(life, progress, Vec::new()).await;
                }
                delivery => delivery?,
            },
        };
        if let Some(part) = behind.take(life, &delivery).await? {
            let batch = behind.batch(life, part);
            life.apply(batch).await?;
        }
    }
    let mut progress = life.progress.clone();
    for (table, (lsn, _)) in &behind.tables {
        let copied = CopyState::Copied { lsn: *lsn };
        progress.tables.insert(table.clone(), copied);
    }
    let steps = behind.catching.finish();
    store(life, progress, steps).await?;
    for table in behind.tables.keys() {
        tracing::info!(sink = %life.settings.name, %table, "table is up to date");
    }
    Ok(())
}

/// The stream has let go of what these tables need: their rows come in chunks, beside what comes above `position`.
pub(crate) fn given_up(life: &Life<'_>, tables: &[TableName], position: Position) -> CopyProgress {
    tracing::warn!(
        sink = %life.settings.name, tables = tables.len(), code = Code::ParkedTooLong.as_str(),
        "the stream no longer holds what tables need that catch up; they are copied again, in chunks"
    );
    let mut progress = life.progress.clone();
    asking::begin_chunks(&mut progress, tables, position, now_us());
    progress
}

/// A batch beside the stream: the sink stays where it is.
pub(crate) fn batch(life: &Life<'_>, progress: CopyProgress, steps: Vec<Step>) -> Batch {
    Batch {
        from: life.checkpoint,
        to: life.checkpoint,
        copy: Some(progress),
        steps,
        commit: true,
    }
}

/// Applies steps, and stores how the tables stand with them.
pub(crate) async fn store(
    life: &mut Life<'_>,
    progress: CopyProgress,
    steps: Vec<Step>,
) -> Result<(), Error> {
    let batch = batch(life, progress, steps);
    life.apply(batch).await
}
