//! Tables that get their key behind the rows of their load.

use millrace_event::{LoadColumn, LoadFormat, LoadHead};
use millrace_sink::batch::Step;
use millrace_sink::load::Load;

use super::*;

struct Line {
    target: PostgresTarget,
    sink: PostgresSink,
    schema: TableSchema,
    layout: Arc<TableLayout>,
    at: Checkpoint,
}

impl Line {
    /// A sink that awaits the load of a table that its target does not have.
    async fn start(postgres: &Postgres, name: &str) -> Self {
        let target = PostgresTarget {
            plain_insert_rows: Some(1),
            ..database(postgres, name).await
        };
        let mut sink = target.sink(name);
        let Ok(Elected::Yes(position)) = sink.open().await else {
            panic!("is elected")
        };
        let at = position.checkpoint;
        let schema = conformance::schema(name);
        sink.apply(&batch(at, Some(pending(&schema)), Vec::new()))
            .await
            .expect("stores that a load is awaited");
        let layout = ensure(&mut sink, &schema).await;
        Self {
            target,
            sink,
            schema,
            layout,
            at,
        }
    }

    async fn apply(&mut self, steps: Vec<Step>) -> u64 {
        let loading = CopyState::Loading {
            lsn: Lsn(5),
            rows: 1,
            claim: Checkpoint::default().into(),
            began_us: 1,
        };
        let copy = stands(&self.schema, loading);
        let applied = self.sink.apply(&batch(self.at, Some(copy), steps)).await;
        applied.expect("applies").written
    }

    /// Rows of a load: their ids and texts.
    fn load(&self, lsn: u64, rows: &str) -> Step {
        let column = |(name, type_oid): (&str, u32)| LoadColumn {
            name: name.to_owned(),
            type_oid,
        };
        let head = LoadHead {
            load: self.schema.name.clone(),
            version: Version::new(1, Lsn(lsn), 0),
            table_version: self.schema.version.clone(),
            format: LoadFormat::Text,
            columns: [("id", 20), ("n", 23), ("big", 25)].map(column).to_vec(),
        };
        let mut load = Load::new(Arc::clone(&self.layout), &head);
        load.push(
            Bytes::copy_from_slice(rows.as_bytes()),
            rows.lines().count(),
        );
        Step::Load(load)
    }

    fn sweep(&self, lsn: u64) -> Step {
        Step::Sweep {
            table: Arc::clone(&self.layout),
            below: Version::new(1, Lsn(lsn), 0),
            keeps_rows: false,
        }
    }

    async fn has_key(&self) -> bool {
        let sql = "SELECT EXISTS (SELECT FROM pg_constraint WHERE contype = 'p' AND conrelid = $1::text::regclass)";
        let table = self.layout.target.quoted();
        let row = self.target.client.query_one(sql, &[&table]).await;
        row.expect("reads").get(0)
    }

    /// Ids and texts, in order.
    async fn texts(&self) -> Vec<(i64, String)> {
        let sql = format!(
            "SELECT id, big FROM {} ORDER BY id, big",
            self.layout.target.quoted()
        );
        let rows = self.target.client.query(&sql, &[]).await.expect("reads");
        rows.iter().map(|row| (row.get(0), row.get(1))).collect()
    }
}

fn pending(schema: &TableSchema) -> CopyProgress {
    let pending = CopyState::Pending {
        claim: Checkpoint::default().into(),
        began_us: 1,
    };
    stands(schema, pending)
}

fn stands(schema: &TableSchema, state: CopyState) -> CopyProgress {
    CopyProgress {
        tables: std::collections::BTreeMap::from([(schema.name.clone(), state)]),
        ..CopyProgress::default()
    }
}

async fn ensure(sink: &mut PostgresSink, schema: &TableSchema) -> Arc<TableLayout> {
    let settings = conformance::settings(&schema.name);
    let ensured = sink.ensure_table(schema, None, &settings).await;
    ensured.expect("ensures").layout
}

fn batch(at: Checkpoint, copy: Option<CopyProgress>, steps: Vec<Step>) -> Batch {
    Batch {
        from: at,
        to: at,
        copy,
        steps,
        commit: true,
    }
}

fn rows(rows: &[(i64, &str)]) -> Vec<(i64, String)> {
    let rows = rows.iter();
    rows.map(|(id, text)| (*id, (*text).to_owned())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_loaded_table_has_its_key_at_the_end_of_its_load() {
    let postgres = Postgres::start(PostgresOptions::default())
        .await
        .expect("starts");
    let mut line = Line::start(&postgres, "at_the_end").await;
    assert_eq!(
        line.apply(vec![line.load(5, "2\t1\ta\n1\t1\tb\n")]).await,
        2
    );
    assert!(!line.has_key().await);
    // The stream's side asks for the same layout meanwhile.
    ensure(&mut line.sink, &line.schema).await;
    assert!(!line.has_key().await);
    let last = vec![line.load(5, "3\t1\tc\n"), line.sweep(5)];
    assert_eq!(line.apply(last).await, 1);
    assert!(line.has_key().await);
    assert_eq!(line.texts().await, rows(&[(1, "b"), (2, "a"), (3, "c")]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_load_that_is_cut_off_leaves_no_table_without_a_key() {
    let postgres = Postgres::start(PostgresOptions::default())
        .await
        .expect("starts");
    let mut line = Line::start(&postgres, "cut_off").await;
    assert_eq!(line.apply(vec![line.load(5, "1\t1\ta\n")]).await, 1);
    assert!(!line.has_key().await);
    // Another process, which knows nothing of it.
    line.sink = line.target.sink("cut_off");
    conformance::elected(&mut line.sink).await;
    ensure(&mut line.sink, &line.schema).await;
    assert!(line.has_key().await);
    // Rows that are there come again.
    assert_eq!(
        line.apply(vec![line.load(5, "1\t1\ta\n2\t1\tb\n")]).await,
        1
    );
    assert_eq!(line.texts().await, rows(&[(1, "a"), (2, "b")]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_of_its_loads_rows_alone_is_not_read_for_others() {
    let postgres = Postgres::start(PostgresOptions::default())
        .await
        .expect("starts");
    let mut line = Line::start(&postgres, "alone").await;
    assert_eq!(line.apply(vec![line.load(5, "1\t1\ta\n")]).await, 1);
    let refuse = format!(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS \
         $$BEGIN RAISE 'it is swept'; END$$; \
         CREATE TRIGGER refuse BEFORE DELETE ON {} EXECUTE FUNCTION refuse()",
        line.layout.target.quoted()
    );
    let refused = line.target.client.batch_execute(&refuse).await;
    refused.expect("makes a trigger");
    let last = vec![line.load(5, "2\t1\tb\n"), line.sweep(5)];
    assert_eq!(line.apply(last).await, 1);
    assert_eq!(line.texts().await, rows(&[(1, "a"), (2, "b")]));
    // Once only: rows of others may have come since.
    let again = batch(line.at, None, vec![line.sweep(5)]);
    line.sink.apply(&again).await.expect_err("sweeps");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_of_somebody_else_is_swept_from_a_table_that_was_made_for_its_load() {
    let postgres = Postgres::start(PostgresOptions::default())
        .await
        .expect("starts");
    let mut line = Line::start(&postgres, "swept").await;
    assert_eq!(line.apply(vec![line.load(5, "1\t1\ta\n")]).await, 1);
    let table = line.layout.target.quoted();
    let own = format!("INSERT INTO {table} (id, n, big) VALUES (9, 1, 'of somebody else')");
    let written = line.target.client.batch_execute(&own).await;
    written.expect("writes");
    let last = vec![line.load(5, "2\t1\tb\n"), line.sweep(5)];
    assert_eq!(line.apply(last).await, 1);
    assert_eq!(line.texts().await, rows(&[(1, "a"), (2, "b")]));
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_an_earlier_snapshot_are_swept_with_the_key() {
    let postgres = Postgres::start(PostgresOptions::default())
        .await
        .expect("starts");
    let mut line = Line::start(&postgres, "earlier").await;
    assert_eq!(line.apply(vec![line.load(5, "1\t1\told\n")]).await, 1);
    let last = vec![line.load(7, "2\t1\tnew\n"), line.sweep(7)];
    assert_eq!(line.apply(last).await, 1);
    assert_eq!(line.texts().await, rows(&[(2, "new")]));
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_another_snapshot_meet_the_key() {
    let postgres = Postgres::start(PostgresOptions::default())
        .await
        .expect("starts");
    let mut line = Line::start(&postgres, "another").await;
    assert_eq!(
        line.apply(vec![line.load(5, "1\t1\told\n2\t1\told\n")])
            .await,
        2
    );
    assert_eq!(line.apply(vec![line.load(7, "1\t1\tnew\n")]).await, 1);
    assert!(line.has_key().await);
    assert_eq!(line.texts().await, rows(&[(1, "new"), (2, "old")]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_the_target_refuses_is_set_aside_from_a_table_without_a_key() {
    let postgres = Postgres::start(PostgresOptions::default())
        .await
        .expect("starts");
    let mut line = Line::start(&postgres, "refused").await;
    let table = line.layout.target.quoted();
    let check = format!("ALTER TABLE {table} ADD CHECK (n < 10)");
    line.target
        .client
        .batch_execute(&check)
        .await
        .expect("alters");
    let load = line.load(5, "1\t1\ta\n2\t99\tb\n3\t3\tc\n");
    assert_eq!(line.apply(vec![load]).await, 2);
    assert!(line.has_key().await, "guards need it");
    assert_eq!(line.texts().await, rows(&[(1, "a"), (3, "c")]));
    assert_eq!(line.target.open_letters(&line.layout).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_whose_key_is_the_settings_has_it_from_the_start() {
    let postgres = Postgres::start(PostgresOptions::default())
        .await
        .expect("starts");
    let target = database(&postgres, "own_key").await;
    let mut sink = target.sink("own_key");
    let Ok(Elected::Yes(position)) = sink.open().await else {
        panic!("is elected")
    };
    let schema = conformance::schema("own_key");
    sink.apply(&batch(
        position.checkpoint,
        Some(pending(&schema)),
        Vec::new(),
    ))
    .await
    .expect("stores that a load is awaited");
    let mut settings = conformance::settings(&schema.name);
    // Nobody says that the source has each of these once.
    settings.key = Some(vec!["n".to_owned()]);
    let ensured = sink.ensure_table(&schema, None, &settings).await;
    let layout = ensured.expect("ensures").layout;
    let line = Line {
        target,
        sink,
        schema,
        layout,
        at: position.checkpoint,
    };
    assert!(line.has_key().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_reads_the_table_for_long_does_not_hold_its_load_up() {
    let postgres = Postgres::start(PostgresOptions::default())
        .await
        .expect("starts");
    let mut line = Line::start(&postgres, "read_for_long").await;
    assert_eq!(line.apply(vec![line.load(5, "1\t1\ta\n")]).await, 1);
    let table = line.layout.target.quoted();
    let read = format!("BEGIN; SELECT count(*) FROM {table}");
    line.target
        .client
        .batch_execute(&read)
        .await
        .expect("reads");
    let last = vec![line.load(5, "2\t1\tb\n"), line.sweep(5)];
    assert_eq!(line.apply(last).await, 1);
    // It has a unique index, so it takes whatever comes.
    assert!(!line.has_key().await);
    assert_eq!(line.apply(vec![line.load(6, "1\t1\tc\n")]).await, 1);
    ensure(&mut line.sink, &line.schema).await;
    line.target
        .client
        .batch_execute("COMMIT")
        .await
        .expect("ends");
    assert_eq!(line.texts().await, rows(&[(1, "c"), (2, "b")]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_there_twice_parks_the_table_with_the_statement() {
    let postgres = Postgres::start(PostgresOptions::default())
        .await
        .expect("starts");
    let mut line = Line::start(&postgres, "twice").await;
    assert_eq!(line.apply(vec![line.load(5, "1\t1\ta\n")]).await, 1);
    let table = line.layout.target.quoted();
    let own = format!("INSERT INTO {table} (id, n, big) VALUES (1, 1, 'of somebody else')");
    line.target
        .client
        .batch_execute(&own)
        .await
        .expect("writes");
    let last = batch(line.at, None, vec![line.sweep(5)]);
    let refused = line.sink.apply(&last).await;
    let Err(SinkError::Table { condition, .. }) = refused else {
        panic!("{refused:?}")
    };
    assert_eq!(condition.code, Code::TargetKey);
    assert!(
        condition.remedy.contains("ADD PRIMARY KEY"),
        "{condition:?}"
    );
    // The session goes on for the others.
    let nothing = batch(line.at, None, Vec::new());
    line.sink.apply(&nothing).await.expect("applies");
}
