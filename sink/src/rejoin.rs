//! Parked tables: what the target refuses waits in the stream, and comes back by itself.
//!
//! A parked table keeps a position of its own, where it was last complete. While it is parked the worker
//! leaves its changes out and goes on with the others. When the target takes the table again, its changes
//! from that position up to the sink's are applied, and in the transaction of the last of them it rejoins.

use millrace_config::Condition;
use millrace_consumer::{Body, Reader, ReaderOptions, Start, Token};
use millrace_event::{ChangeEvent, Op, Position, TableName};
use tokio_util::sync::CancellationToken;

use crate::batch::{Batch, CopyState};
use crate::error::Error;
use crate::fold::Fold;
use crate::life::Life;

/// Parks a table at the sink's checkpoint: everything below it has been applied.
pub(crate) async fn park(
    life: &mut Life<'_>,
    table: &TableName,
    condition: &Condition,
) -> Result<(), Error> {
    let lsn = match life.progress.tables.get(table) {
        Some(CopyState::Copied { lsn }) => *lsn,
        Some(CopyState::Parked { .. }) => return Ok(()),
        // Its copy is what the target refuses: nothing of it is there to be left behind.
        _ => return Err(Error::Halt(condition.clone())),
    };
    tracing::error!(
        sink = %life.settings.name, %table, code = condition.code.as_str(), remedy = %condition.remedy,
        "table parked: {}; the others go on", condition.message
    );
    let (stream_seq, position) = (life.checkpoint.stream_seq, life.checkpoint.position);
    store(
        life,
        table,
        CopyState::Parked {
            lsn,
            stream_seq,
            position,
        },
        Fold::new(),
    )
    .await?;
    life.status.set_parked(table, condition.clone());
    Ok(())
}

/// Lets every parked table rejoin that the target takes again.
pub(crate) async fn rejoin(life: &mut Life<'_>, stop: &CancellationToken) -> Result<(), Error> {
    for table in life.progress.parked() {
        match life.layout(&table, None).await {
            Ok(_) => match Box::pin(catch_up(life, &table, stop)).await {
                // The target has the columns and yet refuses the rows.
                Err(Error::Table { condition, .. }) => refused(life, &table, condition),
                caught_up => caught_up?,
            },
            Err(Error::Table { condition, .. }) => refused(life, &table, condition),
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

/// Whether the target takes one of these tables again.
pub(crate) async fn is_wanted(life: &mut Life<'_>, parked: &[TableName]) -> Result<bool, Error> {
    for table in parked {
        match life.layout(table, None).await {
            Ok(_) => return Ok(true),
            Err(Error::Table { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}

/// Applies a table's changes from its own position up to the sink's.
async fn catch_up(
    life: &mut Life<'_>,
    table: &TableName,
    stop: &CancellationToken,
) -> Result<(), Error> {
    let Some(CopyState::Parked {
        lsn,
        stream_seq,
        position,
    }) = life.progress.tables.get(table).cloned()
    else {
        return Ok(());
    };
    tracing::info!(sink = %life.settings.name, %table, %position, "table rejoins");
    let start = Start::After(Token {
        stream_seq,
        position,
    });
    let mut reader = Reader::open(ReaderOptions::new(
        life.jetstream.clone(),
        life.source,
        start,
    ));
    let (deletes, truncates) = life.rule(table);
    let mut fold = Fold::new();
    let mut reached = position;
    while reached < life.checkpoint.position {
        let delivery = tokio::select! {
            biased;
            () = stop.cancelled() => return Ok(()),
            delivery = reader.next() => delivery?,
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
                fold.push(&layout, event, payload)
                    .map_err(|error| Error::retry("a change has no key", error))?;
            }
        }
        // Not between the two halves of a key change.
        let halfway = events
            .last()
            .is_some_and(|event| event.op == Op::Delete && !event.source.last);
        let full = fold.rows() >= life.limits.rows || fold.bytes() >= life.limits.bytes;
        if full && !halfway && reached <= life.checkpoint.position {
            let (stream_seq, position) = (delivery.stream_seq, reached);
            let state = CopyState::Parked {
                lsn,
                stream_seq,
                position,
            };
            store(life, table, state, std::mem::take(&mut fold)).await?;
        }
    }
    store(life, table, CopyState::Copied { lsn }, fold).await
}

/// Applies what was folded, and stores the table's state with it.
async fn store(
    life: &mut Life<'_>,
    table: &TableName,
    state: CopyState,
    mut fold: Fold,
) -> Result<(), Error> {
    let mut progress = life.progress.clone();
    progress.tables.insert(table.clone(), state);
    let (from, to) = (life.checkpoint, life.checkpoint);
    life.apply(Batch {
        from,
        to,
        copy: Some(progress),
        steps: fold.finish(),
        commit: true,
    })
    .await
}
