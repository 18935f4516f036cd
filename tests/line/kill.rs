//! Whatever part is killed, whenever: nothing is lost and nothing is applied twice.

use std::time::Duration;

use millrace_lab::{Pipeline, Proxy, Traffic, shop};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use crate::stage::{Setting, Stage};

/// The shop's tables as configured ones.
pub(crate) const SHOP: [(&str, &str); 5] = [
    (shop::TABLES[0], ""),
    (shop::TABLES[1], ""),
    (shop::TABLES[2], ""),
    (shop::TABLES[3], ""),
    (shop::TABLES[4], ""),
];

const KILLS: u32 = 6;
const RATE: u32 = 150;

/// The shop as a stage.
pub(crate) fn shop_setting() -> Setting<'static> {
    Setting {
        schema: shop::SCHEMA,
        tables: &SHOP,
        ..Setting::default()
    }
}

/// Random numbers of a scenario whose seed is shown when it fails.
pub(crate) fn seeded() -> StdRng {
    let seed = rand::random();
    println!("seed {seed}");
    StdRng::seed_from_u64(seed)
}

/// Waits for a random moment.
pub(crate) async fn random_moment(rng: &mut StdRng, max_ms: u64) {
    let wait = Duration::from_millis(rng.random_range(20..max_ms));
    println!("waiting {wait:?}");
    tokio::time::sleep(wait).await;
}

pub(crate) async fn traffic(stage: &Stage, rng: &mut StdRng, rate: u32) -> Traffic {
    let traffic = Traffic::start(&stage.postgres.url("source"), rng.random(), rate).await;
    traffic.expect("traffic starts")
}

/// Starts these processes under traffic and kills the first of them again and again.
async fn survives_kills_of_the_first(processes: &[&[&str]]) {
    let mut rng = seeded();
    let stage = Stage::set(shop_setting()).await;
    shop::fill_orders(&stage.source, 1, 500, 100)
        .await
        .expect("orders");
    let traffic = traffic(&stage, &mut rng, RATE).await;
    let mut running: Vec<Pipeline> = processes
        .iter()
        .map(|args| stage.start_with(args))
        .collect();
    for _ in 0..KILLS {
        random_moment(&mut rng, 1200).await;
        running[0].kill9();
        running[0] = stage.start_with(processes[0]);
    }
    let report = traffic.stop().await.expect("traffic");
    assert!(report.changes > 100, "{report:?}");
    stage.equal(&running[0]).await;
    for pipeline in &mut running {
        assert!(pipeline.is_running(), "{}", pipeline.logs());
        stage.keeps_the_password(pipeline);
    }
}

#[tokio::test]
async fn the_whole_process_may_be_killed_at_any_moment() {
    survives_kills_of_the_first(&[&["run"]]).await;
}

#[tokio::test]
async fn capture_alone_may_be_killed_at_any_moment() {
    let (capture, sink) = (
        ["run", "--only", "capture"],
        ["run", "--only", "sink:replica"],
    );
    survives_kills_of_the_first(&[&capture, &sink]).await;
}

#[tokio::test]
async fn the_sink_alone_may_be_killed_at_any_moment() {
    let (capture, sink) = (
        ["run", "--only", "capture"],
        ["run", "--only", "sink:replica"],
    );
    survives_kills_of_the_first(&[&sink, &capture]).await;
}

#[tokio::test]
async fn the_broker_may_be_killed_at_any_moment() {
    let mut rng = seeded();
    let mut stage = Stage::set(shop_setting()).await;
    let traffic = traffic(&stage, &mut rng, RATE).await;
    let mut pipeline = stage.start();
    Stage::readyz(&mut pipeline, 200, "streaming").await;
    for _ in 0..4 {
        random_moment(&mut rng, 1200).await;
        stage.nats.kill9();
        random_moment(&mut rng, 700).await;
        stage.nats.start_again().await.expect("broker");
    }
    traffic.stop().await.expect("traffic");
    stage.equal(&pipeline).await;
    assert!(pipeline.is_running(), "{}", pipeline.logs());
}

#[tokio::test]
async fn the_target_connection_may_be_cut_in_the_middle_of_a_batch() {
    let mut rng = seeded();
    let stage = Stage::set(shop_setting()).await;
    let port = stage.postgres.port();
    let proxy = Proxy::start(format!("127.0.0.1:{port}"))
        .await
        .expect("proxy");
    let (source, target) = (stage.postgres.url("source"), stage.postgres.url("target"));
    let target = target.replace(&port.to_string(), &proxy.address().port().to_string());
    let folder = stage.config(&source, &target, &stage.nats.url()).write();
    let folder = folder.expect("folder");
    let traffic = traffic(&stage, &mut rng, RATE * 2).await;
    let mut pipeline = Stage::start_in(&folder, &["run"]);
    Stage::readyz(&mut pipeline, 200, "streaming").await;
    // Slow answers leave every cut in the middle of something.
    proxy.delay(Duration::from_millis(5));
    for _ in 0..6 {
        random_moment(&mut rng, 700).await;
        proxy.cut();
    }
    traffic.stop().await.expect("traffic");
    stage.equal(&pipeline).await;
    assert!(pipeline.is_running(), "{}", pipeline.logs());
}
