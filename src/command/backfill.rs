//! `millrace backfill`: has rows of a table read again for a sink, and shows and steers what is under way.
//!
//! An order is written where the sink finds it, so nothing here needs a running process, and a sink that does not
//! run carries it out when it does.

mod bucket;
mod held;
mod orders;
mod report;
mod selection;
mod source;
mod wait;

use std::collections::{BTreeMap, BTreeSet};

use futures_util::future::join_all;
use millrace_config::{Code, Condition, Config, Exit, Sink, Table};
use millrace_connect::clock::now_us;
use millrace_event::work::BackfillOrder;

use super::status::SinkSeen;
use crate::arguments::{
    BackfillResume, BackfillStart, BackfillStatus, BackfillTables, BackfillVerb, Output,
};
use bucket::{Bucket, Told};
use held::{held, is_stopped};
use orders::{At, Change, Decided};
use report::{Known, Report, Unreachable};
use selection::Pair;

/// What the servers' monitoring shows.
const NAME: &str = "millrace backfill";

/// Why nothing was done.
enum Refusal {
    /// The command line is wrong.
    Usage(String),
    /// The condition on its rows is wrong.
    Filter(Condition),
    /// What must hold does not.
    Conditions(Vec<Condition>),
    /// A bug.
    Internal(String),
}

impl From<Condition> for Refusal {
    fn from(condition: Condition) -> Self {
        Self::Conditions(vec![condition])
    }
}

impl Refusal {
    /// Says it.
    fn report(self) -> Exit {
        let (conditions, exit) = match self {
            Self::Usage(message) => return super::usage(&message),
            Self::Internal(message) => {
                super::say(&format!("error: {message}"));
                return Exit::Internal;
            }
            Self::Filter(condition) => (vec![condition], Exit::Usage),
            Self::Conditions(conditions) => (conditions, Exit::Environment),
        };
        for condition in conditions {
            super::say(&format!("error: {condition}\n  do: {}", condition.remedy));
        }
        exit
    }
}

/// Does what the verb says.
pub(crate) async fn backfill(config: &Config, verb: BackfillVerb) -> Exit {
    let done = match verb {
        BackfillVerb::Start(asked) => Box::pin(start(config, &asked)).await,
        BackfillVerb::Status(asked) => Box::pin(status(config, &asked)).await,
        BackfillVerb::Pause(tables) => Box::pin(change(config, &tables, Change::Pause)).await,
        BackfillVerb::Resume(BackfillResume { tables, rate }) => {
            Box::pin(change(config, &tables, Change::Resume(rate))).await
        }
        BackfillVerb::Cancel(tables) => Box::pin(change(config, &tables, Change::Cancel)).await,
    };
    done.unwrap_or_else(Refusal::report)
}

/// The pairs of one sink.
type BySink<'c> = BTreeMap<&'c str, (&'c Sink, Vec<&'c Table>)>;

fn by_sink<'c>(pairs: &[Pair<'c>]) -> BySink<'c> {
    let mut sinks = BySink::new();
    for Pair { sink, table } in pairs {
        let entry = sinks.entry(sink.name.as_str());
        entry.or_insert_with(|| (*sink, Vec::new())).1.push(*table);
    }
    sinks
}

/// What each sink's target says, or why that is not known.
type Standings<'c> = BTreeMap<&'c str, Result<SinkSeen, Condition>>;

async fn standings<'c>(sinks: &BySink<'c>) -> Standings<'c> {
    let seen = sinks.values().map(|(sink, _)| super::status::target(sink));
    sinks.keys().copied().zip(join_all(seen).await).collect()
}

fn at<'a>(sink: &'a str, table: &'a Table, standings: &'a Standings<'_>) -> At<'a> {
    At {
        sink,
        table: &table.name,
        progress: match &standings[sink] {
            Ok(seen) => Ok(seen.row.as_ref().map(|row| &row.copy)),
            Err(condition) => Err(condition),
        },
    }
}

async fn start(config: &Config, asked: &BackfillStart) -> Result<Exit, Refusal> {
    let pairs = selection::tables(config, &asked.tables).map_err(Refusal::Usage)?;
    let tables: Vec<Table> = config
        .tables
        .iter()
        .filter(|table| pairs.iter().any(|pair| pair.table.name == table.name))
        .cloned()
        .collect();
    let warning = source::check(config, &tables, asked.filter.as_deref()).await?;
    let sinks = by_sink(&pairs);
    let bucket = Bucket::open(config).await?;
    let standings = standings(&sinks).await;

    let wanted: Vec<(&str, BackfillOrder)> = pairs
        .iter()
        .enumerate()
        .map(|(index, pair)| {
            let order = BackfillOrder {
                filter: asked.filter.clone(),
                rows_per_second: asked.rate,
                ..BackfillOrder::new(orders::new_id(now_us(), index), pair.table.name.clone())
            };
            (pair.sink.name.as_str(), order)
        })
        .collect();
    let decide = |sink: &str, listed: &[BackfillOrder]| {
        let mut decided = Decided::from(listed);
        for (_, order) in wanted.iter().filter(|(of, _)| *of == sink) {
            let table = pairs.iter().find(|pair| pair.table.name == order.table);
            let table = table.expect("an order is for a selected table").table;
            let at = at(sink, table, &standings);
            decided.note(orders::start(&decided.orders, &at, order));
        }
        decided.all_or_nothing(listed)
    };
    let mut refused = Vec::new();
    for sink in sinks.keys() {
        let listed = bucket.orders(sink).await?.orders;
        refused.extend(decide(sink, &listed).refused);
    }
    if !refused.is_empty() {
        return Err(Refusal::Conditions(refused));
    }
    if let Some(warning) = warning {
        super::say(&format!("warning: {warning}\n  do: {}", warning.remedy));
    }
    let mut followed = Vec::new();
    for sink in sinks.keys() {
        let written = bucket.change(sink, |listed| decide(sink, listed)).await;
        let (decided, revision) = written.map_err(Refusal::from)?;
        if !decided.refused.is_empty() {
            return Err(Refusal::Conditions(decided.refused));
        }
        super::answer(&decided.lines());
        if standings[sink].as_ref().is_ok_and(is_stopped) {
            super::say(&format!(
                "no process runs sink {sink} now: it begins when one does"
            ));
        }
        let own = wanted.iter().filter(|(of, _)| of == sink);
        followed.extend(own.map(|(_, order)| wait::Followed::new(sink, order, revision)));
    }
    if asked.wait {
        return Ok(wait::wait(config, &bucket, followed).await);
    }
    Ok(Exit::Ok)
}

async fn change(config: &Config, asked: &BackfillTables, change: Change) -> Result<Exit, Refusal> {
    let pairs = selection::tables(config, asked).map_err(Refusal::Usage)?;
    let sinks = by_sink(&pairs);
    let bucket = Bucket::open(config).await?;
    let standings = standings(&sinks).await;
    let decide = |sink: &str, listed: &[BackfillOrder]| {
        let mut decided = Decided::from(listed);
        for (index, table) in sinks[sink].1.iter().enumerate() {
            let id = orders::new_id(now_us(), index);
            let at = at(sink, table, &standings);
            decided.note(orders::change(&decided.orders, &at, change, id));
        }
        decided
    };
    let mut before = Vec::new();
    for sink in sinks.keys() {
        let listed = bucket.orders(sink).await?.orders;
        before.push(decide(sink, &listed));
    }
    let refused = before.iter().flat_map(|decided| &decided.refused);
    // Where several are meant, those that there are count; something that is unknown is told in any case.
    let told: Vec<Condition> = refused
        .clone()
        .filter(|condition| condition.code != Code::BackfillNone)
        .cloned()
        .collect();
    if before.iter().all(|decided| decided.said.is_empty()) {
        return match (told.is_empty(), asked.all) {
            (false, _) => Err(Refusal::Conditions(told)),
            (true, true) => {
                super::answer("no backfill is under way\n");
                Ok(Exit::Ok)
            }
            (true, false) => Err(Refusal::Conditions(refused.cloned().collect())),
        };
    }
    for sink in sinks.keys() {
        let (decided, _) = bucket.change(sink, |listed| decide(sink, listed)).await?;
        super::answer(&decided.lines());
    }
    for condition in told {
        super::say(&format!(
            "left as it is: {condition}\n  do: {}",
            condition.remedy
        ));
    }
    Ok(Exit::Ok)
}

async fn status(config: &Config, asked: &BackfillStatus) -> Result<Exit, Refusal> {
    let (table, sink) = (asked.table.as_deref(), asked.sink.as_deref());
    let pairs = selection::pairs(config, table, sink).map_err(Refusal::Usage)?;
    let report = Box::pin(look(config, &pairs)).await;
    match asked.output {
        Output::Table => super::answer(&report.render()),
        Output::Json => match serde_json::to_string_pretty(&report) {
            Ok(text) => super::answer(&format!("{text}\n")),
            Err(error) => {
                let message = format!("the answer cannot be written as JSON: {error}");
                return Err(Refusal::Internal(message));
            }
        },
    }
    Ok(Exit::Ok)
}

/// Everything about these tables that can be seen now.
async fn look(config: &Config, pairs: &[Pair<'_>]) -> Report {
    let sinks = by_sink(pairs);
    let names: Vec<&str> = sinks.keys().copied().collect();
    let tables: BTreeSet<_> = pairs.iter().map(|pair| &pair.table.name).collect();
    let (standings, stored, estimates) = tokio::join!(
        standings(&sinks),
        stored(config, &names),
        source::estimates(config, &tables),
    );
    let mut unreachable = Vec::new();
    for (sink, standing) in &standings {
        if let Err(condition) = standing {
            unreachable.push(Unreachable::new(&format!("sink {sink}"), condition));
        }
    }
    let Stored { told, last_seq } = stored.unwrap_or_else(|condition| {
        unreachable.push(Unreachable::new("stream", &condition));
        Stored::default()
    });
    let estimates = estimates.unwrap_or_else(|condition| {
        unreachable.push(Unreachable::new("source", &condition));
        BTreeMap::new()
    });
    let nothing = Told::default();
    let now_us = now_us();
    let lines = pairs.iter().map(|pair| {
        let sink = pair.sink.name.as_str();
        let seen = standings[sink].as_ref().ok();
        Known {
            at: at(sink, pair.table, &standings),
            told: told.get(sink).unwrap_or(&nothing),
            estimate: estimates.get(&pair.table.name).copied(),
            filtered: pair.table.filter.is_some(),
            held: seen.and_then(|seen| held(seen, last_seq, now_us)),
            now_us,
        }
        .line()
    });
    Report {
        backfills: lines.collect(),
        unreachable,
    }
}

/// What is stored beside the source's stream, and up to where that goes.
#[derive(Default)]
struct Stored<'c> {
    /// What is told about each sink's copies.
    told: BTreeMap<&'c str, Told>,
    /// The newest message's stream sequence, where it is known.
    last_seq: Option<u64>,
}

async fn stored<'c>(config: &Config, sinks: &[&'c str]) -> Result<Stored<'c>, Condition> {
    let mut stored = Stored::default();
    let bucket = match Bucket::open(config).await {
        Ok(bucket) => bucket,
        // Capture has never run: nothing was ever told.
        Err(condition) if condition.code == Code::BackfillNotReady => return Ok(stored),
        Err(condition) => return Err(condition),
    };
    stored.last_seq = bucket.last_seq().await?;
    for sink in sinks {
        stored.told.insert(*sink, bucket.told(sink).await?);
    }
    Ok(stored)
}
