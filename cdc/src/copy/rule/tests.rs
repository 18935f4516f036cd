use super::*;

mod histories;

fn snapshot(text: &str) -> Snapshot {
    text.parse().unwrap_or_else(|error| panic!("{error}"))
}

/// A recorder whose barrier every snapshot has passed.
fn recent(position: u64, commits: &[(u32, u64)]) -> Recent {
    let mut recent = Recent::new(Lsn::ZERO, COMMITS_MAX);
    recent.take_barrier();
    recent.barrier_taken(0);
    for (xid, lsn) in commits {
        recent.committed(*xid, Lsn(*lsn));
    }
    recent.read_to(Lsn(position));
    recent
}

#[test]
fn a_snapshot_is_read_as_postgres_prints_it() {
    let read = snapshot("10:20:14,12,10");
    assert!(read.shows(9) && read.shows(11) && read.shows(19));
    assert!(!read.shows(10) && !read.shows(12) && !read.shows(14) && !read.shows(20));
    let nothing_open = snapshot("7:7:");
    assert!(nothing_open.shows(6) && !nothing_open.shows(7));
    assert!(!snapshot("8589934592:8589934600:8589934592").shows(8_589_934_592));
    for text in [
        "", "1", "1:2", "2:1:", "1:2:3", "5:9:4", "1:2:x", "1:3:2,", "1:3:,2", "a:b:", "-1:2:",
        "1:2::",
    ] {
        assert!(text.parse::<Snapshot>().is_err(), "{text:?}");
    }
}

#[test]
fn an_id_of_the_wal_is_widened_to_the_nearest_one() {
    const TURN: u64 = 1 << 32;
    for (xmax, xid, wide) in [
        (100, 99, 99),
        (100, 105, 105),
        (TURN, u32::MAX, TURN - 1),
        (TURN + 3, u32::MAX, TURN - 1),
        (TURN - 1, 3, TURN + 3),
        (TURN + 3, 3, TURN + 3),
        (7 * TURN + 3, u32::MAX - 9, 7 * TURN - 10),
        (7 * TURN - 5, 2, 7 * TURN + 2),
        (3 * TURN + (1 << 31), 1, 3 * TURN + 1),
        // There is nothing below the first id.
        (100, u32::MAX, 100),
    ] {
        let read = snapshot(&format!("3:{xmax}:"));
        assert_eq!(read.widen(xid), wide, "{xid} at {xmax}");
    }
    let around = snapshot(&format!("{}:{}:{}", TURN - 2, TURN + 9, TURN - 2));
    assert!(!around.shows(around.widen(u32::MAX - 1)) && around.shows(around.widen(u32::MAX)));
    assert!(around.shows(around.widen(8)) && !around.shows(around.widen(9)));
}

#[test]
fn the_version_is_the_position_or_the_first_commit_that_is_not_visible() {
    let (m, begun) = (Lsn(500), Lsn(100));
    let judge = |text: &str, recent: &Recent| version(m, &snapshot(text), recent, begun);
    let all = [(10, 200), (11, 300), (12, 400), (13, 600)];
    assert_eq!(judge("20:20:", &recent(700, &all)), Ok(Lsn(500)));
    assert_eq!(judge("12:20:12", &recent(700, &all)), Ok(Lsn(400)));
    assert_eq!(judge("10:20:10,12", &recent(700, &all)), Ok(Lsn(200)));
    // Behind the position: the position is lower anyway.
    assert_eq!(judge("13:20:13", &recent(700, &all)), Ok(Lsn(500)));
    // Below the begin it would repair nothing.
    let early = [(10, 99)];
    assert_eq!(judge("10:20:10", &recent(700, &early)), Err(Wait::Limbo));
}

#[test]
fn nothing_is_read_before_the_barrier_holds() {
    let judge = |text: &str, recent: &Recent| version(Lsn(9), &snapshot(text), recent, Lsn(1));
    let mut recent = Recent::new(Lsn(5), 3);
    assert_eq!(judge("20:20:", &recent), Err(Wait::Barrier));
    recent.take_barrier();
    assert_eq!(judge("20:20:", &recent), Err(Wait::Barrier));
    recent.barrier_taken(15);
    assert_eq!(judge("15:20:15", &recent), Err(Wait::Older));
    assert_eq!(judge("12:20:12", &recent), Err(Wait::Older));
    assert_eq!(judge("16:20:16", &recent), Ok(Lsn(9)));
    recent.shown(&snapshot("16:20:16"));
    assert_eq!(recent.barrier, Barrier::Passed);
}

#[test]
fn too_many_commits_are_forgotten_and_the_barrier_must_be_taken_anew() {
    let mut recent = Recent::new(Lsn::ZERO, 3);
    recent.take_barrier();
    recent.barrier_taken(1);
    recent.shown(&snapshot("2:2:"));
    for xid in 2..5 {
        recent.committed(xid, Lsn(u64::from(xid) * 10));
    }
    assert_eq!(recent.commits.len(), 3);
    // What a snapshot shows makes room.
    recent.shown(&snapshot("3:5:3"));
    assert_eq!(recent.commits, [(3, Lsn(30))]);
    recent.take_barrier();
    for xid in 5..8 {
        recent.committed(xid, Lsn(u64::from(xid) * 10));
    }
    assert_eq!(recent.commits, [(7, Lsn(70))]);
    // The id was taken before the commits that are forgotten now.
    recent.barrier_taken(5);
    let judged = version(Lsn(80), &snapshot("9:9:"), &recent, Lsn(1));
    assert_eq!(judged, Err(Wait::Barrier));
}
