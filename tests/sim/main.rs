//! The line in a seeded simulation: the real capture and sink machines between a model source, a model broker
//! and a target in memory, without network, threads or clock.
//!
//! One seed is one history with its faults. `MILLRACE_SIM_SEED=n cargo test --test sim one_seed -- --nocapture`
//! runs one and prints its log.

mod broker;
mod capture;
mod check;
mod copier;
mod reader;
mod replica;
mod source;
mod transaction;
mod visible;
mod wire;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use world::{Counts, Outcome, Sabotage, run};

/// How many histories are run, unless [`COUNT`] says otherwise.
const SEEDS: u64 = 1_000;
/// On so many threads: each runs seeds of its own.
const THREADS: u64 = 2;
/// So many histories with a sabotage are enough.
const SABOTAGES: usize = 20;
/// Runs only this seed.
const SEED: &str = "MILLRACE_SIM_SEED";
/// Runs so many seeds: a search for rare histories.
const COUNT: &str = "MILLRACE_SIM_SEEDS";

fn chosen() -> Option<u64> {
    std::env::var(SEED).ok()?.parse().ok()
}

/// A panic of a machine is a failure like any other.
fn run_caught(seed: u64, sabotage: Sabotage) -> Outcome {
    catch_unwind(AssertUnwindSafe(|| run(seed, sabotage))).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        Outcome {
            log: Vec::new(),
            result: Err(format!("panic: {}", text.unwrap_or_default())),
            sabotaged: sabotage != Sabotage::None,
            counts: Counts::default(),
        }
    })
}

fn report(seed: u64, failure: &str) -> String {
    format!(
        "seed {seed}: {failure}\nrun it again with\n  {SEED}={seed} cargo test --test sim one_seed -- --nocapture"
    )
}

#[test]
fn the_same_seed_gives_the_same_log() {
    for seed in [1, 7, 42, 1_000_003] {
        let (first, second) = (run(seed, Sabotage::None), run(seed, Sabotage::None));
        assert!(first.log.len() > 50, "seed {seed}: something happens");
        assert_eq!(first.log, second.log, "seed {seed}");
        assert_ne!(
            first.log,
            run(seed + 1, Sabotage::None).log,
            "another seed is another history"
        );
    }
}

#[test]
fn one_seed() {
    let seed = chosen().unwrap_or(1);
    let outcome = run(seed, Sabotage::None);
    if chosen().is_some() {
        println!("{}", outcome.log.join("\n"));
    }
    if let Err(failure) = outcome.result {
        panic!("{}", report(seed, &failure));
    }
}

#[test]
fn one_thousand_seeds_end_equal() {
    if chosen().is_some() {
        return;
    }
    let seeds = std::env::var(COUNT)
        .ok()
        .and_then(|count| count.parse().ok());
    let seeds = seeds.unwrap_or(SEEDS);
    let began = Instant::now();
    let next = AtomicU64::new(0);
    let work = || {
        let (mut counts, mut failures) = (Counts::default(), Vec::new());
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds {
                return (counts, failures);
            }
            let outcome = run_caught(seed, Sabotage::None);
            counts.add(outcome.counts);
            if let Err(failure) = outcome.result {
                failures.push((seed, failure));
            }
        }
    };
    let (mut counts, mut failures) = (Counts::default(), Vec::new());
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(work)).collect();
        for thread in threads {
            let (part, failed) = thread.join().expect("failures are values");
            counts.add(part);
            failures.extend(failed);
        }
    });
    failures.sort();
    println!("{seeds} seeds in {:?}: {counts:?}", began.elapsed());
    if let Some((seed, failure)) = failures.first() {
        let seeds: Vec<_> = failures.iter().map(|(seed, _)| *seed).collect();
        for (seed, failure) in &failures {
            println!(
                "{seed} {}",
                failure
                    .chars()
                    .take(100)
                    .collect::<String>()
                    .replace('\n', " ")
            );
        }
        panic!(
            "{} seeds fail: {seeds:?}\n{}",
            seeds.len(),
            report(*seed, failure)
        );
    }
    // A simulation in which nothing goes wrong proves nothing.
    assert!(
        counts.tails_lost > SEEDS / 10 && counts.zombies > SEEDS / 10,
        "{counts:?}"
    );
    assert!(
        counts.deposed > SEEDS / 10 && counts.copies_lost > 0,
        "{counts:?}"
    );
    assert!(
        counts.source_crashes > SEEDS / 10 && counts.resumes_searched > 0,
        "{counts:?}"
    );
    assert!(counts.commits_checked > SEEDS * 5, "{counts:?}");
    assert!(
        counts.chunks > SEEDS && counts.repairs > SEEDS / 10 && counts.loads_cut > SEEDS / 10,
        "{counts:?}"
    );
    assert!(
        counts.chunks_below > 0 && counts.chunks_limbo > 0 && counts.chunks_older > 0,
        "{counts:?}"
    );
    // Deletes are forgotten only where no copy brings what they removed. Where more are forgotten, the target refuses the
    // copies, and nothing else is wrong.
    assert!(counts.copies_too_old * 1_000 <= counts.chunks, "{counts:?}");
    assert!(
        counts.chunks_rewritten > 0 && counts.gaps > 0 && counts.rows_healed > 0,
        "{counts:?}"
    );
}

/// The checker must see this fault. Not every one matters: a message that comes again heals its own loss, a
/// confirmation too early harms only if the broker crashes before it is true, and what is wrong in a table is mended
/// where its rows are still to come.
fn is_noticed(sabotage: Sabotage) {
    let outcomes = (0..120).map(|seed| run_caught(seed, sabotage));
    let sabotaged: Vec<_> = outcomes
        .filter(|outcome| outcome.sabotaged)
        .take(SABOTAGES)
        .collect();
    let noticed = sabotaged
        .iter()
        .filter(|outcome| outcome.result.is_err())
        .count();
    println!("{sabotage:?}: {noticed} of {} noticed", sabotaged.len());
    assert!(
        sabotaged.len() >= SABOTAGES / 2,
        "{sabotage:?} happened {} times",
        sabotaged.len()
    );
    assert!(
        noticed * 5 >= sabotaged.len(),
        "{sabotage:?}: {noticed} of {}",
        sabotaged.len()
    );
}

#[test]
fn a_dropped_message_is_noticed() {
    is_noticed(Sabotage::DropMessage);
}

#[test]
fn two_swapped_messages_are_noticed() {
    is_noticed(Sabotage::SwapMessages);
}

#[test]
fn an_early_confirmation_is_noticed() {
    is_noticed(Sabotage::ConfirmEarly);
}

#[test]
fn a_confirmation_before_the_sync_is_noticed() {
    is_noticed(Sabotage::ConfirmUnsynced);
}

#[test]
fn a_change_past_the_guard_is_noticed() {
    is_noticed(Sabotage::IgnoreGuard);
}

#[test]
fn half_a_transaction_is_noticed() {
    is_noticed(Sabotage::CommitHalf);
}

#[test]
fn a_copy_that_claims_too_much_is_found_out() {
    is_found_out(Sabotage::CopyTooNew);
}

#[test]
fn a_reader_that_skips_a_message_is_noticed() {
    is_noticed(Sabotage::SkipMessage);
}

/// In a whole run, as with [`run`], a rule of the copies is broken. Some history must end wrong; not every one does.
fn is_found_out(sabotage: Sabotage) {
    let found = (0..SEEDS).find_map(|seed| {
        let failure = run_caught(seed, sabotage).result.err()?;
        Some((seed, failure.chars().take(80).collect::<String>()))
    });
    match found {
        Some((seed, failure)) => println!("{sabotage:?}: seed {seed}: {failure}"),
        None => panic!("{sabotage:?} is not noticed"),
    }
}

#[test]
fn the_plain_low_watermark_is_found_out() {
    is_found_out(Sabotage::LowWatermark);
}

#[test]
fn chunks_as_new_as_the_end_of_the_wal_are_found_out() {
    is_found_out(Sabotage::WalAfter);
}

#[test]
fn a_capture_that_starts_anew_without_a_barrier_is_found_out() {
    is_found_out(Sabotage::NoBarrier);
}

#[test]
fn chunks_that_are_too_old_to_repair_are_found_out() {
    is_found_out(Sabotage::NoBegin);
}

#[test]
fn chunks_ahead_of_the_stream_are_found_out() {
    is_found_out(Sabotage::NoReach);
}

#[test]
fn a_sweep_before_the_last_chunk_is_found_out() {
    is_found_out(Sabotage::LastTooSoon);
}

#[test]
fn a_sweep_of_more_than_the_chunks_warrant_is_found_out() {
    is_found_out(Sabotage::SweepMore);
}

#[test]
fn deletes_that_a_chunk_may_meet_are_not_forgotten() {
    is_found_out(Sabotage::ForgetDeletes);
}

#[test]
fn messages_of_a_copy_that_are_not_counted_are_found_out() {
    is_found_out(Sabotage::NoNumbers);
}
