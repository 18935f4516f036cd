//! Columns that are left out, masked or renamed: of streamed and of copied rows, old and new ones.

mod changes;

use std::time::Duration;

use async_nats::Subscriber;
use futures_util::StreamExt as _;
use millrace_lab::PostgresOptions;

use crate::stage::{Setting, Stage};

/// `hash` masks have a salt.
const SOURCE: &str =
    "heartbeat_interval = \"500ms\"\nmask_salt = \"a salt of more than sixteen bytes\"";
/// What another HMAC-SHA-256 makes of `ada@example.org` and of `2001-02-03` under that salt.
const ADA: &str = "765842f6204573b31de2da7b70f3024a636c38de2590358002a230d93ddce730";
const DAY: &str = "df812f1a015f538debf9d573e65a9dc7f95dd1be52415db7abbb77584a3274d9";

/// Everything that is sent over the broker: the stream, copy streams, buckets, requests.
struct Wire(Subscriber);

impl Wire {
    async fn tap(stage: &Stage) -> Self {
        let client = stage.nats.client().await.expect("client");
        let wire = Self(client.subscribe(">").await.expect("subscribed"));
        client.flush().await.expect("flushed");
        wire
    }

    /// All that was sent, once nobody sends any more.
    async fn heard(mut self) -> String {
        let mut heard = String::new();
        let quiet = Duration::from_secs(1);
        while let Ok(Some(message)) = tokio::time::timeout(quiet, self.0.next()).await {
            let text = String::from_utf8_lossy(&message.payload);
            heard.push_str(&format!("{} {text}\n", message.subject));
        }
        heard
    }
}

const SCHEMA: &str = "CREATE TYPE mood AS ENUM ('gloomy', 'other');
    CREATE TABLE t (card text NOT NULL, id int PRIMARY KEY, email text NOT NULL, note varchar(20),
        mood mood, phone text, day date, big text, v int, twice int GENERATED ALWAYS AS (v * 2) STORED);
    ALTER TABLE t ALTER COLUMN big SET STORAGE EXTERNAL";

const MASKS: &str = "mask = { email = \"hash\", note = \"redact\", mood = \"redact\", phone = \"truncate:4\", \
                     day = \"hash\", big = \"truncate:6\" }";

/// A row with a secret in every column that is not to be seen.
fn insert(id: i32) -> String {
    format!(
        "INSERT INTO t (card, id, email, note, mood, phone, day, big, v) VALUES ('cardsecret', {id}, \
         'ada@example.org', 'notesecret', 'gloomy', '+49äsecret', '2001-02-03', \
         'prefix' || repeat('bigsecret', 2000), {id}), ('cardsecret', {}, '', NULL, NULL, NULL, NULL, NULL, {id})",
        id + 1
    )
}

const CHANGES: &[&str] = &[
    "UPDATE t SET v = v + 100",
    "UPDATE t SET email = 'second' || email, note = 'othernotesecret' WHERE id = 11",
    "UPDATE t SET email = 'ada@example.org', note = 'again notesecret', phone = NULL WHERE id = 11",
    "UPDATE t SET id = 30 WHERE id = 1",
    "UPDATE t SET id = 31, big = 'prefix2bigsecret', mood = 'gloomy' WHERE id = 12",
    "DELETE FROM t WHERE id = 2",
];

const SECRETS: &[&str] = &[
    "cardsecret",
    "secret",
    "example.org",
    "2001-02-03",
    "\"mood\":\"",
    "9äsecret",
];

/// The replica's rows: with what travels in place of the values.
const ROWS: &str = "SELECT string_agg(concat_ws(' ', id, CASE email WHEN '#' THEN 'ada' ELSE length(email)::text END,
    coalesce(note, 'none'), coalesce(mood::text, 'none'), coalesce(phone, 'none'),
    CASE day WHEN '%' THEN 'day' ELSE coalesce(day, 'none') END, coalesce(big, 'none'), v), '; ' ORDER BY id) FROM t";

fn rows() -> String {
    ROWS.replace('#', ADA).replace('%', DAY)
}

/// Copies, streams, and finds none of the values anywhere.
async fn nothing_is_seen(stage: &Stage, excludes: bool) -> String {
    let wire = Wire::tap(stage).await;
    stage.sql(&insert(1)).await;
    let pipeline = stage.start();
    let sql = rows();
    let copied = "1 ada *** none +49ä day prefix 1; 2 64 none none none none none 1";
    stage.target_shows(&pipeline, &sql, copied).await;
    stage.sql(&insert(11)).await;
    let streamed = format!(
        "{copied}; {}",
        copied
            .replace("1 ada", "11 ada")
            .replace("; 2 64", "; 12 64")
            .replace(" 1;", " 11;")
            .replacen("none 1", "none 11", 1)
    );
    stage.target_shows(&pipeline, &sql, &streamed).await;
    for change in CHANGES {
        stage.sql(change).await;
    }
    let changed = "11 ada *** none none day prefix 111; 30 ada *** none +49ä day prefix 101; \
                   31 64 none none none none prefix 111";
    stage.target_shows(&pipeline, &sql, changed).await;
    let card = "SELECT count(*)::text FROM pg_attribute WHERE attrelid = 't'::regclass AND attname = 'card'";
    let kept = if excludes { "0" } else { "1" };
    assert_eq!(stage.target_text(card).await, kept);
    let letters = "SELECT count(*)::text FROM millrace.dead_letter";
    assert_eq!(stage.target_text(letters).await, "0");
    let logs = pipeline.logs();
    Stage::stopped(pipeline).await;
    let heard = wire.heard().await;
    for secret in SECRETS {
        assert!(!heard.contains(secret), "{secret:?} was sent:\n{heard}");
        assert!(!logs.contains(secret), "{secret:?} was logged");
    }
    for subject in [
        "cdc.shop.public.t.u",
        "cdc.shop.public.t.c",
        "cdc-copy.shop.replica.public.t",
    ] {
        assert!(heard.contains(subject), "{subject} was not heard");
    }
    assert!(heard.contains(ADA) && heard.contains("***"), "{heard}");
    heard
}

async fn masked(identity: &str, columns: &str, postgres: PostgresOptions) -> Stage {
    Stage::set(Setting {
        schema: &format!("{SCHEMA}; ALTER TABLE t REPLICA IDENTITY {identity}"),
        source: SOURCE,
        tables: &[("public.t", columns)],
        postgres,
        ..Setting::default()
    })
    .await
}

fn with_exclude() -> String {
    format!("[columns]\nexclude = [\"card\"]\n{MASKS}")
}

fn with_masks_only() -> String {
    format!(
        "[columns]\n{}",
        MASKS.replace("{ email", "{ card = \"redact\", email")
    )
}

#[tokio::test]
async fn what_is_excluded_or_masked_is_never_sent() {
    let stage = masked("DEFAULT", &with_exclude(), PostgresOptions::default()).await;
    nothing_is_seen(&stage, true).await;
    // The column does not even leave the source.
    let listed = "SELECT array_to_string(attnames, ' ') FROM pg_publication_tables";
    assert_eq!(
        stage.source_text(listed).await,
        "id email note mood phone day big v"
    );
}

#[tokio::test]
async fn old_rows_are_masked_as_well() {
    let stage = masked("FULL", &with_masks_only(), PostgresOptions::default()).await;
    let heard = nothing_is_seen(&stage, false).await;
    // The whole old row is there, as it was masked when it was new.
    let before = format!(
        "\"before\":{{\"card\":\"***\",\"id\":1,\"email\":\"{ADA}\",\"note\":\"***\",\"mood\":null,\"phone\":\"+49ä\""
    );
    assert!(heard.contains(&before), "{before} is not in\n{heard}");
}

#[tokio::test]
async fn before_postgres_15_capture_leaves_the_column_out() {
    for identity in ["DEFAULT", "FULL"] {
        let postgres = PostgresOptions {
            major: Some(14),
            ..PostgresOptions::default()
        };
        let stage = masked(identity, &with_exclude(), postgres).await;
        nothing_is_seen(&stage, true).await;
    }
}

#[tokio::test]
async fn the_newest_postgres_takes_the_same_selection() {
    let postgres = PostgresOptions {
        major: Some(18),
        ..PostgresOptions::default()
    };
    let stage = masked("DEFAULT", &with_exclude(), postgres).await;
    nothing_is_seen(&stage, true).await;
}

#[tokio::test]
async fn a_renamed_column_has_its_new_name_everywhere_in_the_target() {
    let schema = "CREATE TABLE t (id int, region text, v text, big text, PRIMARY KEY (region, id));
        ALTER TABLE t ALTER COLUMN big SET STORAGE EXTERNAL;
        INSERT INTO t SELECT i, 'north', 'v' || i, repeat(md5(i::text), 300) FROM generate_series(1, 20) i";
    let columns = "adopt = true\n\
        columns.rename = { id = \"number\", v = \"region\", region = \"the region\", big = \"text\" }";
    let stage = Stage::set(Setting {
        schema,
        tables: &[("public.t", columns)],
        ..Setting::default()
    })
    .await;
    // A table of the target's own, with a row that a sweep must take away.
    stage
        .target_sql(
            "CREATE TABLE t (\"the region\" text, number int, region text, text text,
                 PRIMARY KEY (\"the region\", number), CHECK (region <> 'refused'));
             INSERT INTO t VALUES ('south', 1, 'swept', ''), ('north', 1, 'overwritten', '')",
        )
        .await;
    let pipeline = stage.start();
    let at_source = "SELECT string_agg(concat_ws('|', region, id, v, md5(big)), ' ' ORDER BY region, id) FROM t";
    let in_target = "SELECT string_agg(concat_ws('|', \"the region\", number, region, md5(text)), ' ' \
                     ORDER BY \"the region\", number) FROM t";
    for sql in [
        "SELECT 1",
        "UPDATE t SET v = 'partial' WHERE id < 5",
        "UPDATE t SET region = 'west' WHERE id = 2; UPDATE t SET id = 40, v = 'moved' WHERE id = 3",
        "BEGIN; UPDATE t SET id = 41 WHERE id = 4; UPDATE t SET v = 'then' WHERE id = 41; COMMIT",
        "DELETE FROM t WHERE id IN (5, 40)",
        "UPDATE t SET big = NULL WHERE id = 6",
        "TRUNCATE t; INSERT INTO t VALUES (1, 'north', 'after', 'b'), (2, 'north', 'after', 'b')",
    ] {
        stage.sql(sql).await;
        let expected = stage.source_text(at_source).await;
        stage.target_shows(&pipeline, in_target, &expected).await;
    }
    // A row that the target refuses is set aside under its key, and comes back.
    stage
        .sql("UPDATE t SET v = 'refused' WHERE id = 2; UPDATE t SET v = 'taken' WHERE id = 1")
        .await;
    let open = "SELECT count(*)::text FROM millrace.dead_letter WHERE resolved_at IS NULL";
    stage.target_shows(&pipeline, open, "1").await;
    stage.sql("UPDATE t SET v = 'mended' WHERE id = 2").await;
    let expected = stage.source_text(at_source).await;
    stage.target_shows(&pipeline, in_target, &expected).await;
    stage.target_shows(&pipeline, open, "0").await;
    // In the stream the names are the source's.
    let jetstream = async_nats::jetstream::new(stage.nats.client().await.expect("client"));
    let stream = jetstream.get_stream("CDC_shop").await.expect("stream");
    let last = stream
        .get_last_raw_message_by_subject("cdc.shop.public.t.u")
        .await;
    let last = last.expect("an update").payload;
    let last = String::from_utf8_lossy(&last);
    assert!(
        last.contains("\"after\":{\"id\":2,\"region\":\"north\",\"v\":\"mended\""),
        "{last}"
    );
}
