//! How a message of the copy stream gets into the machine.

use std::sync::Arc;

use millrace_consumer::{Body, Delivery};
use millrace_event::work::Copied;
use millrace_event::{
    ChangeEvent, LoadHead, Lsn, Position, TableName, decode_line, header, subject,
};

use crate::copying::{CopyError, CopyMark, Copying, Input};
use crate::error::Error;
use crate::life::Life;

/// Why a message was not taken.
pub(super) enum Taken {
    /// The target must be asked first, and is busy.
    Later,
    /// Something before it is missing.
    Lost(CopyError),
    Failed(Error),
}

impl From<Error> for Taken {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// Feeds a message of the copy stream to the machine, with the layout that its rows need.
pub(super) async fn take(
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
        renew_layout(life, machine, &copied.table).await?;
        return machine
            .handle(Input::Copied {
                mark,
                copied: &copied,
            })
            .map_err(Taken::Lost);
    }
    let head = LoadHead::of(payload)
        .map_err(|error| Error::retry("copied rows cannot be understood", error))?;
    if let Some((head, at)) = head {
        renew_layout(life, machine, &head.load).await?;
        if machine.misses(&head.load, &head.table_version) {
            if !life.tables.contains_key(&head.load) {
                return Ok(());
            }
            if life.is_applying() {
                return Err(Taken::Later);
            }
            machine.set_layout(life.layout(&head.load, Some(&head.table_version)).await?);
        }
        let (head, rows) = (&head, &payload.slice(at..));
        return machine
            .handle(Input::Load { mark, head, rows })
            .map_err(Taken::Lost);
    }
    let events: Vec<ChangeEvent<'_>> = millrace_event::decode(payload)
        .collect::<Result<_, _>>()
        .map_err(|error| Error::retry("copied rows cannot be understood", error))?;
    if let Some(first) = events.first() {
        renew_layout(life, machine, &first.source.table_name()).await?;
    }
    if let Some(table) = events
        .first()
        .and_then(|event| machine.missing_layout(event))
    {
        if !life.tables.contains_key(&table) {
            return Ok(());
        }
        if life.is_applying() {
            return Err(Taken::Later);
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

/// Has a table's rows laid out for the target as it is now: the stream's changes may have changed it.
async fn renew_layout(
    life: &mut Life<'_>,
    machine: &mut Copying,
    table: &TableName,
) -> Result<(), Error> {
    if let Some(known) = machine.layout(table)
        && !life.is_current(known)
    {
        let renewed = life.renewed(&Arc::clone(known)).await?;
        machine.set_layout(renewed);
    }
    Ok(())
}

fn mark_of(delivery: &Delivery) -> Option<(String, u64, u64)> {
    let headers = delivery.headers.as_ref()?;
    let (request, attempt) = headers.get(header::COPY)?.as_str().rsplit_once('/')?;
    let number = headers.get(header::COPY_NUMBER)?.as_str().parse().ok()?;
    Some((request.to_owned(), attempt.parse().ok()?, number))
}

/// Up to where the stream must have been applied before these rows are; zero where they need nothing of it.
pub(super) fn reach_of(delivery: &Delivery) -> Position {
    let zero = Position::new(0, Lsn::ZERO, 0);
    let header = delivery.headers.as_ref();
    let reach = header.and_then(|headers| headers.get(header::COPY_REACH));
    let Some(lsn) = reach.and_then(|reach| reach.as_str().parse::<Lsn>().ok()) else {
        return zero;
    };
    let Body::Changes(payload) = &delivery.body else {
        return zero;
    };
    let first = payload.split(|byte| *byte == b'\n').next();
    let first = first.and_then(|line| decode_line(line).ok());
    // An end of a chunk comes behind its rows.
    first.map_or(zero, |event| {
        Position::new(event.source.version.epoch, lsn, 0)
    })
}
