//! The rows of one COPY, one at a time.

use std::pin::Pin;

use futures_util::StreamExt as _;
use tokio_postgres::{Client, CopyOutStream};

use crate::error::LabError;

/// One row: its key's texts, and all its columns as COPY wrote them.
pub(super) struct Line {
    pub(super) key: Vec<Vec<u8>>,
    pub(super) row: Vec<u8>,
}

impl Line {
    pub(super) fn text(&self) -> String {
        String::from_utf8_lossy(&self.row).into_owned()
    }
}

/// A running COPY.
pub(super) struct Rows {
    stream: Pin<Box<CopyOutStream>>,
    key_columns: usize,
    waiting: Vec<u8>,
    /// Where the rest of `waiting` begins.
    read: usize,
}

impl Rows {
    pub(super) async fn open(
        client: &Client,
        copy: &str,
        key_columns: usize,
    ) -> Result<Self, LabError> {
        let stream = client
            .copy_out(copy)
            .await
            .map_err(LabError::postgres(copy))?;
        Ok(Self {
            stream: Box::pin(stream),
            key_columns,
            waiting: Vec::new(),
            read: 0,
        })
    }

    pub(super) async fn next(&mut self) -> Result<Option<Line>, LabError> {
        loop {
            if let Some(length) = self.waiting[self.read..]
                .iter()
                .position(|byte| *byte == b'\n')
            {
                let line = split(
                    &self.waiting[self.read..self.read + length],
                    self.key_columns,
                );
                self.read += length + 1;
                return line.map(Some);
            }
            self.waiting.drain(..self.read);
            self.read = 0;
            match self.stream.next().await {
                Some(bytes) => self
                    .waiting
                    .extend_from_slice(&bytes.map_err(LabError::postgres("read the rows"))?),
                None if self.waiting.is_empty() => return Ok(None),
                None => return Err(LabError::Unexpected("the rows end within a line".into())),
            }
        }
    }
}

fn split(line: &[u8], key_columns: usize) -> Result<Line, LabError> {
    let mut key = Vec::with_capacity(key_columns);
    let mut rest = line;
    for _ in 0..key_columns {
        let tab = rest
            .iter()
            .position(|byte| *byte == b'\t')
            .ok_or_else(|| LabError::Unexpected("a row without its key".into()))?;
        key.push(unescape(&rest[..tab]));
        rest = &rest[tab + 1..];
    }
    Ok(Line {
        key,
        row: rest.to_vec(),
    })
}

/// COPY's text format: escapes must be undone where bytes are ordered.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut bytes = field.iter();
    while let Some(byte) = bytes.next() {
        if *byte != b'\\' {
            plain.push(*byte);
            continue;
        }
        match bytes.next() {
            Some(b'b') => plain.push(8),
            Some(b'f') => plain.push(12),
            Some(b'n') => plain.push(b'\n'),
            Some(b'r') => plain.push(b'\r'),
            Some(b't') => plain.push(b'\t'),
            Some(b'v') => plain.push(11),
            Some(other) => plain.push(*other),
            None => plain.push(b'\\'),
        }
    }
    plain
}
