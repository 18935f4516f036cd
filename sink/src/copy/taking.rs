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
        // An end without a row before it brings no layout.
        lay_out(life, machine, &copied.table, None).await?;
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
        lay_out(life, machine, &head.load, Some(&head.table_version)).await?;
        let (head, rows) = (&head, &payload.slice(at..));
        return machine
            .handle(Input::Load { mark, head, rows })
            .map_err(Taken::Lost);
    }
    let events: Vec<ChangeEvent<'_>> = millrace_event::decode(payload)
        .collect::<Result<_, _>>()
        .map_err(|error| Error::retry("copied rows cannot be understood", error))?;
    if let Some(first) = events.first() {
        let (table, version) = (first.source.table_name(), &first.source.table_version);
        lay_out(life, machine, &table, Some(version)).await?;
    }
    machine
        .handle(Input::Rows {
            mark,
            payload,
            events: &events,
        })
        .map_err(Taken::Lost)
}

/// Sees to the layout that a table's rows need, of the version that is named or of any. What the machine leaves out
/// needs none, and is handed to it all the same: its messages count.
async fn lay_out(
    life: &mut Life<'_>,
    machine: &mut Copying,
    table: &TableName,
    version: Option<&str>,
) -> Result<(), Taken> {
    renew_layout(life, machine, table).await?;
    if !machine.misses(table, version) {
        return Ok(());
    }
    if life.is_applying() {
        return Err(Taken::Later);
    }
    machine.set_layout(life.layout(table, version).await?);
    Ok(())
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

/// Up to where the stream must have been applied before these rows are, or before this end counts; zero where they
/// need nothing of it.
pub(super) fn reach_of(delivery: &Delivery) -> Position {
    let header = delivery.headers.as_ref();
    let reach = header.and_then(|headers| headers.get(header::COPY_REACH));
    match (reach, &delivery.body) {
        (Some(reach), Body::Changes(payload)) => reach_in(reach.as_str(), payload),
        _ => Position::ZERO,
    }
}

/// A reach names an LSN, and the rows or the end that it comes with the epoch.
fn reach_in(reach: &str, payload: &[u8]) -> Position {
    let Ok(lsn) = reach.parse::<Lsn>() else {
        return Position::ZERO;
    };
    let first = payload.split(|byte| *byte == b'\n').next();
    let first = first.and_then(|line| decode_line(line).ok());
    let epoch = first.map(|event| event.source.version.epoch).or_else(|| {
        let end: Option<Copied> = serde_json::from_slice(payload).ok();
        end.map(|end| end.epoch)
    });
    epoch.map_or(Position::ZERO, |epoch| Position::new(epoch, lsn, 0))
}

#[cfg(test)]
mod tests {
    use millrace_event::work::Part;

    use super::*;

    #[test]
    fn rows_and_ends_wait_until_the_stream_is_applied_as_far_as_they_reach() {
        let version = millrace_event::Version::new(3, Lsn(5), 0);
        let row = format!(
            r#"{{"op":"r","before":null,"after":{{"id":1}},"key":{{"id":1}},"ts_ms":1,"source":{{"name":"s","db":"d","schema":"public","table":"t","table_version":"0","snapshot":"true","txId":1,"ts_us":1,"version":"{version}","lsn":1}}}}"#
        );
        let end = |part| {
            let copied = Copied {
                table: TableName::new("public", "t"),
                epoch: 3,
                lsn: Lsn(5),
                rows: 0,
                part,
            };
            serde_json::to_string(&copied).expect("plain JSON")
        };
        let last = Part::Chunk {
            after: None,
            last: true,
        };
        let reach = Position::new(3, Lsn(0x1_0000_0009), 0);
        for payload in [
            row.clone(),
            format!("{row}\n{row}"),
            end(last),
            end(Part::Keys),
        ] {
            assert_eq!(reach_in("1/9", payload.as_bytes()), reach, "{payload}");
        }
        assert_eq!(reach_in("1/9", b"else"), Position::ZERO);
        assert_eq!(reach_in("else", row.as_bytes()), Position::ZERO);
    }
}
