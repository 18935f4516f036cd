//! Which tables of which sinks the command line means. Pure.

use millrace_config::{Config, Sink, Table};

use crate::arguments::BackfillTables;

/// A word that is less like a known one than this is not taken for it.
const SIMILARITY_MIN: f64 = 0.8;
/// So many names are listed for somebody who named none.
const NAMES_MAX: usize = 20;

/// A table of a sink.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pair<'c> {
    /// The sink.
    pub(super) sink: &'c Sink,
    /// The table, which the sink receives.
    pub(super) table: &'c Table,
}

/// What a verb is for that changes something: a table must be named, or all of them.
///
/// # Errors
/// What is wrong with the command line.
pub(super) fn tables<'c>(
    config: &'c Config,
    asked: &BackfillTables,
) -> Result<Vec<Pair<'c>>, String> {
    if asked.table.is_none() && !asked.all {
        let known = config.tables.iter().map(|table| table.name.to_string());
        return Err(format!(
            "name a table, or pass --all for every table; configured: {}",
            listed(known)
        ));
    }
    pairs(config, asked.table.as_deref(), asked.sink.as_deref())
}

/// The pairs of this table, or of every table, and of this sink, or of every sink. Never empty.
///
/// # Errors
/// What is wrong with the command line.
pub(super) fn pairs<'c>(
    config: &'c Config,
    table: Option<&str>,
    sink: Option<&str>,
) -> Result<Vec<Pair<'c>>, String> {
    let table = table.map(|text| find_table(config, text)).transpose()?;
    let sink = sink.map(|name| find_sink(config, name)).transpose()?;
    let sinks = config.sinks.iter();
    let sinks = sinks.filter(|known| sink.is_none_or(|sink| sink.name == known.name));
    let pairs: Vec<_> = sinks
        .flat_map(|sink| {
            let tables = config.tables_of(&sink.name);
            tables.map(move |table| Pair { sink, table })
        })
        .filter(|pair| table.is_none_or(|table| table.name == pair.table.name))
        .collect();
    if !pairs.is_empty() {
        return Ok(pairs);
    }
    Err(match (table, sink) {
        (Some(table), Some(sink)) => format!(
            "sink {} does not receive table {}; its sinks: {}",
            sink.name,
            table.name,
            listed(table.sinks.iter().cloned())
        ),
        (Some(table), None) => format!("no sink receives table {}", table.name),
        (None, Some(sink)) => format!("sink {} receives no table", sink.name),
        (None, None) => "no sink receives any table".to_owned(),
    })
}

fn find_table<'c>(config: &'c Config, text: &str) -> Result<&'c Table, String> {
    let is_meant = |table: &&Table| {
        let name = &table.name;
        name.to_string() == text || (name.schema == "public" && name.table == text)
    };
    if let Some(table) = config.tables.iter().find(is_meant) {
        return Ok(table);
    }
    let known: Vec<_> = config
        .tables
        .iter()
        .map(|table| table.name.to_string())
        .collect();
    // One that is spelt right in another schema is nearer than any other.
    let same = config.tables.iter().find(|table| table.name.table == text);
    let near = same.map(|table| table.name.to_string());
    let near = near.or_else(|| nearest_table(config, text));
    Err(unknown("table", text, near, known))
}

fn find_sink<'c>(config: &'c Config, name: &str) -> Result<&'c Sink, String> {
    config.sink(name).ok_or_else(|| {
        let known: Vec<_> = config.sinks.iter().map(|sink| sink.name.clone()).collect();
        unknown("sink", name, nearest(name, &known), known)
    })
}

fn unknown(what: &str, text: &str, near: Option<String>, known: Vec<String>) -> String {
    let hint = match near {
        Some(near) => format!("did you mean {near:?}?"),
        None => format!("configured: {}", listed(known.into_iter())),
    };
    format!("there is no {what} {text:?} in the configuration; {hint}")
}

fn nearest(word: &str, known: &[String]) -> Option<String> {
    let candidates = known.iter();
    most(candidates.map(|candidate| (strsim::jaro_winkler(word, candidate), candidate.clone())))
}

/// Schema and table are compared apart: a long schema would make everything in it alike.
fn nearest_table(config: &Config, text: &str) -> Option<String> {
    let (schema, table) = text.split_once('.').unwrap_or(("public", text));
    let candidates = config.tables.iter().map(|known| &known.name);
    most(candidates.map(|name| {
        let schema = strsim::jaro_winkler(schema, &name.schema);
        let table = strsim::jaro_winkler(table, &name.table);
        (schema.min(table), name.to_string())
    }))
}

/// The word that is most like the one written, if any is like it at all.
fn most(candidates: impl Iterator<Item = (f64, String)>) -> Option<String> {
    candidates
        .filter(|(similarity, _)| *similarity >= SIMILARITY_MIN)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}

fn listed(names: impl ExactSizeIterator<Item = String>) -> String {
    let more = names.len().saturating_sub(NAMES_MAX);
    let mut text = names.take(NAMES_MAX).collect::<Vec<_>>().join(", ");
    if text.is_empty() {
        text.push_str("none");
    }
    if more > 0 {
        text.push_str(&format!(", and {more} more"));
    }
    text
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn config() -> Config {
        let dir = tempfile::tempdir().expect("folder");
        let toml = "[source]\nname = \"shop\"\nurl = { env = \"A\" }\n\
            [stream]\nservers = [\"nats://h\"]\n\
            [sinks.archive]\ntype = \"postgres\"\nurl = { env = \"A\" }\n\
            [sinks.warehouse]\ntype = \"postgres\"\nurl = { env = \"A\" }\n\
            [sinks.idle]\ntype = \"postgres\"\nurl = { env = \"A\" }\n";
        fs::write(dir.path().join("millrace.toml"), toml).expect("file");
        fs::create_dir(dir.path().join("tables")).expect("folder");
        for (name, sinks) in [
            ("public.orders", r#"["archive", "warehouse"]"#),
            ("public.items", r#"["warehouse"]"#),
            ("Sales.regions", r#"["warehouse"]"#),
        ] {
            let file = dir.path().join(format!("tables/{name}.toml"));
            fs::write(file, format!("sinks = {sinks}")).expect("file");
        }
        let environment = |name: &str| (name == "A").then(|| "postgres://h/d".to_owned());
        Config::load(dir.path(), &environment).unwrap_or_else(|errors| panic!("{errors}"))
    }

    fn found(table: Option<&str>, sink: Option<&str>) -> Result<Vec<String>, String> {
        let config = config();
        let pairs = pairs(&config, table, sink)?;
        let text = |pair: &Pair<'_>| format!("{}/{}", pair.sink.name, pair.table.name);
        Ok(pairs.iter().map(text).collect())
    }

    #[test]
    fn a_table_means_all_its_sinks_and_no_schema_means_public() {
        let both = ["archive/public.orders", "warehouse/public.orders"];
        assert_eq!(found(Some("orders"), None).expect("found"), both);
        assert_eq!(found(Some("public.orders"), None).expect("found"), both);
        assert_eq!(
            found(Some("orders"), Some("archive")).expect("found"),
            both[..1]
        );
        assert_eq!(
            found(Some("Sales.regions"), None).expect("found"),
            ["warehouse/Sales.regions"]
        );
        assert_eq!(found(None, Some("warehouse")).expect("found").len(), 3);
        assert_eq!(found(None, None).expect("found").len(), 4);
    }

    #[test]
    fn what_is_not_there_is_said_with_what_may_be_meant() {
        for (table, sink, said) in [
            (Some("ordres"), None, "did you mean \"public.orders\"?"),
            (Some("regions"), None, "did you mean \"Sales.regions\"?"),
            (
                Some("zzz"),
                None,
                "configured: Sales.regions, public.items, public.orders",
            ),
            (
                Some("orders"),
                Some("warehose"),
                "did you mean \"warehouse\"?",
            ),
            (
                Some("items"),
                Some("archive"),
                "sink archive does not receive table public.items; its sinks: warehouse",
            ),
            (None, Some("idle"), "sink idle receives no table"),
        ] {
            let error = found(table, sink).expect_err("wrong");
            assert!(error.contains(said), "{error}");
        }
    }

    #[test]
    fn a_verb_that_changes_something_is_told_what() {
        let config = config();
        let mut asked = BackfillTables {
            table: None,
            all: false,
            sink: None,
        };
        let error = tables(&config, &asked).expect_err("nothing is named");
        assert!(
            error.contains("--all") && error.contains("public.items"),
            "{error}"
        );
        asked.all = true;
        assert_eq!(tables(&config, &asked).expect("all").len(), 4);
    }
}
