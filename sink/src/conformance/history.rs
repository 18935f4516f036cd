//! Random histories with everything that a source does.

use std::collections::BTreeMap;

use millrace_event::{Lsn, Version};

use super::bench::{Bench, create, key, put, seen, text};
use super::{Rows, Target};
use crate::fold::RowChange;
use crate::row::Cell;
use crate::sink::Sink;

/// A small generator: the suite needs the same histories everywhere, not good randomness.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }
}

/// The source's rows, and every change that it made, in its order.
#[derive(Default)]
struct Source {
    rows: BTreeMap<u64, (Version, u64, u64)>,
    changes: Vec<(Version, RowChange)>,
}

impl Source {
    fn rows(&self) -> Rows {
        let rows = self.rows.iter().map(|(id, (version, n, big))| {
            let big = format!("big{big}");
            seen(*id, version.commit_lsn.0, version.seq, *n, &big)
        });
        rows.collect()
    }
}

/// Any batching of a history, partial rows and key changes included, ends as the source did, whatever of it
/// comes again after a restart.
pub(super) async fn history<T: Target>(target: &T, seed: u64) {
    let mut bench = Bench::new(target, &format!("history_{seed}")).await;
    let mut dice = Dice(seed.wrapping_mul(7_919) + 1);
    let mut source = Source::default();
    for lsn in 1..60 {
        let mut seq = 0;
        for _ in 0..=dice.roll(6) {
            change(&mut bench, &mut dice, &mut source, lsn, &mut seq);
            if dice.roll(5) == 0 {
                bench.apply(false).await;
            }
        }
        if dice.roll(3) == 0 {
            commit(target, &mut bench, &source, seed).await;
            if dice.roll(3) == 0 {
                bench.reopen().await;
                come_again(&mut bench, &mut dice, &source, lsn).await;
                // Else it is committed together with what is new.
                if dice.roll(2) == 0 {
                    commit(target, &mut bench, &source, seed).await;
                }
            }
        }
    }
    commit(target, &mut bench, &source, seed).await;
}

async fn commit<T: Target>(target: &T, bench: &mut Bench<T::Sink>, source: &Source, seed: u64) {
    let applied = bench.apply(true).await;
    assert_eq!(applied.dead(), 0, "seed {seed}: a row was set aside");
    assert_eq!(
        target.rows(&bench.layout).await,
        source.rows(),
        "seed {seed}"
    );
}

/// Everything from one of the source's transactions up to this one comes again.
async fn come_again<S: Sink>(bench: &mut Bench<S>, dice: &mut Dice, source: &Source, lsn: u64) {
    let from = lsn.saturating_sub(dice.roll(12));
    for (version, change) in &source.changes {
        if version.commit_lsn.0 < from {
            continue;
        }
        bench.push(version.commit_lsn.0, version.seq, change.clone());
        if dice.roll(8) == 0 {
            bench.apply(false).await;
        }
    }
}

fn change<S: Sink>(
    bench: &mut Bench<S>,
    dice: &mut Dice,
    source: &mut Source,
    lsn: u64,
    seq: &mut u32,
) {
    let mut push = |seq: u32, change: RowChange| {
        bench.push(lsn, seq, change.clone());
        let version = Version::new(1, Lsn(lsn), seq);
        source.changes.push((version, change));
    };
    let rows = &mut source.rows;
    let id = dice.roll(6);
    let value = lsn * 100 + u64::from(*seq);
    *seq += 1;
    let version = Version::new(1, Lsn(lsn), *seq);
    let big = |value: u64| text(format!("big{value}"));
    let stored = rows.get(&id).copied();
    match (stored, dice.roll(12)) {
        (_, 0) => {
            rows.clear();
            push(*seq, RowChange::Truncate);
        }
        (None, _) => {
            rows.insert(id, (version, value, value));
            push(*seq, create(id, value, big(value)));
        }
        (Some(_), 1..=3) => {
            rows.remove(&id);
            push(*seq, RowChange::Delete(key(id)));
        }
        (Some((_, _, old)), 4..=6) => {
            rows.insert(id, (version, value, old));
            push(*seq, put(id, value, Cell::Missing));
        }
        (Some((_, _, old)), 7..=8) => {
            let to = (0..20).find(|id| !rows.contains_key(id)).unwrap_or(20);
            rows.remove(&id);
            push(*seq, RowChange::Delete(key(id)));
            *seq += 1;
            rows.insert(to, (Version::new(1, Lsn(lsn), *seq), value, old));
            let row = vec![text(to), text(value), Cell::Missing].into();
            push(
                *seq,
                RowChange::Put {
                    created: true,
                    row,
                    old: Some(key(id)),
                },
            );
        }
        (Some(_), _) => {
            rows.insert(id, (version, value, value));
            push(*seq, put(id, value, big(value)));
        }
    }
}
