//! What the catalog tells of a table's history: rows that changed without an event, and columns of other days.

use millrace_event::TableSchema;
use millrace_lab::{Compared, Pipeline, PostgresOptions};

use crate::backfill_capture::{in_limbo, release};
use crate::stage::{Setting, Stage};

/// Waits until capture has begun anew because of this, and streams.
async fn next_life(stage: &Stage, pipeline: &Pipeline, said: &str) {
    Stage::logs(pipeline, said).await;
    stage
        .sql("INSERT INTO u SELECT count(*), 'on' FROM u")
        .await;
    let rows = "SELECT count(*)::text FROM u";
    let expected = stage.source_text(rows).await;
    stage.target_shows(pipeline, rows, &expected).await;
}

const TABLES: &str = "CREATE TABLE u (id int PRIMARY KEY, v text);
    CREATE TABLE packed (id int PRIMARY KEY, v text);
    CREATE TABLE dropped (id int PRIMARY KEY, v text);
    CREATE TABLE renamed (id int PRIMARY KEY, v text);
    CREATE TABLE rewritten (id int PRIMARY KEY, a int);
    CREATE TABLE generated (id int PRIMARY KEY, g int GENERATED ALWAYS AS (id * 2) STORED);
    CREATE TABLE lent (id int PRIMARY KEY, v text);
    CREATE TABLE again (id int PRIMARY KEY, v text);
    CREATE TABLE parted (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
    CREATE TABLE part PARTITION OF parted FOR VALUES FROM (0) TO (10);
    CREATE TABLE deep (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
    CREATE TABLE deep_in PARTITION OF deep FOR VALUES FROM (0) TO (10) PARTITION BY RANGE (id);
    CREATE TABLE deep_leaf PARTITION OF deep_in FOR VALUES FROM (0) TO (10);
    CREATE TABLE filled (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
    CREATE TABLE filled_part PARTITION OF filled FOR VALUES FROM (0) TO (10);
    INSERT INTO dropped VALUES (1, 'old'), (2, 'old');
    INSERT INTO packed SELECT * FROM dropped;
    INSERT INTO renamed SELECT * FROM dropped; INSERT INTO lent SELECT * FROM dropped;
    INSERT INTO again SELECT * FROM dropped; INSERT INTO parted SELECT * FROM dropped;
    INSERT INTO deep SELECT * FROM dropped; INSERT INTO filled SELECT * FROM dropped;
    INSERT INTO rewritten VALUES (1, 1), (2, 2); INSERT INTO generated VALUES (1), (2)";

#[tokio::test]
async fn rows_that_changed_without_an_event_are_read_again() {
    let tables = [
        "public.u",
        "public.packed",
        "public.dropped",
        "public.renamed",
        "public.rewritten",
        "public.generated",
        "public.lent",
        "public.again",
        "public.parted",
        "public.deep",
        "public.filled",
    ];
    let stage = Stage::set(Setting {
        schema: TABLES,
        tables: &tables.map(|table| (table, "")),
        ..Setting::default()
    })
    .await;
    let pipeline = stage.start();
    let whole = tables
        .into_iter()
        .filter(|table| *table != "public.generated");
    let whole: Vec<_> = whole.map(Compared::same).collect();
    stage.equal_as(&pipeline, &whole).await;
    stage
        .sql(
            "ALTER TABLE dropped DROP COLUMN v; ALTER TABLE renamed RENAME COLUMN v TO w;
              INSERT INTO renamed VALUES (4, 'w');
              ALTER TABLE packed ADD COLUMN filled int DEFAULT 7; INSERT INTO packed VALUES (3, 'new', 8)",
        )
        .await;
    next_life(&stage, &pipeline, "was changed at the source").await;
    for sql in [
        "VACUUM FULL packed",
        "ALTER TABLE u ALTER COLUMN v SET STATISTICS 9",
        "ALTER TABLE dropped ADD COLUMN v text; INSERT INTO dropped VALUES (3, 'new')",
        "ALTER TABLE renamed ADD COLUMN v text; INSERT INTO renamed VALUES (3, 'w', 'new')",
        "ALTER TABLE rewritten ALTER COLUMN a TYPE int USING a * 2; INSERT INTO rewritten VALUES (3, 3)",
        "ALTER TABLE generated ALTER COLUMN g DROP EXPRESSION; INSERT INTO generated VALUES (3, 3)",
        "BEGIN; ALTER TABLE lent RENAME TO x; UPDATE x SET v = 'lent'; ALTER TABLE x RENAME TO lent; COMMIT",
        "BEGIN; ALTER TABLE again DROP COLUMN v; ALTER TABLE again ADD COLUMN v text; COMMIT;
         INSERT INTO again VALUES (3, 'new')",
        "BEGIN; ALTER TABLE parted DETACH PARTITION part; UPDATE part SET v = 'away';
         ALTER TABLE parted ATTACH PARTITION part FOR VALUES FROM (0) TO (10); COMMIT",
        "BEGIN; ALTER TABLE deep DETACH PARTITION deep_in; DELETE FROM deep_in WHERE id = 1;
         ALTER TABLE deep ATTACH PARTITION deep_in FOR VALUES FROM (0) TO (10); COMMIT",
        "ALTER TABLE filled ADD COLUMN c int DEFAULT 5; INSERT INTO filled VALUES (3, 'new', 6)",
    ] {
        stage.sql(sql).await;
    }
    stage.equal(&pipeline).await;
    assert!(
        !pipeline.logs().contains("table parked"),
        "{}",
        pipeline.logs()
    );

    // One fingerprint, two eras: the version that the table has again has the numbers of now.
    let number = stage
        .source_text(
            "SELECT attnum::text FROM pg_attribute WHERE attrelid = 'again'::regclass AND attname = 'v'",
        )
        .await;
    let schemas = Schemas::of(&stage).await;
    let latest = schemas.read("public.again").await;
    let version = schemas
        .read(&format!("public.again.{}", latest.version))
        .await;
    assert_eq!(version.columns[1].number.to_string(), number);

    // A compaction is none of that, though it writes the values of older rows and their columns' entries anew.
    let read_again = |line: &&str| {
        line.contains("are read again")
            && (line.contains("public.packed") || line.contains("public.u"))
    };
    assert_eq!(pipeline.logs().lines().find(read_again), None);
}

/// The tables' schemas beside the stream.
struct Schemas(async_nats::jetstream::kv::Store);

impl Schemas {
    async fn of(stage: &Stage) -> Self {
        let client = async_nats::connect(stage.nats.url()).await;
        let jetstream = async_nats::jetstream::new(client.expect("connects"));
        let bucket = jetstream.get_key_value("MILLRACE_shop_schemas").await;
        Self(bucket.expect("the bucket"))
    }

    async fn text(&self, key: &str) -> String {
        let entry = self.0.get(key).await.expect("answers").expect("is there");
        String::from_utf8(entry.to_vec()).expect("is text")
    }

    async fn read(&self, key: &str) -> TableSchema {
        serde_json::from_str(&self.text(key).await).expect("a schema")
    }

    /// Everything in it.
    async fn all(&self) -> String {
        use futures_util::TryStreamExt as _;
        let keys: Vec<String> = self
            .0
            .keys()
            .await
            .expect("keys")
            .try_collect()
            .await
            .expect("keys");
        let mut all = String::new();
        for key in keys {
            all.push_str(&self.text(&key).await);
        }
        all
    }
}

#[tokio::test]
async fn a_table_is_described_once_its_change_is_visible_and_short_lived_columns_hold_nothing_up() {
    let stage = Stage::set(Setting {
        schema: "CREATE TABLE t (id int PRIMARY KEY, a int); INSERT INTO t SELECT i, i FROM generate_series(1, 9) i;
            CREATE TABLE u (id int PRIMARY KEY, v text)",
        tables: &[("public.t", ""), ("public.u", "")],
        target_postgres: Some(PostgresOptions::default()),
        ..Setting::default()
    })
    .await;
    let mut pipeline = stage.start();
    stage.equal(&pipeline).await;
    let held = in_limbo(
        &stage,
        "BEGIN; ALTER TABLE t ADD COLUMN b int; UPDATE t SET b = id; COMMIT",
    )
    .await;
    // The replication connection and the other tables' lives go on meanwhile; the next life looks again.
    Stage::logs(&pipeline, "cannot be described until then").await;
    release(&stage).await;
    held.await.expect("commits");
    stage.equal(&pipeline).await;

    // A column that no look and no description ever saw.
    pipeline.kill9();
    stage
        .sql("ALTER TABLE t ADD COLUMN c int; UPDATE t SET c = 1; ALTER TABLE t DROP COLUMN c; INSERT INTO t VALUES (10)")
        .await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
}

#[tokio::test]
async fn a_masked_value_is_not_kept_even_if_it_was_not_masked_before() {
    let stage = Stage::set(Setting {
        schema: "CREATE TABLE t (id int PRIMARY KEY, a text); INSERT INTO t VALUES (1, 'a')",
        tables: &[("public.t", "")],
        ..Setting::default()
    })
    .await;
    let mut pipeline = stage.start();
    stage.equal(&pipeline).await;
    stage
        .sql("ALTER TABLE t ADD COLUMN v text DEFAULT 'hush'; INSERT INTO t VALUES (2, 'b', 'x')")
        .await;
    stage.equal(&pipeline).await;
    stage
        .sql("ALTER TABLE t ADD COLUMN w int; INSERT INTO t VALUES (3, 'c', 'y', 1)")
        .await;
    stage.equal(&pipeline).await;
    let schemas = Schemas::of(&stage).await;
    assert!(schemas.all().await.contains("hush"));
    pipeline.kill9();
    let masked = "[columns]\nmask = { v = \"redact\" }";
    let config = stage.same_config().table("public.t", masked);
    config.write_to(stage.folder.path()).expect("written");
    let pipeline = stage.start();
    stage.sql("INSERT INTO t VALUES (4, 'd', 'z', 2)").await;
    let shown = "SELECT v FROM t WHERE id = 4";
    stage.target_shows(&pipeline, shown, "***").await;
    // The version without the newest column is one that nothing describes again.
    let all = schemas.all().await;
    assert!(!all.contains("hush"), "{all}");
}
