//! Capture's side of a backfill: which rows come in chunks, with which versions, whatever happens at the source.
//! The requests are written here, and the copy stream is read here.

mod formats;
mod loads;
mod stand;
mod waits;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use millrace_event::Lsn;
use millrace_event::work::{Copied, CopyStatus, Part, Wanted};

use self::stand::{Line, Message, chunks, filled, ids, parts, rows, slowly, version_of};
pub(crate) use self::waits::{in_limbo, release};
use crate::copy_faults::{held, small_copy_stream};
use crate::stage::{PATIENCE, Setting, Stage};

#[tokio::test]
async fn chunks_cover_a_table_while_it_changes() {
    let line = filled(20_000).await;
    line.ask("r1", &[("t", chunks())]).await;
    let deadline = Instant::now() + PATIENCE;
    let mut n = 0;
    loop {
        n += 1;
        let sql = format!(
            "UPDATE t SET v = 'changed {n}' WHERE id = {}; DELETE FROM t WHERE id = {};
             INSERT INTO t VALUES ({}, 'new {n}'); UPDATE t SET id = -id WHERE id = {}",
            n * 7919 % 20_000,
            n * 104_729 % 20_000,
            30_000 + n,
            n * 31 % 20_000 + 1
        );
        line.stage.sql(&sql).await;
        let entry = line.copies.get("status.replica").await.expect("status");
        let status = entry.map(|entry| serde_json::from_slice::<CopyStatus>(&entry));
        if status.is_some_and(|status| status.expect("a status").copied.len() == 1) {
            break;
        }
        assert!(Instant::now() < deadline, "{}", line.capture.logs());
    }
    let status = line.copied("r1", 1).await;
    assert_eq!(status.estimates[0].1, 20_000);
    assert_eq!((status.cut.len(), status.loading), (0, None));
    let messages = line.copy_stream().await;
    let whole = parts(&messages);
    assert!(whole.len() > 3, "{} chunks", whole.len());
    let counted: u64 = whole.iter().map(|part| part.rows).sum();
    assert_eq!(counted as usize, ids(&messages).len());
    let last = |part: &&Copied| matches!(part.part, Part::Chunk { last: true, .. });
    assert_eq!(whole.iter().position(last), Some(whole.len() - 1));
    let begun = whole[0].lsn;
    assert!(whole.iter().all(|part| part.lsn == begun));
    assert!(ids(&messages).is_sorted_by(|one, next| one < next));
    for message in &messages {
        if let Message::Rows { reach, rows, .. } = message {
            let reach = reach.expect("a chunk has a reach");
            for row in rows {
                assert!(
                    (begun..reach).contains(&version_of(row)),
                    "{row} {begun} {reach}"
                );
                assert_eq!(
                    (row["op"].as_str(), row["source"]["seq"].as_u64()),
                    (Some("r"), Some(0))
                );
            }
        }
    }
    assert_eq!(line.replica().await, line.source().await);
}

#[tokio::test]
async fn keys_of_many_columns_and_any_text_are_followed() {
    let line = Line::start(Setting {
        schema: "CREATE TYPE size AS ENUM ('small', 'large', 'huge');
                 CREATE TABLE k (v text, s size, name text COLLATE \"C\", n numeric(8, 2), c char(3),
                                 PRIMARY KEY (s, name, n, c))",
        tables: &[("public.k", "")],
        ..Setting::default()
    })
    .await;
    line.stage
        .sql(
            "INSERT INTO k SELECT 'v', (ARRAY['huge', 'small', 'large'])[i % 3 + 1]::size,
             (ARRAY['', 'it''s', 'back\\slash', 'tab' || chr(9), 'Ä', 'NULL', '\\N'])[i % 7 + 1], i / 100.0, 'x'
             FROM generate_series(1, 3000) i",
        )
        .await;
    line.ask("r1", &[("k", chunks())]).await;
    line.copied("r1", 1).await;
    let messages = line.copy_stream().await;
    assert!(parts(&messages).len() > 2);
    let mut keys: Vec<String> = rows(&messages, "k")
        .iter()
        .map(|row| row["key"].to_string())
        .collect();
    keys.sort();
    keys.dedup();
    assert_eq!((keys.len(), rows(&messages, "k").len()), (3_000, 3_000));
}

#[tokio::test]
async fn a_source_that_takes_no_heartbeat_and_a_table_that_may_not_be_read_are_named() {
    let mut stage = Stage::set(Setting {
        schema: "CREATE TABLE closed (id int PRIMARY KEY, v text); CREATE TABLE t (id int PRIMARY KEY, v text);
                 INSERT INTO t SELECT i, 'row ' || i FROM generate_series(1, 100) i;
                 CREATE PUBLICATION millrace_shop FOR TABLE closed, t WITH (publish_via_partition_root = true);
                 CREATE ROLE capturer LOGIN REPLICATION PASSWORD 'capturing';
                 GRANT SELECT ON closed, t TO capturer;
                 CREATE FUNCTION emit(what text) RETURNS void LANGUAGE plpgsql AS $$ DECLARE f regprocedure; BEGIN
                 FOR f IN SELECT oid FROM pg_proc WHERE proname = 'pg_logical_emit_message' LOOP
                 EXECUTE format(what, f); END LOOP; END $$",
        tables: &[("public.closed", ""), ("public.t", "")],
        ..Setting::default()
    })
    .await;
    stage
        .sql("SELECT emit('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC')")
        .await;
    let source = format!(
        "postgres://capturer:capturing@127.0.0.1:{}/source",
        stage.postgres.port()
    );
    let config = stage.config(&source, &stage.postgres.url("target"), &stage.nats.url());
    stage.folder = config.write().expect("folder");
    let line = Line::on(stage).await;
    line.stage
        .sql("REVOKE SELECT ON closed FROM capturer")
        .await;
    line.ask("r1", &[("closed", chunks()), ("t", chunks())])
        .await;
    let tells = |status: &CopyStatus, table: &str, code: &str| {
        let mut told = status.troubles.iter();
        told.any(|(name, text)| name.table == table && text.starts_with(code))
    };
    line.told("r1", |status| tells(status, "t", "E1125")).await;
    line.stage
        .sql("SELECT emit('GRANT EXECUTE ON FUNCTION %s TO capturer')")
        .await;
    line.told("r1", |status| tells(status, "closed", "E1116"))
        .await;
    line.copied("r1", 1).await;
    line.stage.sql("GRANT SELECT ON closed TO capturer").await;
    let status = line.copied("r1", 2).await;
    assert!(status.troubles.is_empty(), "{status:?}");
    assert_eq!(ids(&line.copy_stream().await).len(), 100);
}

#[tokio::test]
async fn a_column_of_another_type_is_noticed_between_chunks() {
    let line = filled(2_000).await;
    line.ask("r1", &[("t", slowly(Some(1_000)))]).await;
    line.parts(1).await;
    line.stage
        .sql("ALTER TABLE t ADD COLUMN more int DEFAULT 5")
        .await;
    line.copied("r1", 1).await;
    let messages = line.copy_stream().await;
    let with = rows(&messages, "t");
    let with = with.iter().filter(|row| row["after"]["more"] == 5).count();
    assert!(with > 0 && with < ids(&messages).len());
}

#[tokio::test]
async fn a_backfill_goes_on_behind_what_the_sink_has_applied() {
    let mut line = filled(2_000).await;
    line.ask("r1", &[("t", slowly(Some(500)))]).await;
    let messages = line.parts(4).await;
    let applied = parts(&messages)[1].clone();
    let Part::Chunk {
        after: Some(after), ..
    } = &applied.part
    else {
        panic!("{applied:?}");
    };
    line.applied("r1", &[("t", after)]).await;
    line.capture.kill9();
    let line = Line::on(line.stage).await;
    line.copied("r1", 1).await;
    let messages = line.copy_stream().await;
    let mut attempts: BTreeMap<String, Vec<i64>> = BTreeMap::new();
    for message in &messages {
        if let Message::Rows { attempt, rows, .. } = message {
            let ids = rows
                .iter()
                .map(|row| row["after"]["id"].as_i64().expect("an id"));
            attempts.entry(attempt.clone()).or_default().extend(ids);
        }
    }
    assert_eq!(attempts.len(), 2);
    // Their numbers rise.
    let (_, again) = attempts.pop_last().expect("a second attempt");
    let first: i64 = after[0].parse().expect("a number");
    assert_eq!(again, (first + 1..=2_000).collect::<Vec<i64>>());
    assert_eq!(line.replica().await, line.source().await);
}

#[tokio::test]
async fn a_condition_and_keys_select_rows_and_a_wrong_one_holds_nothing_else_up() {
    let line = Line::start(Setting::two_tables()).await;
    line.stage
        .sql(
            "INSERT INTO t SELECT i, 'row ' || i FROM generate_series(1, 3000) i;
             INSERT INTO u SELECT i, 'row ' || i FROM generate_series(1, 100) i",
        )
        .await;
    let keys = ["7", "2999", "5000"].map(|id| vec![id.to_owned()]);
    line.ask(
        "r1",
        &[(
            "t",
            Wanted::Keys {
                keys: keys.to_vec(),
            },
        )],
    )
    .await;
    line.copied("r1", 1).await;
    let messages = line.copy_stream().await;
    assert_eq!(ids(&messages), [7, 2999]);
    assert_eq!(parts(&messages)[0].part, Part::Keys);

    let part = |filter: &str, after: Option<&str>| Wanted::Chunks {
        after: after.map(|id| vec![id.to_owned()]),
        filter: Some(filter.to_owned()),
        rows_per_second: None,
        paused: false,
    };
    line.ask("r2", &[("t", part("id % 2 = 0 -- even", Some("10")))])
        .await;
    line.copied("r2", 1).await;
    let even = ids(&line.copy_stream().await).split_off(2);
    assert_eq!(even, (6..=1_500).map(|n| n * 2).collect::<Vec<i64>>());

    line.ask("r3", &[("t", part("nonsense > 1", None)), ("u", chunks())])
        .await;
    let status = line.copied("r3", 1).await;
    assert_eq!(status.copied[0].table, "u");
    let status = line.told("r3", |status| !status.troubles.is_empty()).await;
    let (table, told) = &status.troubles[0];
    assert!(table.table == "t" && told.contains("E1124"), "{told}");
    assert!(told.contains("nonsense"), "{told}");
    assert!(
        !line.capture.logs().contains("trying again\""),
        "capture goes on"
    );
}

/// A crash of the source may take back what a snapshot shows, as long as the stream has not told of it: here the deletes.
#[tokio::test]
async fn an_answer_without_rows_waits_for_the_stream_too() {
    let line = filled(100).await;
    line.stage
        .sql("SET synchronous_commit = off; DELETE FROM t WHERE id > 90")
        .await;
    let part = |filter: &str| Wanted::Chunks {
        after: Some(vec!["80".to_owned()]),
        filter: Some(filter.to_owned()),
        rows_per_second: None,
        paused: false,
    };
    let keys = Wanted::Keys {
        keys: vec![vec!["95".to_owned()]],
    };
    let empty = Wanted::Chunks {
        after: Some(vec!["90".to_owned()]),
        filter: None,
        rows_per_second: None,
        paused: false,
    };
    let answers = [("r1", keys), ("r2", part("id > 90")), ("r3", empty)];
    for (number, (id, wanted)) in answers.into_iter().enumerate() {
        let end = "SELECT pg_current_wal_insert_lsn()::text";
        let end: Lsn = line.stage.source_text(end).await.parse().expect("an LSN");
        line.ask(id, &[("t", wanted)]).await;
        line.copied(id, 1).await;
        let messages = line.copy_stream().await;
        assert!(ids(&messages).is_empty());
        let reach = messages.iter().filter_map(|message| match message {
            Message::Whole { reach, .. } => Some(*reach),
            _ => None,
        });
        let reach: Vec<_> = reach.collect();
        assert_eq!(reach.len(), number + 1);
        let newest = reach[number].expect("the end has a reach");
        assert!(newest >= end, "{newest} lies below {end}");
    }
}

#[tokio::test]
async fn a_rate_is_kept_and_a_pause_holds_until_another_request() {
    let line = filled(1_000).await;
    let paused = Wanted::Chunks {
        after: None,
        filter: None,
        rows_per_second: None,
        paused: true,
    };
    line.ask("r1", &[("t", paused)]).await;
    line.told("r1", |_| true).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(line.copy_stream().await.is_empty());
    let began = Instant::now();
    line.ask("r2", &[("t", slowly(Some(400)))]).await;
    line.copied("r2", 1).await;
    let took = began.elapsed();
    assert!(took >= Duration::from_secs(2), "{took:?}");
    assert_eq!(ids(&line.copy_stream().await).len(), 1_000);
    // Replaced in its middle, a request ends.
    line.ask("r3", &[("t", slowly(Some(100)))]).await;
    line.told("r3", |status| status.attempt > 0).await;
    line.ask("r4", &[("t", chunks())]).await;
    line.copied("r4", 1).await;
    assert!(
        !line.capture.logs().contains("E1121"),
        "{}",
        line.capture.logs()
    );
}

#[tokio::test]
async fn large_rows_are_cut_into_chunks_that_fit() {
    let line = Line::start(Setting::default()).await;
    line.stage
        .sql(
            "INSERT INTO t SELECT i, (SELECT string_agg(md5(i::text || j), '') FROM generate_series(1, 8192) j)
             FROM generate_series(1, 80) i",
        )
        .await;
    line.ask("r1", &[("t", chunks())]).await;
    line.copied("r1", 1).await;
    let messages = line.copy_stream().await;
    assert_eq!(ids(&messages), (1..=80).collect::<Vec<i64>>());
    let sizes: Vec<u64> = parts(&messages).iter().map(|part| part.rows).collect();
    assert!(
        sizes.len() > 2 && sizes.iter().all(|rows| *rows <= 33),
        "{sizes:?}"
    );
    assert_eq!(line.replica().await, line.source().await);
}

#[tokio::test]
async fn a_load_that_was_cut_off_is_left_to_chunks() {
    let mut line = filled(200_000).await;
    // The load stands still before a sink that does not read, so it is there to be cut off.
    let jetstream = small_copy_stream(&line.stage).await;
    line.ask("r1", &[("t", Wanted::Load)]).await;
    line.told("r1", |status| status.loading.is_some()).await;
    line.capture.kill9();
    let line = Line::on(line.stage).await;
    let status = line.told("r1", |status| !status.cut.is_empty()).await;
    assert_eq!((status.cut[0].table.as_str(), status.loading), ("t", None));
    let left = held(&jetstream).await;
    assert!(left > 0);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(held(&jetstream).await, left);
}
