//! A row of several messages of which the broker lost the last ones: it counts on where it was, and capture writes the row
//! again.

use std::time::{Duration, Instant};

use async_nats::HeaderMap;
use async_nats::jetstream::{self, stream::Stream};
use bytes::Bytes;
use millrace_consumer::{Body, Reader, ReaderOptions, Start};
use millrace_event::{header, subject};

use crate::broker_loss::SYNCED;
use crate::stage::{PATIENCE, Setting, Stage};

/// Three messages of a broker as it comes.
const ROW_BYTES: usize = 5 << 19;

async fn stream(stage: &Stage) -> Stream {
    let jetstream = jetstream::new(stage.nats.client().await.expect("client"));
    let stream = jetstream.get_stream(subject::stream_name("shop")).await;
    stream.expect("a stream")
}

/// The place of the newest chunk, `<i>/<n>`, and its sequence.
async fn newest_chunk(stream: &Stream) -> Option<(String, u64)> {
    let newest = stream.get_last_raw_message_by_subject("cdc.shop.public.t.c");
    let newest = newest.await.ok()?;
    let place = newest.headers.get(header::CHUNK)?.as_str();
    let (place, _) = place.rsplit_once('/')?;
    Some((place.to_owned(), newest.sequence))
}

/// The broker loses messages and counts on. Capture's stream lets nobody delete one, so it is made anew without that.
async fn lose(stage: &Stage, first: u64, last: u64) {
    let client = stage.nats.client().await.expect("client");
    let jetstream = jetstream::new(client);
    let config = stream(stage).await.cached_info().config.clone();
    let mut stored = Vec::new();
    for stream_seq in 1..=last {
        stored.push(stream(stage).await.get_raw_message(stream_seq).await.ok());
    }
    jetstream.delete_stream(&config.name).await.expect("gone");
    let open = jetstream::stream::Config {
        deny_delete: false,
        ..config.clone()
    };
    let made = jetstream.create_stream(open).await.expect("made");
    for message in &stored {
        let (subject, headers, payload) = match message {
            Some(message) => (&*message.subject, &message.headers, &message.payload),
            None => ("cdc.shop.public.t.c", &HeaderMap::new(), &Bytes::new()),
        };
        let (subject, headers) = (subject.to_owned(), headers.clone());
        let sent = jetstream.publish_with_headers(subject, headers, payload.clone());
        sent.await.expect("sent").await.expect("stored");
    }
    for (stream_seq, message) in (1..).zip(&stored) {
        if message.is_none() || (first..=last).contains(&stream_seq) {
            made.delete_message(stream_seq).await.expect("deleted");
        }
    }
    jetstream.update_stream(config).await.expect("updated");
}

/// Has capture write a row of three messages, and the broker lose everything behind the `kept`th.
async fn write_and_lose(stage: &Stage, kept: u64) {
    let mut capture = stage.start_with(&["run", "--only", "capture"]);
    let stream = stream(stage).await;
    let deadline = Instant::now() + PATIENCE;
    let last = loop {
        match newest_chunk(&stream).await {
            Some((place, stream_seq)) if place == "3/3" => break stream_seq,
            found => assert!(Instant::now() < deadline, "{found:?}\n{}", capture.logs()),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    capture.kill9();
    let end = stream.get_info().await.expect("info").state.last_sequence;
    lose(stage, last - 2 + kept, end).await;
    let left = newest_chunk(&stream).await.map(|(place, _)| place);
    assert_eq!(left, Some(format!("{kept}/3")));
}

/// A reader comes to the edge of the hole with the highest whole message below the row.
#[tokio::test]
async fn a_row_that_the_broker_lost_the_end_of_comes_again_and_stops_no_reader() {
    let stage = Stage::set(Setting {
        stream: SYNCED,
        ..Setting::default()
    })
    .await;
    let mut pipeline = stage.start();
    stage.sql("INSERT INTO t VALUES (1, 'kept')").await;
    stage.equal(&pipeline).await;
    pipeline.terminate().expect("signal");
    assert_eq!(pipeline.wait(PATIENCE).await.expect("ends"), 0);
    let row = format!("INSERT INTO t VALUES (2, repeat('x', {ROW_BYTES}))");
    stage.sql(&row).await;
    write_and_lose(&stage, 1).await;
    // What was written again is lost too.
    write_and_lose(&stage, 2).await;
    let capture = stage.start_with(&["run", "--only", "capture"]);
    let jetstream = jetstream::new(stage.nats.client().await.expect("client"));
    let mut reader = Reader::open(ReaderOptions::new(jetstream, "shop", Start::Beginning));
    let deadline = Instant::now() + PATIENCE;
    loop {
        assert!(Instant::now() < deadline, "{}", capture.logs());
        let next = tokio::time::timeout(PATIENCE, reader.next()).await;
        let next = next.unwrap_or_else(|_| panic!("{}", capture.logs()));
        if let Body::Changes(line) = next.expect("no gap").body
            && line.len() > ROW_BYTES
        {
            break;
        }
    }
}
