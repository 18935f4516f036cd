//! The demo kills its pipeline in the middle, compares every row, and its last line and exit code tell the truth.

use std::path::Path;
use std::time::Duration;

use millrace_lab::{Pipeline, Place};

use crate::stage::BIN;

/// Starting three servers beside other scenarios, eight seconds of traffic, draining and comparing.
const DEMO_PATIENCE: Duration = Duration::from_secs(120);

#[tokio::test]
async fn the_demo_survives_a_kill_and_ends_equal() {
    let place = Place::new().expect("a folder");
    let arguments = ["demo", "--plain", "--seconds", "8"];
    let mut demo = Pipeline::spawn(Path::new(BIN), place.path(), &arguments).expect("started");
    let code = demo.wait(DEMO_PATIENCE).await.expect("ends in time");
    let stdout = demo.stdout();
    assert_eq!(code, 0, "{}", demo.logs());
    assert!(stdout.contains("kill -9: the pipeline is dead"), "{stdout}");

    let last = stdout.lines().last().unwrap_or_default();
    let words: Vec<_> = last.split(' ').collect();
    let ["verified:", rows, "rows", "in", "5", "tables,", rest @ ..] = words.as_slice() else {
        panic!("{last}");
    };
    assert_eq!(rest.join(" "), "0 missing, 0 extra, 0 different");
    assert!(rows.parse::<u64>().is_ok_and(|rows| rows > 100), "{last}");
}

#[tokio::test]
async fn the_version_is_the_packages() {
    let place = Place::new().expect("a folder");
    let mut asked = Pipeline::spawn(Path::new(BIN), place.path(), &["--version"]).expect("started");
    assert_eq!(asked.wait(DEMO_PATIENCE).await.ok(), Some(0));
    let expected = format!("millrace {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(asked.stdout(), expected);
}
