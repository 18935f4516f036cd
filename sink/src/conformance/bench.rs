//! What a scenario works with: a sink and a table of its own, and the changes that it applies.

use std::sync::Arc;

use bytes::Bytes;
use millrace_event::{Lsn, Position, Version};

use super::{Target, schema, settings};
use crate::batch::{Batch, Checkpoint, PositionRow};
use crate::fold::{Fold, RowChange};
use crate::row::{Cell, Row, TableLayout};
use crate::sink::{Applied, Elected, Sink};

/// A sink of one scenario, with its table, and what is collected for its next batch.
pub(super) struct Bench<S> {
    pub(super) sink: S,
    pub(super) layout: Arc<TableLayout>,
    pub(super) at: Checkpoint,
    pub(super) fold: Fold,
}

impl<S: Sink> Bench<S> {
    pub(super) async fn new<T: Target<Sink = S>>(target: &T, name: &str) -> Self {
        let mut sink = target.sink(name);
        let Elected::Yes(position) = sink.open().await.expect("opens") else {
            panic!("a sink of its own is elected");
        };
        let schema = schema(name);
        let ensured = sink
            .ensure_table(&schema, None, &settings(&schema.name))
            .await
            .expect("ensures");
        assert!(ensured.created, "the table is new");
        Self {
            sink,
            layout: ensured.layout,
            at: position.checkpoint,
            fold: Fold::new(),
        }
    }

    /// Begins anew where the target stands, as after a restart.
    pub(super) async fn reopen(&mut self) {
        let position = elected(&mut self.sink).await;
        assert_eq!(position.checkpoint, self.at);
    }

    pub(super) fn push(&mut self, lsn: u64, seq: u32, change: RowChange) {
        let version = Version::new(1, Lsn(lsn), seq);
        self.fold
            .change(&self.layout, version, change)
            .expect("has its key");
    }

    pub(super) async fn incomplete(&mut self, after: &str, max: usize) -> Vec<String> {
        let found = self.sink.incomplete(&self.layout.target, after, max).await;
        found.expect("finds")
    }

    pub(super) fn batch(&mut self, commit: bool) -> Batch {
        let to = Checkpoint {
            stream_seq: self.at.stream_seq + 1,
            position: Position::new(1, Lsn(self.at.stream_seq + 1), 0),
            source_ts_us: 1_700_000_000_123_456,
        };
        let steps = if commit {
            self.fold.finish()
        } else {
            self.fold.cut()
        };
        let batch = Batch {
            from: self.at,
            to,
            copy: None,
            steps,
            commit,
        };
        self.at = to;
        batch
    }

    pub(super) async fn apply(&mut self, commit: bool) -> Applied {
        let batch = self.batch(commit);
        self.sink
            .apply(&batch)
            .await
            .unwrap_or_else(|error| panic!("applies: {error:?}"))
    }
}

pub(super) fn text(value: impl ToString) -> Cell {
    Cell::Text(Bytes::from(value.to_string()))
}

pub(super) fn put(id: u64, n: impl ToString, big: Cell) -> RowChange {
    RowChange::Put {
        created: false,
        row: vec![text(id), text(n), big].into(),
        old: None,
    }
}

/// A row that the source made just now.
pub(super) fn create(id: u64, n: impl ToString, big: Cell) -> RowChange {
    RowChange::Put {
        created: true,
        row: vec![text(id), text(n), big].into(),
        old: None,
    }
}

pub(super) fn key(id: u64) -> Row {
    vec![text(id), Cell::Missing, Cell::Missing].into()
}

pub(super) fn seen(
    id: u64,
    lsn: u64,
    seq: u32,
    n: u64,
    big: &str,
) -> (String, (Version, Vec<Option<String>>)) {
    let row = vec![
        Some(id.to_string()),
        Some(n.to_string()),
        Some(big.to_owned()),
    ];
    (id.to_string(), (Version::new(1, Lsn(lsn), seq), row))
}

/// Opens a sink that was elected before. The target may take a moment to notice that the last connection is gone.
pub async fn elected<S: Sink>(sink: &mut S) -> PositionRow {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    loop {
        if let Elected::Yes(position) = sink.open().await.expect("opens again") {
            return position;
        }
        assert!(
            std::time::Instant::now() < deadline,
            "the same sink is elected again"
        );
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}
