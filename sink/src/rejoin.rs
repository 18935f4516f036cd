//! Parked tables: what the target refuses waits in the stream, and comes back by itself.
//!
//! A parked table keeps a position of its own, where it was last complete. While it is parked the worker
//! leaves its changes out and goes on with the others. When the target takes the table again, its changes
//! from that position up to the sink's are applied, and in the transaction of the last of them it rejoins.
//!
//! The stream does not wait for a parked table. Once it has let go of what the table needs, the table's claim
//! lapses: it stays parked, and is copied again when the target takes it.

use millrace_config::{Code, Condition};
use millrace_consumer::{Body, ReadError, Reader, ReaderOptions, Start, Token};
use millrace_event::{ChangeEvent, Lsn, Op, Position, TableName};
use tokio_util::sync::CancellationToken;

use crate::batch::{Batch, CopyState, Step};
use crate::catching::{Catching, Part};
use crate::copy::withdraw;
use crate::error::Error;
use crate::life::{Life, now_us};

/// Parks a table at the sink's checkpoint: everything below it has been applied.
pub(crate) async fn park(
    life: &mut Life<'_>,
    table: &TableName,
    condition: &Condition,
) -> Result<(), Error> {
    let state = match life.progress.tables.get(table) {
        Some(CopyState::Copied { lsn }) => CopyState::Parked {
            lsn: *lsn,
            stream_seq: life.checkpoint.stream_seq,
            position: life.checkpoint.position,
        },
        // Its copy is what the target refuses: the next one begins anew.
        Some(CopyState::Copying { .. }) => {
            withdraw(life).await?;
            CopyState::Lapsed {
                refused_at_us: now_us(),
            }
        }
        // The request that names it is a leftover.
        Some(CopyState::Parked { .. } | CopyState::Lapsed { .. }) => return withdraw(life).await,
        // Nothing of it was ever there to be left behind.
        Some(CopyState::Pending) | None => return Err(Error::Halt(condition.clone())),
    };
    tracing::error!(
        sink = %life.settings.name, %table, code = condition.code.as_str(), remedy = %condition.remedy,
        "table parked: {}; the others go on", condition.message
    );
    store(life, table, state, Vec::new()).await?;
    life.status.set_parked(table, condition.clone());
    Ok(())
}

/// Lets every parked table rejoin that the target takes again. Those that the stream has let down are then to
/// be copied: the progress is not complete any more.
pub(crate) async fn rejoin(life: &mut Life<'_>, stop: &CancellationToken) -> Result<(), Error> {
    for table in life.progress.parked() {
        match life.layout(&table, None).await {
            Ok(_) => match Box::pin(take_back(life, &table, stop)).await {
                // The target has the columns and yet refuses the rows.
                Err(Error::Table { condition, .. }) => refused(life, &table, condition),
                taken => taken?,
            },
            Err(Error::Table { condition, .. }) => {
                if has_lapsed(life, &table).await? {
                    lapse(life, &table, CopyState::Lapsed { refused_at_us: 0 }).await?;
                }
                refused(life, &table, condition);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Says why a table stays parked.
fn refused(life: &Life<'_>, table: &TableName, condition: Condition) {
    tracing::warn!(
        sink = %life.settings.name, %table, code = condition.code.as_str(),
        remedy = %condition.remedy, "table still parked: {}", condition.message
    );
    life.status.set_parked(table, condition);
}

/// Whether there is something to do about one of these tables: the target takes it again, or its claim has
/// lapsed.
pub(crate) async fn is_wanted(life: &mut Life<'_>, parked: &[TableName]) -> Result<bool, Error> {
    for table in parked {
        let state = life.progress.tables.get(table);
        let rests = matches!(state, Some(CopyState::Lapsed { .. }))
            && !state.is_some_and(|state| state.may_copy_again(now_us()));
        if rests {
            continue;
        }
        if has_lapsed(life, table).await? {
            return Ok(true);
        }
        match life.layout(table, None).await {
            Ok(_) => return Ok(true),
            Err(Error::Table { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}

/// Whether the stream no longer holds what a parked table needs next.
async fn has_lapsed(life: &Life<'_>, table: &TableName) -> Result<bool, Error> {
    match life.progress.tables.get(table) {
        Some(CopyState::Parked { stream_seq, .. }) => {
            Ok(life.stream_start().await? > stream_seq + 1)
        }
        _ => Ok(false),
    }
}

/// Gives up what a table claims of the stream.
async fn lapse(life: &mut Life<'_>, table: &TableName, state: CopyState) -> Result<(), Error> {
    tracing::warn!(
        sink = %life.settings.name, %table, code = Code::ParkedTooLong.as_str(),
        "the stream no longer holds what the parked table needs; it is copied again once the target takes it"
    );
    store(life, table, state, Vec::new()).await
}

/// Has a table rejoin that the target takes again.
async fn take_back(
    life: &mut Life<'_>,
    table: &TableName,
    stop: &CancellationToken,
) -> Result<(), Error> {
    match life.progress.tables.get(table).cloned() {
        Some(CopyState::Parked {
            lsn,
            stream_seq,
            position,
        }) => {
            let token = Token {
                stream_seq,
                position,
            };
            match catch_up(life, table, lsn, token, stop).await? {
                CaughtUp::Rejoined | CaughtUp::Stopped => Ok(()),
                CaughtUp::Gap => {
                    life.status.set_begun();
                    lapse(life, table, CopyState::again()).await
                }
            }
        }
        Some(state) if state.may_copy_again(now_us()) => {
            tracing::info!(sink = %life.settings.name, %table, "table is copied again");
            life.status.set_begun();
            store(life, table, CopyState::again(), Vec::new()).await
        }
        _ => Ok(()),
    }
}

/// How catching up ended.
enum CaughtUp {
    /// The table is where its sink is.
    Rejoined,
    /// The stream does not hold everything that the table needs.
    Gap,
    /// The process stops.
    Stopped,
}

/// Applies a table's changes from its own position up to the sink's.
async fn catch_up(
    life: &mut Life<'_>,
    table: &TableName,
    lsn: Lsn,
    from: Token,
    stop: &CancellationToken,
) -> Result<CaughtUp, Error> {
    tracing::info!(sink = %life.settings.name, %table, position = %from.position, "table rejoins");
    let mut reader = Reader::open(ReaderOptions::new(
        life.jetstream.clone(),
        life.source,
        Start::After(from),
    ));
    let (deletes, truncates) = life.rule(table);
    let mut catching = Catching::new(life.limits, from);
    let mut reached = from.position;
    while reached < life.checkpoint.position {
        let delivery = tokio::select! {
            biased;
            () = stop.cancelled() => return Ok(CaughtUp::Stopped),
            delivery = reader.next() => match delivery {
                Err(ReadError::Gap { .. }) => return Ok(CaughtUp::Gap),
                delivery => delivery?,
            },
        };
        reached = delivery.position;
        let Body::Changes(payload) = &delivery.body else {
            continue;
        };
        let events: Vec<ChangeEvent<'_>> = delivery
            .changes()
            .collect::<Result<_, _>>()
            .map_err(|error| Error::retry("a change cannot be understood", error))?;
        for event in events
            .iter()
            .filter(|event| event.source.table_name() == *table)
        {
            let version = event.source.version;
            let wanted = match event.op {
                Op::Delete => deletes,
                Op::Truncate => truncates,
                _ => true,
            };
            // The last message may reach beyond the sink's own position: what does comes with the others.
            let own = Position::from(version) <= life.checkpoint.position;
            if wanted && own && version.commit_lsn >= lsn {
                let shape = event.source.table_version.as_ref();
                let layout = life.layout_of(table, shape).await?;
                catching
                    .push(&layout, event, payload)
                    .map_err(|error| Error::retry("a change has no key", error))?;
            }
        }
        // What reaches beyond the sink's own position is applied in the transaction that has it rejoin.
        if reached > life.checkpoint.position {
            break;
        }
        let at = Token {
            stream_seq: delivery.stream_seq,
            position: reached,
        };
        if let Some(Part { after, steps }) = catching.end_message(at) {
            let state = CopyState::Parked {
                lsn,
                stream_seq: after.stream_seq,
                position: after.position,
            };
            store(life, table, state, steps).await?;
        }
    }
    store(life, table, CopyState::Copied { lsn }, catching.finish()).await?;
    Ok(CaughtUp::Rejoined)
}

/// Applies steps, and stores the table's state with it.
async fn store(
    life: &mut Life<'_>,
    table: &TableName,
    state: CopyState,
    steps: Vec<Step>,
) -> Result<(), Error> {
    let mut progress = life.progress.clone();
    progress.tables.insert(table.clone(), state);
    let (from, to) = (life.checkpoint, life.checkpoint);
    life.apply(Batch {
        from,
        to,
        copy: Some(progress),
        steps,
        commit: true,
    })
    .await
}
