//! The demo kills its pipeline in the middle, compares every row, and its last line and exit code tell the truth.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

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

    verified(&stdout);
}

/// The last line says that every row is equal, and how many those are.
fn verified(stdout: &str) {
    let last = stdout.lines().last().unwrap_or_default();
    let words: Vec<_> = last.split(' ').collect();
    let ["verified:", rows, "rows", "in", "5", "tables,", rest @ ..] = words.as_slice() else {
        panic!("{last}");
    };
    assert_eq!(rest.join(" "), "0 missing, 0 extra, 0 different");
    assert!(rows.parse::<u64>().is_ok_and(|rows| rows > 100), "{last}");
}

#[tokio::test]
async fn a_demo_that_is_interrupted_early_kills_its_pipeline_all_the_same() {
    let place = Place::new().expect("a folder");
    let arguments = ["demo", "--plain", "--seconds", "600"];
    let mut demo = Pipeline::spawn(Path::new(BIN), place.path(), &arguments).expect("started");
    let said = demo.wait_for_log("first change", DEMO_PATIENCE).await;
    said.expect("it shows changes");
    demo.interrupt().expect("signal");
    let code = demo.wait(DEMO_PATIENCE).await.expect("ends in time");
    let stdout = demo.stdout();
    assert_eq!(code, 0, "{}", demo.logs());
    let steps = [
        "first change",
        "kill -9: the pipeline is dead",
        "traffic stopped",
        "SIGTERM: the pipeline ended with exit code 0",
    ];
    let steps = steps.map(|step| {
        stdout
            .find(step)
            .unwrap_or_else(|| panic!("{step}: {stdout}"))
    });
    assert!(steps.is_sorted(), "{stdout}");
    verified(&stdout);
}

#[tokio::test]
async fn a_pipeline_that_does_not_end_well_fails_the_demo() {
    let place = Place::new().expect("a folder");
    let arguments = ["demo", "--plain", "--seconds", "6"];
    let mut demo = Pipeline::spawn(Path::new(BIN), place.path(), &arguments).expect("started");
    let said = demo.wait_for_log("starting it again", DEMO_PATIENCE).await;
    said.expect("it kills its pipeline");
    for pid in pipelines_of(demo.pid()) {
        let kill = format!("kill -9 {pid}");
        let killed = Command::new("sh").args(["-c", &kill]).status();
        assert!(killed.expect("a shell").success());
    }
    let code = demo.wait(DEMO_PATIENCE).await.expect("ends in time");
    assert_eq!(code, 4, "{}", demo.logs());
    let logs = demo.logs();
    assert!(logs.contains("exit code 137 instead of 0"), "{logs}");
    assert!(!logs.contains("verified"), "{logs}");
}

/// The processes of the product that a process has started, once there is one.
fn pipelines_of(pid: u32) -> Vec<u32> {
    let deadline = Instant::now() + DEMO_PATIENCE;
    while Instant::now() < deadline {
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        let children = children.expect("the system tells");
        let children = children.split_whitespace();
        let product = children.filter(|child| {
            let program = fs::read_link(format!("/proc/{child}/exe"));
            program.is_ok_and(|program| program == Path::new(BIN))
        });
        let product: Vec<_> = product.map(|pid| pid.parse().expect("a number")).collect();
        if !product.is_empty() {
            return product;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("it has started none");
}

#[tokio::test]
async fn the_version_is_the_packages() {
    let place = Place::new().expect("a folder");
    let mut asked = Pipeline::spawn(Path::new(BIN), place.path(), &["--version"]).expect("started");
    assert_eq!(asked.wait(DEMO_PATIENCE).await.ok(), Some(0));
    let release = env!("CARGO_PKG_VERSION");
    // One build makes both, so both were told the same.
    let expected = match option_env!("MILLRACE_COMMIT").unwrap_or_default() {
        "" => format!("millrace {release}\n"),
        commit => format!("millrace {release} ({commit})\n"),
    };
    assert_eq!(asked.stdout(), expected);
}
