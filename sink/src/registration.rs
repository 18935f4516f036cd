//! What a sink's tables begin with on the stream that it finds. Pure.

use millrace_config::{Code, Condition};
use millrace_event::TableName;

use crate::progress::{Chunks, Claim, CopyProgress, CopyState};

/// How a sink stands to the stream that it finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// It was never on a stream: it begins behind the newest message.
    New,
    /// It goes on where it was.
    Same,
    /// The stream was begun anew: it begins behind the newest message, and every table is copied again.
    Moved,
}

/// A sink's tables as they shall be stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Registration {
    pub(crate) standing: Standing,
    pub(crate) progress: CopyProgress,
}

/// What is to be stored of a sink that has applied its stream up to `applied`, for the stream that was created
/// at `stream` and whose newest message is `newest`.
///
/// On another stream than before nothing tells what was missed in between: every table is copied again, over its
/// old rows, which makes it exact. A table that was never begun still counts as not ours, so its rows are looked
/// at first.
///
/// # Errors
/// The sink's rows have versions that what the stream brings would not outrank.
pub(crate) fn register<'t>(
    stored: &CopyProgress,
    applied: Claim,
    configured: impl Iterator<Item = &'t TableName> + Clone,
    stream: String,
    newest: Claim,
    now_us: i64,
) -> Result<Registration, Condition> {
    let standing = if stored.stream.is_empty() {
        Standing::New
    } else if stored.stream == stream {
        Standing::Same
    } else {
        Standing::Moved
    };
    let (at, reached) = (applied.position, newest.position);
    let outranked = match standing {
        // A copy's rows may be newer than everything that the stream brought before it was begun anew.
        Standing::Moved => reached >= at.max(stored.copied_to.into()),
        // A stream that lost its tail gets it again; the sink waits.
        Standing::New | Standing::Same => reached >= at || reached.epoch() >= at.epoch(),
    };
    if !outranked {
        let applied = at.max(stored.copied_to.into());
        return Err(Condition::new(
            Code::EpochLower,
            format!("the stream is at {reached}, this sink has applied {applied} of another one"),
            "if this is the stream you want, drop the sink's tables and the schema millrace in its target: \
             they are copied anew; else correct stream.servers or the sink's url",
        ));
    }
    let mut progress = stored.clone();
    progress.stream = stream;
    let mut left = std::mem::take(&mut progress.left);
    progress.tables.retain(|table, state| {
        let stays = configured.clone().any(|name| name == table);
        // Of one that was never begun nothing is here: its rows in the target are somebody else's.
        if !stays && state.is_begun() {
            left.insert(table.clone());
        }
        stays
    });
    if standing == Standing::Moved {
        for state in progress.tables.values_mut() {
            *state = on_another_stream(state, newest, now_us);
        }
    }
    let claim = match standing {
        Standing::New | Standing::Moved => newest,
        Standing::Same => applied,
    };
    for table in configured {
        let new = match left.remove(table) {
            // Nobody followed its changes meanwhile: every row is read again, and what is gone goes here too.
            true => CopyState::Chunks(Chunks::begin(claim.position, None, now_us)),
            false => CopyState::Pending {
                claim,
                began_us: now_us,
            },
        };
        progress.tables.entry(table.clone()).or_insert(new);
    }
    progress.left = left;
    Ok(Registration { standing, progress })
}

fn on_another_stream(state: &CopyState, claim: Claim, now_us: i64) -> CopyState {
    match state {
        CopyState::Pending { .. } => CopyState::Pending {
            claim,
            began_us: now_us,
        },
        CopyState::Loading { .. }
        | CopyState::Loaded { .. }
        | CopyState::Copied { .. }
        | CopyState::Chunks(_) => CopyState::Chunks(Chunks::begin(claim.position, None, now_us)),
        CopyState::Parked { .. } => CopyState::Lapsed { refused_at_us: 0 },
        CopyState::Lapsed { .. } | CopyState::Refused { .. } => state.clone(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use millrace_event::{Lsn, Position, Version};

    use super::*;

    const OLD: &str = "old";

    fn table(name: &str) -> TableName {
        TableName::new("public", name)
    }

    fn at(epoch: u32, lsn: u64) -> Position {
        Position::new(epoch, Lsn(lsn), 0)
    }

    fn claim(position: Position) -> Claim {
        Claim {
            stream_seq: position.commit_lsn().0,
            position,
        }
    }

    fn pending(position: Position) -> CopyState {
        let claim = claim(position);
        CopyState::Pending { claim, began_us: 0 }
    }

    fn stored(states: &[(&str, CopyState)], copied_to: u64) -> CopyProgress {
        let states = states.iter();
        CopyProgress {
            stream: OLD.to_owned(),
            copied_to: Version::new(1, Lsn(copied_to), 0),
            reading: None,
            finished: std::collections::BTreeSet::new(),
            tables: states
                .map(|(name, state)| (table(name), state.clone()))
                .collect(),
            left: std::collections::BTreeSet::new(),
            shapes: BTreeMap::new(),
        }
    }

    fn registered(
        stored: &CopyProgress,
        applied: u64,
        names: &[&str],
        stream: &str,
        newest: Position,
    ) -> Result<Registration, Code> {
        let names: Vec<_> = names.iter().map(|name| table(name)).collect();
        let names = names.iter();
        let (applied, newest) = (claim(at(1, applied)), claim(newest));
        register(stored, applied, names, stream.to_owned(), newest, 0)
            .map_err(|condition| condition.code)
    }

    fn copied(lsn: u64) -> CopyState {
        CopyState::Copied { lsn: Lsn(lsn) }
    }

    #[test]
    fn every_table_of_a_new_sink_waits_for_its_copy() {
        let new = CopyProgress::default();
        let registration = registered(&new, 0, &["a", "b"], "s", at(1, 7)).expect("registered");
        assert_eq!(registration.standing, Standing::New);
        assert_eq!(registration.progress.stream, "s");
        let pending = |name| (table(name), pending(at(1, 7)));
        let expected = BTreeMap::from([pending("a"), pending("b")]);
        assert_eq!(registration.progress.tables, expected);
    }

    #[test]
    fn on_the_same_stream_tables_keep_their_states_come_and_go() {
        let stored = stored(&[("a", copied(5)), ("gone", copied(5))], 50);
        // The stream may end below a copy, and below the sink itself: it gets the rest from the slot.
        for newest in [at(1, 90), at(1, 10), at(1, 3)] {
            let registration =
                registered(&stored, 10, &["a", "new"], OLD, newest).expect("registered");
            assert_eq!(registration.standing, Standing::Same);
            let expected =
                BTreeMap::from([(table("a"), copied(5)), (table("new"), pending(at(1, 10)))]);
            assert_eq!(registration.progress.tables, expected);
        }
    }

    #[test]
    fn a_table_that_comes_back_is_read_again_over_its_old_rows() {
        let begun = stored(
            &[
                ("a", copied(5)),
                ("gone", copied(5)),
                ("never", pending(at(1, 5))),
            ],
            50,
        );
        let without = registered(&begun, 10, &["a"], OLD, at(1, 90)).expect("registered");
        let without = without.progress;
        assert_eq!(
            without.left,
            std::collections::BTreeSet::from([table("gone")])
        );

        let again = registered(&without, 20, &["a", "gone", "never"], OLD, at(1, 90));
        let again = again.expect("registered").progress;
        let chunks = CopyState::Chunks(Chunks::begin(at(1, 20), None, 0));
        let expected = BTreeMap::from([
            (table("a"), copied(5)),
            (table("gone"), chunks),
            (table("never"), pending(at(1, 20))),
        ]);
        assert_eq!((again.tables, again.left.len()), (expected, 0));
        // Behind everything of another stream, where the stream is another one.
        let moved = registered(&without, 20, &["gone"], "other", at(1, 90)).expect("registered");
        let chunks = CopyState::Chunks(Chunks::begin(at(1, 90), None, 0));
        assert_eq!(
            moved.progress.tables,
            BTreeMap::from([(table("gone"), chunks)])
        );
    }

    #[test]
    fn on_another_stream_our_tables_are_copied_again_and_others_stay_unknown() {
        let (lsn, behind) = (Lsn(5), claim(at(1, 6)));
        let parked = CopyState::Parked { lsn, claim: behind };
        let loaded = CopyState::Loaded { lsn, claim: behind };
        let loading = CopyState::Loading {
            lsn: Lsn(8),
            rows: 1,
            claim: behind,
            began_us: 3,
        };
        let lapsed = CopyState::Lapsed { refused_at_us: 4 };
        let stored = stored(
            &[
                ("copied", copied(5)),
                ("loaded", loaded),
                ("loading", loading),
                ("lapsed", lapsed.clone()),
                ("parked", parked),
                ("pending", pending(at(1, 6))),
            ],
            8,
        );
        let names = ["copied", "lapsed", "loaded", "loading", "parked", "pending"];
        let registration = registered(&stored, 7, &names, "other", at(1, 8)).expect("registered");
        assert_eq!(registration.standing, Standing::Moved);
        let again = CopyState::Chunks(Chunks::begin(at(1, 8), None, 0));
        let expected = [
            ("copied", again.clone()),
            ("lapsed", lapsed),
            ("loaded", again.clone()),
            ("loading", again),
            ("parked", CopyState::Lapsed { refused_at_us: 0 }),
            ("pending", pending(at(1, 8))),
        ];
        let expected = expected.map(|(name, state)| (table(name), state));
        assert_eq!(registration.progress.tables, BTreeMap::from(expected));
    }

    #[test]
    fn another_stream_must_outrank_what_was_streamed_and_what_was_copied() {
        let stored = stored(&[("a", copied(50))], 50);
        let moved = |newest| registered(&stored, 10, &["a"], "other", newest).map(|_| ());
        assert_eq!(moved(at(1, 9)), Err(Code::EpochLower));
        assert_eq!(moved(at(1, 49)), Err(Code::EpochLower));
        assert_eq!(moved(at(1, 50)), Ok(()));
        assert_eq!(moved(at(2, 1)), Ok(()));
        // Also of a table that this sink does not have any more.
        let removed = registered(&stored, 10, &["b"], "other", at(1, 49));
        assert_eq!(removed, Err(Code::EpochLower));
    }

    #[test]
    fn an_epoch_never_falls() {
        let stored = stored(&[("a", copied(5))], 5);
        let applied = Position::new(2, Lsn(10), 0);
        let names = [table("a")];
        let (applied, newest) = (claim(applied), claim(at(1, 90)));
        let refused = register(&stored, applied, names.iter(), OLD.to_owned(), newest, 0);
        assert_eq!(
            refused.map_err(|condition| condition.code),
            Err(Code::EpochLower)
        );
    }
}
