//! Random histories with everything that a source does.

use std::collections::BTreeMap;

use millrace_event::{Lsn, Version};

use super::{Bench, Rows, Target, key, put, seen, text};
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

/// Any batching of a history, partial rows and key changes included, ends as the source did.
pub(super) async fn history<T: Target>(target: &T, seed: u64) {
    let mut bench = Bench::new(target, &format!("history_{seed}")).await;
    let mut dice = Dice(seed.wrapping_mul(7_919) + 1);
    let mut source: BTreeMap<u64, (Version, u64, u64)> = BTreeMap::new();
    for lsn in 1..60 {
        let mut seq = 0;
        for _ in 0..=dice.roll(6) {
            change(&mut bench, &mut dice, &mut source, lsn, &mut seq);
            if dice.roll(5) == 0 {
                bench.apply(false).await;
            }
        }
        if dice.roll(3) == 0 {
            let applied = bench.apply(true).await;
            assert_eq!(applied.dead(), 0, "seed {seed}: a row was set aside");
            let rows = source.iter().map(|(id, (version, n, big))| {
                seen(
                    *id,
                    version.commit_lsn.0,
                    version.seq,
                    *n,
                    &format!("big{big}"),
                )
            });
            let rows: Rows = rows.collect();
            assert_eq!(
                target.rows(&bench.layout).await,
                rows,
                "seed {seed} after {lsn}"
            );
        }
    }
}

fn change<S: Sink>(
    bench: &mut Bench<S>,
    dice: &mut Dice,
    source: &mut BTreeMap<u64, (Version, u64, u64)>,
    lsn: u64,
    seq: &mut u32,
) {
    let id = dice.roll(6);
    let value = lsn * 100 + u64::from(*seq);
    *seq += 1;
    let version = Version::new(1, Lsn(lsn), *seq);
    let big = |value: u64| text(format!("big{value}"));
    let stored = source.get(&id).copied();
    match (stored, dice.roll(12)) {
        (_, 0) => {
            source.clear();
            bench.push(lsn, *seq, RowChange::Truncate);
        }
        (None, _) => {
            source.insert(id, (version, value, value));
            bench.push(lsn, *seq, put(id, value, big(value)));
        }
        (Some(_), 1..=3) => {
            source.remove(&id);
            bench.push(lsn, *seq, RowChange::Delete(key(id)));
        }
        (Some((_, _, old)), 4..=6) => {
            source.insert(id, (version, value, old));
            bench.push(lsn, *seq, put(id, value, Cell::Missing));
        }
        (Some((_, _, old)), 7..=8) => {
            let to = (0..20).find(|id| !source.contains_key(id)).unwrap_or(20);
            source.remove(&id);
            bench.push(lsn, *seq, RowChange::Delete(key(id)));
            *seq += 1;
            source.insert(to, (Version::new(1, Lsn(lsn), *seq), value, old));
            let row = vec![text(to), text(value), Cell::Missing].into();
            bench.push(
                lsn,
                *seq,
                RowChange::Put {
                    row,
                    old: Some(key(id)),
                },
            );
        }
        (Some(_), _) => {
            source.insert(id, (version, value, value));
            bench.push(lsn, *seq, put(id, value, big(value)));
        }
    }
}
