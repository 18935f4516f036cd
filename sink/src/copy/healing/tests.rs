use super::*;

const MAX_PAYLOAD: usize = 1024 * 1024;

fn room() -> Room {
    Room::beside(&Vec::new(), MAX_PAYLOAD)
}

fn found<T: AsRef<str>>(keys: &[T]) -> Vec<FoundKey> {
    let keys = keys.iter().map(|key| key.as_ref().to_owned());
    keys.map(|key| (key.clone(), Some(vec![key]))).collect()
}

fn keys((picked, _): (Picked, Option<TooLong>)) -> Vec<String> {
    match picked {
        Picked::Keys(keys) => keys.into_iter().flatten().collect(),
        Picked::Squeezed => panic!("no room"),
    }
}

#[test]
fn a_row_is_asked_for_again_ever_more_rarely() {
    let (mut healing, table) = (Healing::default(), TableName::new("public", "t"));
    let begin = Instant::now();
    let mut asked = Vec::new();
    for second in 0..400 {
        let now = begin + Duration::from_secs(second);
        healing.forget_old(now);
        if !keys(healing.pick(&table, &found(&["1"]), room(), now)).is_empty() {
            asked.push(second);
        }
    }
    assert_eq!(asked, [0, 1, 3, 7, 15, 31, 63, 123, 183, 243, 303, 363]);
}

#[test]
fn every_row_has_its_turn_also_behind_those_that_stay() {
    let (mut healing, table) = (Healing::default(), TableName::new("public", "t"));
    let all: Vec<String> = (0..ROWS_MAX).map(|key| format!("{key:04}")).collect();
    let now = Instant::now();
    assert_eq!(healing.place(&table), "");
    healing.pick(&table, &found(&all), room(), now);
    assert_eq!(healing.place(&table), "0499");
    healing.pick(&table, &found(&all[..7]), room(), now);
    assert_eq!(healing.place(&table), "");
    // A key that the table does not have any more is passed by.
    let mut foreign = found(&all);
    foreign.iter_mut().for_each(|(_, texts)| *texts = None);
    assert!(keys(healing.pick(&table, &foreign, room(), now)).is_empty());
    assert_eq!(healing.place(&table), "0499");
}

#[test]
fn long_keys_are_asked_for_in_turns() {
    let mut healing = Healing::default();
    let table = TableName::new("public", "a");
    let now = Instant::now();
    let all = ["1", "2", "3"].map(|key| key.repeat(20 * 1024)).to_vec();
    let picked = keys(healing.pick(&table, &found(&all), room(), now));
    assert_eq!(picked, all[..2]);
    assert_eq!(healing.place(&table), all[1]);
    let picked = keys(healing.pick(&table, &found(&all[2..]), room(), now));
    assert_eq!(picked, all[2..]);
    assert_eq!(healing.place(&table), "");
    // What no request holds keeps nothing else back.
    let long = ["4".repeat(REQUEST_BYTES_MAX), "5".to_owned()];
    let picked = keys(healing.pick(&table, &found(&long), room(), now));
    assert_eq!(picked, long[1..]);
    // What is not due needs no room.
    let full = Room {
        taken: room().whole,
        ..room()
    };
    assert!(keys(healing.pick(&table, &found(&all), full, now)).is_empty());
    let (due, _) = healing.pick(&table, &found(&["6"]), full, now);
    assert_eq!(due, Picked::Squeezed);
}

#[test]
fn keys_that_stay_asked_for_take_their_room() {
    let table = TableName::new("public", "t");
    let wide = room().wide();
    assert_eq!(room().share(&table), wide / 2);
    let debts = vec![(table.clone(), vec![vec!["x".repeat(995)]; 20])];
    let beside = room().again(&debts);
    let taken = 20_000 + table_bytes(&table);
    assert_eq!(beside.taken, taken);
    assert_eq!(beside.share(&table), (wide - taken) / 2);
    let left = room().whole - taken - table_bytes(&table);
    assert_eq!(beside.left(&table), left);
    assert!(beside.is_joined());
    let full = vec![(table.clone(), vec![vec!["x".repeat(REQUEST_BYTES_MAX)]])];
    let full = room().again(&full);
    assert_eq!((full.share(&table), full.left(&table)), (0, 0));
    assert!(!full.is_joined());
}

#[test]
fn a_request_never_has_more_bytes_than_its_room() {
    use millrace_event::BinaryType;
    use millrace_event::work::{CopyRequest, TableRequest, Wanted};
    let now = Instant::now();
    for max_payload in [64 * 1024, MAX_PAYLOAD, 64 * MAX_PAYLOAD] {
        // Short columns, and such as have to be escaped.
        for column in ["1", "", "\"\\", "\u{1}", "plain"] {
            let mut healing = Healing::default();
            let (mut room, mut debts) = (Room::beside(&Vec::new(), max_payload), Vec::new());
            let key = |row: usize| vec![row.to_string(), column.into(), column.into()];
            let found = (0..ROWS_MAX).map(|row| (row.to_string(), Some(key(row))));
            let found: Vec<_> = found.collect();
            for table in 0.. {
                let table = TableName::new("public", format!("t{table}"));
                let (Picked::Keys(keys), _) = healing.pick(&table, &found, room, now) else {
                    break;
                };
                room.take(&table, &keys);
                debts.push((table, keys));
            }
            let tables = debts.into_iter().map(|(table, keys)| TableRequest {
                table,
                began_us: 0,
                rows: Wanted::Keys { keys },
            });
            let request = CopyRequest {
                id: "0123456789abcdef".into(),
                tables: tables.collect(),
                binary: BinaryType::TYPE_OIDS.to_vec(),
            };
            let bytes = json_bytes(&request);
            assert!(bytes < max_payload.min(REQUEST_BYTES_MAX * 3) / 3 + 64);
            assert!(bytes > room.whole * 4 / 5, "{bytes} of {}", room.whole);
        }
    }
}

#[test]
fn more_rows_than_are_remembered_one_by_one_are_asked_for_in_rounds() {
    let (mut healing, begin) = (Healing::default(), Instant::now());
    let [few, many] = ["few", "many"].map(|name| TableName::new("public", name));
    let mut all: Vec<_> = (0..12_000).map(|row| format!("{row:05}")).collect();
    let (mut asked, mut news) = (HashMap::new(), 0);
    for second in 0..3_600 {
        let now = begin + Duration::from_secs(second);
        healing.forget_old(now);
        if second == 1_000 {
            all.extend((0..100).map(|row| format!("new {row:03}")));
        }
        for (table, rows) in [(&few, &all[..9]), (&many, &all[..])] {
            let place = healing.place(table).to_owned();
            let here = &rows[rows.partition_point(|key| *key <= place)..];
            let here = &here[..here.len().min(ROWS_MAX)];
            let picked = keys(healing.pick(table, &found(here), room(), now));
            *asked.entry(table.clone()).or_insert(0) += picked.len();
            // Among them there are new ones, which wait for nothing but their turn.
            if (1_000..1_030).contains(&second) {
                news += picked.iter().filter(|key| key.starts_with("new")).count();
            }
        }
    }
    // Those of the small table are asked for as always.
    assert_eq!(asked[&few], 9 * 65);
    let times = asked[&many] / all.len();
    assert!((3..8).contains(&times), "each was asked for {times} times");
    assert!(news > 80, "{news} of 100");
    let remembered = healing.asked.values().map(Remembered::rows);
    assert!(remembered.sum::<usize>() <= ASKED_MAX);
}

#[test]
fn a_table_whose_many_rows_are_healed_remembers_the_last_ones_one_by_one() {
    let (mut healing, table) = (Healing::default(), TableName::new("public", "t"));
    let all: Vec<_> = (0..9_000).map(|row| format!("{row:05}")).collect();
    let begin = Instant::now();
    let mut healed = std::collections::HashSet::new();
    let (mut asked, mut rounds) = (Vec::new(), 0);
    for second in 0..120 {
        let now = begin + Duration::from_secs(second);
        healing.forget_old(now);
        rounds += u32::from(matches!(
            healing.asked.get(&table),
            Some(Remembered::Crowd(_))
        ));
        let place = healing.place(&table).to_owned();
        let here = all
            .iter()
            .filter(|key| **key > place && !healed.contains(*key));
        let here: Vec<_> = here.take(ROWS_MAX).collect();
        let picked = keys(healing.pick(&table, &found(&here), room(), now));
        if picked.contains(&all[77]) {
            asked.push(second);
        }
        // One of them is changed again and again.
        healed.extend(picked.into_iter().filter(|key| *key != all[77]));
    }
    assert_eq!(healed.len(), all.len() - 1);
    assert!(rounds > 0);
    // In the round, then soon behind it, and so on.
    assert_eq!(asked[0], 0);
    assert!(asked[1] < 30 && asked.len() > 5, "{asked:?}");
    assert!(matches!(healing.asked[&table], Remembered::Each(_)));
}

/// Looks at 100,000 incomplete rows once a second, for so many seconds at most. Returns how many were asked for, and when
/// none was left.
fn look_at_many(seconds: u64, are_healed: bool) -> (usize, Option<u64>) {
    use std::ops::Bound::{Excluded, Unbounded};
    let (mut healing, table) = (Healing::default(), TableName::new("public", "t"));
    let all = (0..100_000).map(|row| format!("{row:05}"));
    let mut all: std::collections::BTreeSet<_> = all.collect();
    let (begin, mut asked) = (Instant::now(), 0);
    for second in 0..seconds {
        let now = begin + Duration::from_secs(second);
        healing.forget_old(now);
        let behind = healing.place(&table).to_owned();
        let here = all.range::<String, _>((Excluded(&behind), Unbounded));
        let here: Vec<_> = here.take(ROWS_MAX).collect();
        let picked = keys(healing.pick(&table, &found(&here), room(), now));
        asked += picked.len();
        if are_healed {
            picked.iter().for_each(|key| assert!(all.remove(key)));
        }
        if all.is_empty() {
            return (asked, Some(second));
        }
    }
    (asked, None)
}

#[test]
fn many_rows_that_heal_are_through_in_little_more_than_one_pass() {
    let (asked, through) = look_at_many(1_000, true);
    assert_eq!(asked, 100_000);
    // One pass has 200 looks.
    let through = through.expect("all are healed");
    assert!(through < 260, "{through} s");
}

#[test]
fn many_rows_that_nothing_heals_are_asked_for_at_a_bounded_rate() {
    let (asked, _) = look_at_many(5_000, false);
    // The first time without a wait.
    let times = asked as f64 / 100_000.0;
    assert!(1.9 < times && times < 1.0 + 2.5, "{times}");
}

#[test]
fn rows_whose_keys_no_request_holds_are_told_once_a_table_was_gone_through() {
    let (mut healing, table) = (Healing::default(), TableName::new("public", "t"));
    let now = Instant::now();
    let long = |row: usize| format!("{row:04}{}", "x".repeat(REQUEST_BYTES_MAX + row));
    let mut pick = |all: &[String]| healing.pick(&table, &found(all), room(), now).1;
    let mut all: Vec<_> = (0..ROWS_MAX).map(|row| format!("{row:04}")).collect();
    (all[1], all[7]) = (long(1), long(7));
    assert_eq!(pick(&all), None);
    let too_long = pick(&[long(9_001)]).expect("is through");
    let shortest = long(1).len();
    assert_eq!(too_long, TooLong { rows: 3, shortest });
    let target = TableName::new("copies", "t'");
    let condition = too_long.condition(&table, &target).expect("there are some");
    assert_eq!(condition.code, Code::KeyTooLong);
    let begin = "3 incomplete rows of table public.t cannot be read again";
    assert!(
        condition.message.starts_with(begin),
        "{}",
        condition.message
    );
    let sql = format!(
        "relation = 'copies.t''' AND resolved_at IS NULL AND octet_length(key) >= {shortest};"
    );
    assert!(condition.remedy.contains(&sql), "{}", condition.remedy);
    // Once they are healed nothing is left to tell.
    let none = pick(&all[2..4]).expect("is through");
    assert_eq!(none.condition(&table, &target), None);
}
