//! The writing end of a copy stream: numbered messages, and never more of them than the sink keeps up with.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use async_nats::jetstream::context::PublishAckFuture;
use async_nats::jetstream::kv;
use async_nats::jetstream::message::PublishMessage;
use bytes::Bytes;
use millrace_event::work::{CopyApplied, CopyRequest, CopyStatus};
use millrace_event::{Lsn, header};

use super::ahead::Ahead;
use super::failure::Failure;
use super::read;
use crate::Error;
use crate::life::{MESSAGE_OVERHEAD_BYTES, Stream};
use crate::stream;

/// So many messages may be published and not acknowledged.
const UNACKED_MAX: usize = 32;

/// How often the sink's progress is looked at while it is awaited.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// One attempt's writer. Messages are numbered, so that the sink notices a loss.
pub(super) struct Writer<'c> {
    stream: &'c Stream,
    name: String,
    sink: &'c str,
    /// Whose rows these are: `<request>/<attempt>`.
    copy: String,
    request: String,
    number: u64,
    /// How many payload bytes the broker takes in one message.
    chunk_bytes: usize,
    unacked: VecDeque<(PublishAckFuture, u64)>,
    /// When it last had waited for its sink.
    waited_at: Option<Instant>,
    ahead: Ahead,
    last_seq: u64,
    /// What must be told before the next message is published.
    tell_first: Option<CopyStatus>,
}

impl<'c> Writer<'c> {
    /// Begins an attempt on the sink's copy stream, and waits until the sink has read enough of what earlier
    /// attempts left there: how often an attempt is cut off, the stream never fills.
    ///
    /// What the sink has not read stays, though it skips most of it: tables that an earlier attempt finished lie
    /// among the rest, and a reader takes a hole for a loss. `mark_subject` takes a message without a number and
    /// without rows. It lies behind all of that and is always delivered, even where an attempt was cut off
    /// within a message of many chunks; so once the sink has passed it, the rest may go.
    pub(super) async fn begin(
        stream: &'c Stream,
        sink: &'c str,
        name: String,
        status: &CopyStatus,
        mark_subject: String,
    ) -> Result<Self, Failure> {
        let jetstream = &stream.jetstream;
        let applied = applied(stream, sink, &status.request).await?;
        if applied > 0 {
            stream::purge(jetstream, &name, applied).await?;
        }
        let found = stream::find_stream(jetstream, &name)
            .await?
            .ok_or_else(|| Error::retry_because("the copy stream is gone"))?;
        let copy = format!("{}/{}", status.request, status.attempt);
        let mark = PublishMessage::build().header(header::COPY, copy.as_str());
        let stored = jetstream
            .send_publish(mark_subject, mark)
            .await
            .map_err(|error| Error::retry("a copy cannot be begun on its stream", error))?
            .await
            .map_err(|error| Error::retry("a copy's begin was not stored", error))?;
        let max_payload = jetstream.client().server_info().max_payload;
        let mut writer = Self {
            stream,
            name,
            sink,
            copy,
            request: status.request.clone(),
            number: 0,
            chunk_bytes: max_payload.saturating_sub(MESSAGE_OVERHEAD_BYTES).max(1024),
            unacked: VecDeque::new(),
            ahead: Ahead::new(found.max_bytes, found.bytes, stored.sequence),
            last_seq: stored.sequence,
            tell_first: None,
            waited_at: None,
        };
        writer.wait_for_sink().await?;
        Ok(writer)
    }

    /// When it last had waited for its sink.
    pub(super) fn waited_at(&self) -> Option<Instant> {
        self.waited_at
    }

    /// The sink that reads it.
    pub(super) fn sink(&self) -> &'c str {
        self.sink
    }

    /// Tells this status before the next message is published.
    pub(super) fn tell_first(&mut self, status: CopyStatus) {
        self.tell_first = Some(status);
    }

    /// Whether a message was published since [`Writer::tell_first`]. Otherwise what should be told is forgotten.
    pub(super) fn has_told(&mut self) -> bool {
        self.tell_first.take().is_none()
    }

    /// Publishes a message as soon as the sink is near enough.
    pub(super) async fn publish(&mut self, subject: String, payload: Bytes) -> Result<(), Failure> {
        self.publish_behind(subject, payload, None).await
    }

    /// Publishes what the sink applies once it has applied the stream up to `reach`, as soon as it is near enough.
    pub(super) async fn publish_behind(
        &mut self,
        subject: String,
        payload: Bytes,
        reach: Option<Lsn>,
    ) -> Result<(), Failure> {
        if let Some(status) = self.tell_first.take() {
            store_status(&self.stream.copies, self.sink, &status).await?;
        }
        // Not between chunks: the sink applies none of them before it has them all.
        self.wait_for_sink().await?;
        self.number += 1;
        let count = payload.len().div_ceil(self.chunk_bytes);
        for index in 0..count {
            while self.unacked.len() >= UNACKED_MAX {
                self.next_ack().await?;
            }
            let end = payload.len().min((index + 1) * self.chunk_bytes);
            let part = payload.slice(index * self.chunk_bytes..end);
            let weight = Ahead::weight(part.len());
            let mut message = PublishMessage::build()
                .payload(part)
                .header(header::COPY, self.copy.as_str())
                .header(header::COPY_NUMBER, self.number.to_string());
            if count > 1 {
                let place = format!("{}/{count}/{}", index + 1, self.copy);
                message = message.header(header::CHUNK, place);
            }
            if let Some(reach) = reach {
                message = message.header(header::COPY_REACH, reach.to_string());
            }
            let ack = self
                .stream
                .jetstream
                .send_publish(subject.clone(), message)
                .await
                .map_err(|error| Error::retry("copied rows cannot be published", error))?;
            self.ahead.sent(weight);
            self.unacked.push_back((ack, weight));
        }
        Ok(())
    }

    /// Waits until everything published is in the stream; returns its last sequence.
    pub(super) async fn settle(&mut self) -> Result<u64, Failure> {
        while !self.unacked.is_empty() {
            self.next_ack().await?;
        }
        Ok(self.last_seq)
    }

    async fn next_ack(&mut self) -> Result<(), Failure> {
        let Some((ack, weight)) = self.unacked.pop_front() else {
            return Ok(());
        };
        let ack = ack
            .await
            .map_err(|error| Error::retry("copied rows were not stored", error))?;
        self.last_seq = ack.sequence;
        self.ahead.stored(ack.sequence, weight);
        Ok(())
    }

    /// Waits until the sink has not too much before it, and removes what it has behind it.
    async fn wait_for_sink(&mut self) -> Result<(), Failure> {
        if !self.ahead.is_full() {
            return Ok(());
        }
        // What has no sequence yet cannot be known to be applied.
        self.settle().await?;
        let Stream {
            jetstream, copies, ..
        } = self.stream;
        loop {
            let wanted: Option<CopyRequest> =
                read(copies, &format!("request.{}", self.sink)).await?;
            if wanted.is_none_or(|wanted| wanted.id != self.request) {
                return Err(Failure::Replaced);
            }
            let applied = applied(self.stream, self.sink, &self.request).await?;
            self.ahead.applied(applied);
            if !self.ahead.is_full() {
                self.waited_at = Some(Instant::now());
                return Ok(stream::purge(jetstream, &self.name, applied).await?);
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }
}

/// Up to where the sink has applied its copy stream: 0 where it has not said so for this request.
async fn applied(stream: &Stream, sink: &str, request: &str) -> Result<u64, Error> {
    let applied = read_applied(stream, sink, request).await?;
    Ok(applied.map_or(0, |applied| applied.stream_seq))
}

/// What the sink has applied for this request.
pub(super) async fn read_applied(
    stream: &Stream,
    sink: &str,
    request: &str,
) -> Result<Option<CopyApplied>, Error> {
    let applied: Option<CopyApplied> = read(&stream.copies, &format!("applied.{sink}")).await?;
    Ok(applied.filter(|applied| applied.request == request))
}

/// Tells the sink how far its request is.
pub(super) async fn store_status(
    copies: &kv::Store,
    sink: &str,
    status: &CopyStatus,
) -> Result<(), Error> {
    let value = serde_json::to_vec(status).expect("plain JSON");
    let stored = copies.put(format!("status.{sink}"), value.into());
    stored
        .await
        .map(|_| ())
        .map_err(|error| Error::retry("a copy's progress cannot be stored", error))
}
