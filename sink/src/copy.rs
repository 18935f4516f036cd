//! The initial copy, the sink's side: asks for its tables, and applies what comes on its copy stream.

use std::time::Duration;

use millrace_consumer::{Body, Delivery, Ordering, Reader, ReaderOptions, Start};
use millrace_event::work::{Copied, CopyApplied, CopyRequest, CopyStatus, TableRequest, Wanted};
use millrace_event::{ChangeEvent, TableName, header, subject};
use tokio_util::sync::CancellationToken;

use crate::copying::{CopyError, CopyMark, Copying, Input};
use crate::error::Error;
use crate::life::{LOOK_INTERVAL, Life};
use crate::sink::CopyTooOld;

/// How often it is checked that what was copied also arrived.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Copies every table that is not copied yet. Returns early at `stop`; the next start goes on.
pub(crate) async fn copy(life: &mut Life<'_>, stop: &CancellationToken) -> Result<(), Error> {
    while !life.progress.is_complete() {
        let request = request(life).await?;
        let stream = subject::copy_stream_name(life.source, &life.settings.name);
        wait_for_status(life, &request, stop).await?;
        if stop.is_cancelled() {
            return Ok(());
        }
        let options = ReaderOptions {
            stream: stream.clone(),
            ordering: Ordering::ByStream,
            ..ReaderOptions::new(life.jetstream.clone(), life.source, Start::Beginning)
        };
        let reader = Reader::open(options);
        match follow(life, &request, &stream, reader, stop).await? {
            Followed::Complete | Followed::Lost => {}
            Followed::Stopped => return Ok(()),
        }
        // Whatever was lost on the way is asked for again, under a new name.
        withdraw(life).await?;
    }
    Ok(())
}

/// Withdraws a request that has no table left to copy: capture then clears the copy stream away.
pub(crate) async fn withdraw(life: &Life<'_>) -> Result<(), Error> {
    let key = format!("request.{}", life.settings.name);
    let failed = |error| Error::retry("copy requests cannot be read", error);
    if life.copies.get(&key).await.map_err(failed)?.is_none() {
        return Ok(());
    }
    life.copies
        .delete(&key)
        .await
        .map_err(|error| Error::retry("a copy request cannot be withdrawn", error))
}

/// How a copy stream ended for its reader.
enum Followed {
    /// Every table is copied.
    Complete,
    /// The broker lost a part of it.
    Lost,
    /// The process stops.
    Stopped,
}

/// The request that is under way, or a new one for every table that remains.
async fn request(life: &Life<'_>) -> Result<CopyRequest, Error> {
    let key = format!("request.{}", life.settings.name);
    let remaining: Vec<TableName> = life
        .progress
        .tables
        .iter()
        .filter(|(_, state)| !state.is_copied())
        .map(|(table, _)| table.clone())
        .collect();
    let failed = |error| Error::retry("copy requests cannot be read", error);
    if let Some(entry) = life.copies.get(&key).await.map_err(failed)? {
        let known: Option<CopyRequest> = serde_json::from_slice(&entry).ok();
        if let Some(known) = known.filter(|known| {
            let asked =
                |table: &TableName| known.tables.iter().any(|wanted| wanted.table == *table);
            remaining.iter().all(asked)
        }) {
            return Ok(known);
        }
    }
    let id = format!("{:016x}", rand::random::<u64>());
    let request = CopyRequest {
        id,
        tables: remaining
            .into_iter()
            .map(|table| TableRequest {
                table,
                rows: Wanted::Load,
            })
            .collect(),
    };
    let value = serde_json::to_vec(&request).expect("plain JSON");
    life.copies
        .put(&key, value.into())
        .await
        .map_err(|error| Error::retry("a copy cannot be requested", error))?;
    tracing::info!(sink = %life.settings.name, tables = request.tables.len(), "copy requested");
    Ok(request)
}

async fn status(life: &Life<'_>, request: &CopyRequest) -> Result<Option<CopyStatus>, Error> {
    let key = format!("status.{}", life.settings.name);
    let entry = life
        .copies
        .get(&key)
        .await
        .map_err(|error| Error::retry("a copy's progress cannot be read", error))?;
    let status = entry.and_then(|entry| serde_json::from_slice::<CopyStatus>(&entry).ok());
    Ok(status.filter(|status| status.request == request.id))
}

/// Waits until capture has taken the request up: then its stream exists.
async fn wait_for_status(
    life: &Life<'_>,
    request: &CopyRequest,
    stop: &CancellationToken,
) -> Result<(), Error> {
    while status(life, request).await?.is_none() {
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = tokio::time::sleep(LOOK_INTERVAL) => {}
        }
    }
    Ok(())
}

async fn follow(
    life: &mut Life<'_>,
    request: &CopyRequest,
    stream: &str,
    mut reader: Reader,
    stop: &CancellationToken,
) -> Result<Followed, Error> {
    let (limits, checkpoint) = (life.limits, life.checkpoint);
    let mut machine = Copying::new(
        request.id.clone(),
        limits,
        checkpoint,
        life.progress.clone(),
    );
    for TableRequest { table, .. } in &request.tables {
        if life.tables.contains_key(table) {
            machine.set_layout(life.layout(table, None).await?);
        }
    }
    let mut checks = tokio::time::interval(CHECK_INTERVAL);
    checks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut read_seq = 0;
    let mut told_seq = 0;
    loop {
        let mut delivery = reader.try_next()?;
        let drained = delivery.is_none();
        if let Some(batch) = machine.poll(drained)
            && let Err(error) = life.apply(batch).await
        {
            if is_too_old(&error) {
                // The same rows would be refused for ever: a new request brings a new snapshot.
                tracing::warn!(sink = %life.settings.name, error = error.chain(), "asking for the copy again");
                withdraw(life).await?;
            }
            return Err(error);
        }
        if drained {
            if life.progress.is_complete() {
                return Ok(Followed::Complete);
            }
            if told_seq < read_seq {
                tell_applied(life, request, read_seq).await?;
                told_seq = read_seq;
            }
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(Followed::Stopped),
                next = reader.next() => delivery = Some(next?),
                _ = checks.tick() => {
                    let status = status(life, request).await?;
                    let Some(status) = status else { continue };
                    let told = |wanted: &TableRequest| status.copied.contains(&wanted.table);
                    if request.tables.iter().all(told) {
                        // Everything was put on the stream and read, or the broker lost the stream's end: and
                        // yet something is missing.
                        let end = life.stream_end(stream).await?;
                        if read_seq >= status.last_seq.min(end) {
                            return Ok(Followed::Lost);
                        }
                    }
                }
            }
        }
        let Some(delivery) = delivery else { continue };
        read_seq = delivery.stream_seq;
        match take(life, &mut machine, &delivery).await {
            Ok(()) => {}
            Err(Taken::Lost(error)) => {
                tracing::warn!(sink = %life.settings.name, %error, "asking for the rest of the copy again");
                return Ok(Followed::Lost);
            }
            Err(Taken::Failed(error)) => return Err(error),
        }
    }
}

fn is_too_old(error: &Error) -> bool {
    matches!(error, Error::Retry { source: Some(source), .. } if source.is::<CopyTooOld>())
}

enum Taken {
    Lost(CopyError),
    Failed(Error),
}

impl From<Error> for Taken {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

async fn take(
    life: &mut Life<'_>,
    machine: &mut Copying,
    delivery: &Delivery,
) -> Result<(), Taken> {
    let Body::Changes(payload) = &delivery.body else {
        return Ok(());
    };
    let Some((request, attempt, number)) = mark_of(delivery) else {
        return Ok(());
    };
    let mark = CopyMark {
        request: &request,
        attempt,
        number,
    };
    let copied_subject = subject::copied(life.source, &life.settings.name);
    if delivery.subject.as_str() == copied_subject {
        let copied: Copied = serde_json::from_slice(payload)
            .map_err(|error| Error::retry("a copy's end cannot be understood", error))?;
        if machine.layout(&copied.table).is_none() {
            return Ok(());
        }
        return machine
            .handle(Input::Copied {
                mark,
                copied: &copied,
            })
            .map_err(Taken::Lost);
    }
    let events: Vec<ChangeEvent<'_>> = millrace_event::decode(payload)
        .collect::<Result<_, _>>()
        .map_err(|error| Error::retry("copied rows cannot be understood", error))?;
    if let Some(table) = events
        .first()
        .and_then(|event| machine.missing_layout(event))
    {
        if !life.tables.contains_key(&table) {
            return Ok(());
        }
        let version = events
            .first()
            .map(|event| event.source.table_version.to_string());
        machine.set_layout(life.layout(&table, version.as_deref()).await?);
    }
    machine
        .handle(Input::Rows {
            mark,
            payload,
            events: &events,
        })
        .map_err(Taken::Lost)
}

fn mark_of(delivery: &Delivery) -> Option<(String, u32, u64)> {
    let headers = delivery.headers.as_ref()?;
    let (request, attempt) = headers.get(header::COPY)?.as_str().rsplit_once('/')?;
    let number = headers.get(header::COPY_NUMBER)?.as_str().parse().ok()?;
    Some((request.to_owned(), attempt.parse().ok()?, number))
}

/// Tells capture what the copy stream need not keep any longer.
async fn tell_applied(
    life: &Life<'_>,
    request: &CopyRequest,
    stream_seq: u64,
) -> Result<(), Error> {
    let applied = CopyApplied {
        request: request.id.clone(),
        stream_seq,
        after: Vec::new(),
    };
    let value = serde_json::to_vec(&applied).expect("plain JSON");
    life.copies
        .put(format!("applied.{}", life.settings.name), value.into())
        .await
        .map(|_| ())
        .map_err(|error| Error::retry("a copy's progress cannot be stored", error))
}
