//! What must hold, at every step and at rest.

use bytes::Bytes;
use millrace_event::{ChangeEvent, Columns, Position, Value, Version};
use millrace_sink::batch::Batch;
use millrace_sink::fold::Fold;
use millrace_sink::progress::CopyState;
use millrace_sink::row::{Cell, Key, Row};
use millrace_sink::sink::Sink;

use crate::reader::{Body, Delivery, Reader};
use crate::replica::{NAME, events_above, layouts, line, now};
use crate::source::EPOCH;
use crate::transaction::{Expected, columns_text, event_text};
use crate::world::{Failure, World};

impl World {
    /// A delivery is what comes next: nothing is missing, nothing comes twice.
    pub(crate) fn check_delivery(&mut self, delivery: &Delivery) -> Result<(), Failure> {
        let expected = &self.source.expected;
        self.replica.cursor = follow(expected, self.replica.cursor, delivery)
            .map_err(|failure| format!("the sink's reader: {failure}"))?;
        Ok(())
    }

    /// The stream as a reader sees it is the decoded change sequence: so far, or to its end.
    pub(crate) fn check_stream(&self, is_complete: bool) -> Result<(), Failure> {
        let mut reader = Reader::new(0, Position::ZERO);
        let mut cursor = 0;
        while let Some(delivery) = reader.next(&self.broker) {
            cursor = follow(&self.source.expected, cursor, &delivery)
                .map_err(|failure| format!("the stream: {failure}"))?;
        }
        match self.source.expected.get(cursor) {
            Some(missing) if is_complete => Err(format!("the stream ends before {}", missing.text)),
            _ => Ok(()),
        }
    }

    /// The target shows the source as it was behind one of its transactions, and never an earlier one than before: all
    /// tables together, but those that are still being copied, that somebody else has changed, or whose rows are
    /// incomplete.
    pub(crate) fn check_target(&mut self) -> Result<(), Failure> {
        let Some(row) = self.replica.position() else {
            return Ok(());
        };
        let position = row.checkpoint.position;
        let begun = |lsn| Position::new(EPOCH, lsn, 1) <= position;
        let shown = self
            .source
            .transactions
            .partition_point(|transaction| begun(transaction.commit_lsn));
        if shown < self.replica.shown {
            return Err(format!("the target went back to transaction {shown}"));
        }
        self.replica.shown = shown;
        self.counts.commits_checked += 1;
        let mut all = true;
        for (spec, rows) in self.source.specs.iter().zip(&self.source.states[shown]) {
            if !spec.configured {
                continue;
            }
            // Tables show different snapshots until the stream has passed them all.
            let below = match row.copy.tables.get(&spec.name) {
                Some(CopyState::Copied { lsn }) if *lsn <= position.commit_lsn() => *lsn,
                _ => {
                    all = false;
                    continue;
                }
            };
            if self.replica.wrong.contains_key(&spec.name) || self.replica.is_healing(&spec.name) {
                all = false;
                continue;
            }
            let target = self.replica.target.table(&spec.name);
            let mut found = target
                .rows
                .iter()
                .map(|(key, (version, row))| (key.clone(), *version, row.clone()))
                .collect::<Vec<_>>();
            let mut wanted: Vec<_> = rows
                .values()
                .map(|(version, row)| {
                    let copied = version.commit_lsn < below;
                    let version = if copied {
                        Version::new(EPOCH, below, 0)
                    } else {
                        *version
                    };
                    (key(&spec.key_of(row)), version, cells(row))
                })
                .collect();
            found.sort_by(|a, b| a.0.cmp(&b.0));
            wanted.sort_by(|a, b| a.0.cmp(&b.0));
            if self.replica.mended.contains(&spec.name) && found.len() == wanted.len() {
                // A row that came in a chunk has a newer version than its last change, and none that is to come.
                for ((_, found, _), (_, wanted, _)) in found.iter().zip(&mut wanted) {
                    if (*wanted..=position.0).contains(found) {
                        *wanted = *found;
                    }
                }
            }
            if found != wanted {
                return Err(format!(
                    "{} at {position}, transaction {shown}:\n  source {wanted:?}\n  target {found:?}",
                    spec.name
                ));
            }
        }
        self.replica.is_shown |= all;
        Ok(())
    }

    /// Everything arrived, is equal, and stays so whatever comes again.
    pub(crate) fn check_rest(&mut self) -> Result<(), Failure> {
        self.check_stream(false)?;
        self.check_target()?;
        if !self.replica.is_shown {
            return Err("the target was never complete".to_owned());
        }
        self.replay()
    }

    /// Every message of the stream comes again, one change at a time, straight to the target.
    fn replay(&mut self) -> Result<(), Failure> {
        let layouts = layouts(self)?;
        let row = self.replica.position().unwrap_or_default();
        let mut reader = Reader::new(0, Position::ZERO);
        while let Some(delivery) = reader.next(&self.broker) {
            let Body::Changes(payload) = delivery.body else {
                continue;
            };
            for part in payload.split(|byte| *byte == b'\n') {
                let part = Bytes::copy_from_slice(part);
                let event = line(&part)?;
                let table = event.source.table_name();
                // What the copy covers never gets past the worker.
                let applied = Position::from(event.source.version) <= row.checkpoint.position;
                let covered = row.copy.covers(&table, event.source.version);
                // Where deletes were forgotten only the position keeps what is old away.
                if !applied || covered || self.replica.mended.contains(&table) {
                    continue;
                }
                let mut fold = Fold::new();
                fold.push(&layouts[&table], &event, &part)
                    .map_err(|error| error.to_string())?;
                let from = row.checkpoint;
                let batch = Batch {
                    from,
                    to: from,
                    copy: None,
                    steps: fold.finish(),
                    commit: true,
                };
                let sink = self.replica.sink().ok_or("no sink at rest")?;
                let applied = now(sink.apply(&batch)).map_err(|error| error.to_string())?;
                if applied.written > 0 || applied.dead() > 0 {
                    return Err(format!(
                        "a replay changed something: {applied:?} by {}",
                        text_of(&event)
                    ));
                }
            }
        }
        let from = row.checkpoint;
        let batch = Batch {
            from,
            to: from,
            copy: None,
            steps: Vec::new(),
            commit: true,
        };
        let sink = self.replica.sink().ok_or("no sink at rest")?;
        now(sink.apply(&batch)).map_err(|error| error.to_string())?;
        if self.replica.target.position(NAME) != Some(row) {
            return Err("a replay moved the position".to_owned());
        }
        self.check_target()
    }
}

/// Compares a delivery with what must come next; returns what must come then.
fn follow(expected: &[Expected], mut cursor: usize, delivery: &Delivery) -> Result<usize, Failure> {
    let next = |cursor: usize| expected.get(cursor).map_or("nothing", |event| &event.text);
    match &delivery.body {
        Body::Control(control) => {
            if let Some(missing) = expected.get(cursor)
                && Position::from(missing.version) < control.position
            {
                return Err(format!(
                    "{} comes before {}",
                    control.position, missing.text
                ));
            }
        }
        Body::Changes(payload) => {
            for event in events_above(payload, delivery.floor.0)? {
                let text = text_of(&event);
                if text != next(cursor) {
                    let seq = delivery.stream_seq;
                    return Err(format!(
                        "sequence {seq} is\n  {text}\ninstead of\n  {}",
                        next(cursor)
                    ));
                }
                cursor += 1;
            }
        }
    }
    Ok(cursor)
}

/// An event as text, as the model source writes what it expects.
fn text_of(event: &ChangeEvent<'_>) -> String {
    let text = |columns: &Option<Columns<'_>>| {
        columns.as_ref().map(|columns| {
            columns_text(columns.iter().map(|(name, value)| match value {
                Value::Null => (name.as_ref(), None),
                Value::Text(text) => (name.as_ref(), Some(text.as_ref())),
            }))
        })
    };
    let parts = [text(&event.before), text(&event.after), text(&event.key)];
    let mut out = event_text(event.source.version, event.op, &event.source.table, parts);
    if let (true, Some(end_lsn)) = (event.source.last, event.source.end_lsn) {
        out.push_str(&format!(" last={}", end_lsn.0));
    }
    out
}

pub(crate) fn key(parts: &[String]) -> Key {
    match parts {
        [only] => Key(only.clone().into()),
        parts => {
            let parts: Vec<_> = parts
                .iter()
                .map(|part| format!("{}:{part}", part.len()))
                .collect();
            Key(parts.concat().into())
        }
    }
}

pub(crate) fn cells(row: &[Option<String>]) -> Row {
    row.iter()
        .map(|value| {
            value
                .clone()
                .map_or(Cell::Null, |text| Cell::Text(text.into()))
        })
        .collect()
}
