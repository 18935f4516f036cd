//! What a sink's tables begin with on the stream that it finds. Pure.

use millrace_config::{Code, Condition};
use millrace_event::{Position, TableName};

use crate::batch::{CopyProgress, CopyState};

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
/// at `stream` and whose newest message is at `newest`.
///
/// On another stream than before nothing tells what was missed in between: every table is copied again, which
/// makes it exact. A table that was never begun still counts as not ours, so its rows are looked at first.
///
/// # Errors
/// The sink's rows have versions that what the stream brings would not outrank.
pub(crate) fn register<'t>(
    stored: &CopyProgress,
    applied: Position,
    configured: impl Iterator<Item = &'t TableName> + Clone,
    stream: String,
    newest: Position,
) -> Result<Registration, Condition> {
    let standing = if stored.stream.is_empty() {
        Standing::New
    } else if stored.stream == stream {
        Standing::Same
    } else {
        Standing::Moved
    };
    let outranked = match standing {
        // A copy's rows may be newer than everything that the stream brought before it was begun anew.
        Standing::Moved => newest >= applied.max(stored.copied_to.into()),
        // A stream that lost its tail gets it again; the sink waits.
        Standing::New | Standing::Same => newest >= applied || newest.epoch() >= applied.epoch(),
    };
    if !outranked {
        let applied = applied.max(stored.copied_to.into());
        return Err(Condition::new(
            Code::EpochLower,
            format!("the stream is at {newest}, this sink has applied {applied} of another one"),
            "if this is the stream you want, drop the sink's tables and the schema millrace in its target: \
             they are copied anew; else correct stream.servers or the sink's url",
        ));
    }
    let mut progress = stored.clone();
    progress.stream = stream;
    progress
        .tables
        .retain(|table, _| configured.clone().any(|name| name == table));
    if standing == Standing::Moved {
        for state in progress.tables.values_mut() {
            *state = on_another_stream(state);
        }
    }
    for table in configured {
        let state = progress.tables.entry(table.clone());
        state.or_insert(CopyState::Pending);
    }
    Ok(Registration { standing, progress })
}

fn on_another_stream(state: &CopyState) -> CopyState {
    match state {
        CopyState::Pending => CopyState::Pending,
        CopyState::Copying { .. } | CopyState::Copied { .. } => CopyState::again(),
        CopyState::Parked { .. } => CopyState::Lapsed { refused_at_us: 0 },
        CopyState::Lapsed { .. } => state.clone(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use millrace_event::{Lsn, Version};

    use super::*;

    const OLD: &str = "old";

    fn table(name: &str) -> TableName {
        TableName::new("public", name)
    }

    fn at(epoch: u32, lsn: u64) -> Position {
        Position::new(epoch, Lsn(lsn), 0)
    }

    fn stored(states: &[(&str, CopyState)], copied_to: u64) -> CopyProgress {
        let states = states.iter();
        CopyProgress {
            stream: OLD.to_owned(),
            copied_to: Version::new(1, Lsn(copied_to), 0),
            tables: states
                .map(|(name, state)| (table(name), state.clone()))
                .collect(),
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
        register(stored, at(1, applied), names, stream.to_owned(), newest)
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
        let pending = |name| (table(name), CopyState::Pending);
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
                BTreeMap::from([(table("a"), copied(5)), (table("new"), CopyState::Pending)]);
            assert_eq!(registration.progress.tables, expected);
        }
    }

    #[test]
    fn on_another_stream_our_tables_are_copied_again_and_others_stay_unknown() {
        let parked = CopyState::Parked {
            lsn: Lsn(5),
            stream_seq: 3,
            position: at(1, 6),
        };
        let copying = CopyState::Copying {
            request: "r".to_owned(),
            attempt: 1,
            number: 9,
            lsn: Lsn(8),
        };
        let lapsed = CopyState::Lapsed { refused_at_us: 4 };
        let stored = stored(
            &[
                ("copied", copied(5)),
                ("copying", copying),
                ("lapsed", lapsed.clone()),
                ("parked", parked),
                ("pending", CopyState::Pending),
            ],
            8,
        );
        let names = ["copied", "copying", "lapsed", "parked", "pending"];
        let registration = registered(&stored, 7, &names, "other", at(1, 8)).expect("registered");
        assert_eq!(registration.standing, Standing::Moved);
        let expected = [
            ("copied", CopyState::again()),
            ("copying", CopyState::again()),
            ("lapsed", lapsed),
            ("parked", CopyState::Lapsed { refused_at_us: 0 }),
            ("pending", CopyState::Pending),
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
        let refused = register(&stored, applied, names.iter(), OLD.to_owned(), at(1, 90));
        assert_eq!(
            refused.map_err(|condition| condition.code),
            Err(Code::EpochLower)
        );
    }
}
