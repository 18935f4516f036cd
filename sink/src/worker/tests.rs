use millrace_event::{Version, decode_line};

use super::*;
use crate::progress::CopyState;
use crate::row::LayoutColumn;

const LIMITS: BatchLimits = BatchLimits {
    rows: 10,
    bytes: 1 << 20,
};

fn worker() -> Worker {
    let name = TableName::new("public", "t");
    let rule = TableRule {
        deletes: true,
        truncates: true,
    };
    let copied = CopyState::Copied { lsn: Lsn::ZERO };
    let copies = CopyProgress {
        tables: [(name.clone(), copied)].into(),
        ..CopyProgress::default()
    };
    let rules = [(name.clone(), rule)].into();
    let at = Checkpoint::default();
    let mut worker = Worker::new(LIMITS, rules, at, copies, Duration::ZERO);
    let id = LayoutColumn {
        source: "id".to_owned(),
        target: "id".to_owned(),
        cast: "text".to_owned(),
    };
    worker.set_layout(Arc::new(TableLayout {
        source: name.clone(),
        target: name,
        columns: vec![id],
        key: vec![0],
        shape: "0".to_owned(),
    }));
    worker
}

/// Row `seq` of transaction `transaction`, which has `rows` of them.
fn row(transaction: u64, seq: u32, rows: u32) -> Bytes {
    let version = Version::new(1, Lsn(transaction), seq);
    let id = transaction * 1_000 + u64::from(seq);
    let last = seq == rows;
    format!(
        r#"{{"op":"c","before":null,"after":{{"id":{id}}},"key":{{"id":{id}}},"ts_ms":1,"source":{{"name":"s","db":"d","schema":"public","table":"t","table_version":"0","snapshot":"false","txId":1,"ts_us":1,"version":"{version}","lsn":1,"last":{last}}}}}"#
    )
    .into()
}

/// Hands these transactions to a worker whose stream is never drained, and gives the batches: how many transactions
/// had ended before each, and whether it commits.
fn batches(transactions: u64, rows: u32) -> Vec<(u64, bool)> {
    let (mut worker, mut batches) = (worker(), Vec::new());
    for transaction in 1..=transactions {
        for seq in 1..=rows {
            let payload = row(transaction, seq, rows);
            let event = decode_line(&payload).expect("well formed");
            let changes = Input::Changes {
                stream_seq: transaction,
                payload: &payload,
                events: std::slice::from_ref(&event),
            };
            worker.handle(changes).expect("has its key");
            if let Some(batch) = worker.poll(Duration::ZERO) {
                let ended = if seq == rows {
                    transaction
                } else {
                    transaction - 1
                };
                assert_eq!(batch.commit, seq == rows);
                batches.push((ended, batch.commit));
                worker.handle(Input::Flushed).expect("was in flight");
            }
        }
    }
    batches
}

#[test]
fn the_targets_transaction_ends_though_no_batch_ends_with_one_of_the_source() {
    // Every tenth row ends a batch: the first one that ends a transaction too would be the 1010th.
    let batches = batches(100, 101);
    let commits: Vec<_> = batches.iter().filter(|(_, commits)| *commits).collect();
    assert_eq!(commits.len(), 100);
    // Transactions of two rows: many of them in one of the target's, and not without an end.
    let batches = self::batches(1_000, 3);
    let mut parts = 0;
    for (_, commits) in batches {
        parts = if commits { 0 } else { parts + 1 };
        assert!(parts <= OPEN_PARTS_MAX, "{parts}");
    }
}
