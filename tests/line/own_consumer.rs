//! The example of a consumer of one's own does what the README says.

use std::path::Path;

use millrace_lab::Pipeline;

use crate::stage::{BIN, PATIENCE, Setting, Stage};

const SOURCE: &str = include_str!("../../sink/consumer/examples/follow.rs");

/// As promised: an example that is read at one glance.
const LINES_MAX: usize = 40;

#[test]
fn the_readme_shows_the_whole_example() {
    let readme = include_str!("../../README.md");
    assert!(readme.contains(SOURCE), "the README shows another text");
    let lines = SOURCE.lines().count();
    assert!(lines <= LINES_MAX, "{lines} lines");
}

#[tokio::test]
async fn the_example_prints_every_change_once() {
    // `cargo test` builds the examples of all members beside the binary; `--test line` alone does not.
    let bin = Path::new(BIN).with_file_name("examples").join("follow");
    let remedy = "run `cargo build -p millrace-consumer --example follow`";
    assert!(bin.exists(), "{} is missing: {remedy}", bin.display());

    let stage = Stage::set(Setting::default()).await;
    let mut millrace = stage.start();
    Stage::readyz(&mut millrace, 200, "streaming").await;
    let arguments = [&*stage.nats.url(), "shop", "public.t"];
    let mut example =
        Pipeline::spawn(&bin, stage.folder.path(), &arguments).expect("the example starts");
    for sql in [
        "INSERT INTO t VALUES (1, 'one'), (2, 'two')",
        "UPDATE t SET v = 'changed' WHERE id = 1",
        "DELETE FROM t WHERE id = 2",
        "TRUNCATE t",
    ] {
        stage.sql(sql).await;
    }
    let last = example.wait_for_log("of the whole table", PATIENCE).await;
    assert_eq!(last.expect("printed"), "Truncate of the whole table");
    let key = |id: u8| format!("Columns([(\"id\", Text(\"{id}\"))])");
    let begins = [
        format!("Create {} -> Some(", key(1)),
        format!("Create {} -> Some(", key(2)),
        format!("Update {} -> Some(", key(1)),
        format!("Delete {} -> None", key(2)),
        "Truncate of the whole table".to_owned(),
    ];
    let printed = example.stdout();
    assert_eq!(printed.lines().count(), begins.len(), "{printed}");
    for (line, begin) in printed.lines().zip(&begins) {
        assert!(line.starts_with(begin.as_str()), "{line:?}, not {begin:?}");
    }
    assert!(printed.contains("changed"), "{printed}");
}
