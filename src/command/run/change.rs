//! What a changed configuration means for a running process. Pure.

use std::collections::BTreeSet;

use millrace_config::{Config, Sink, Table};
use millrace_event::TableName;

use crate::arguments::Part;

/// What is different.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Change {
    /// Whether the capture must begin anew.
    pub(super) capture: bool,
    /// The sinks that must begin anew, are new, or are gone.
    pub(super) sinks: BTreeSet<String>,
    /// What has changed, a phrase each.
    pub(super) said: Vec<String>,
    /// What has changed and needs a restart of the process: it stays as it was.
    pub(super) left: Vec<&'static str>,
}

/// Compares the configuration of a running process with the one that its folder has now.
///
/// # Errors
/// It is the configuration of another pipeline.
pub(super) fn compare(old: &Config, new: &Config) -> Result<Change, String> {
    if old.source.name != new.source.name {
        return Err(format!(
            "source.name was changed from {:?} to {:?}: that is another pipeline, which needs a process of its own; \
             nothing was changed",
            old.source.name, new.source.name
        ));
    }
    let mut change = Change::default();
    for (is, key) in [
        (old.admin != new.admin, "admin.listen"),
        (old.log != new.log, "log"),
    ] {
        change.left.extend(is.then_some(key));
    }
    let shared = old.stream != new.stream;
    for (is, section) in [(old.source != new.source, "source"), (shared, "stream")] {
        change.said.extend(is.then(|| format!("{section} changed")));
    }
    let names = |config: &Config| -> BTreeSet<TableName> {
        config
            .tables
            .iter()
            .map(|table| table.name.clone())
            .collect()
    };
    for name in names(old).union(&names(new)) {
        let found = |config: &Config| {
            let mut table = config
                .tables
                .iter()
                .find(|table| table.name == *name)?
                .clone();
            // By default a table goes to every sink: one that comes or goes is told as such.
            let stays = |sink: &String| old.sink(sink).is_some() && new.sink(sink).is_some();
            table.sinks.retain(stays);
            Some(table)
        };
        let (was, is) = (found(old), found(new));
        change
            .said
            .extend(told(&format!("table {name}"), was.as_ref(), is.as_ref()));
    }
    let names = |config: &Config| -> BTreeSet<String> {
        config.sinks.iter().map(|sink| sink.name.clone()).collect()
    };
    for name in names(old).union(&names(new)) {
        let (was, is) = (old.sink(name), new.sink(name));
        let said = told(&format!("sink {name}"), was, is);
        if said.is_some() || shared || received(old, name) != received(new, name) {
            change.sinks.insert(name.clone());
        }
        change.said.extend(said);
    }
    change.capture = shared
        || old.source != new.source
        || old.tables != new.tables
        || !old
            .sinks
            .iter()
            .map(captured)
            .eq(new.sinks.iter().map(captured));
    Ok(change)
}

/// What a capture knows of a sink.
fn captured(sink: &Sink) -> (&str, bool) {
    (&sink.name, sink.required)
}

/// The tables that a sink receives, whoever else does.
fn received(config: &Config, sink: &str) -> Vec<Table> {
    let tables = config.tables_of(sink).map(|table| Table {
        sinks: Vec::new(),
        ..table.clone()
    });
    tables.collect()
}

fn told<T: PartialEq>(what: &str, was: Option<&T>, is: Option<&T>) -> Option<String> {
    match (was, is) {
        (None, _) => Some(format!("{what} added")),
        (_, None) => Some(format!("{what} removed")),
        (was, is) if was != is => Some(format!("{what} changed")),
        _ => None,
    }
}

impl Change {
    /// Whether a part must begin anew, is new, or is gone.
    pub(super) fn concerns(&self, part: &Part) -> bool {
        match part {
            Part::Capture => self.capture,
            Part::Sink(name) => self.sinks.contains(name),
        }
    }

    /// What has changed, in one line.
    pub(super) fn summary(&self) -> String {
        match self.said.is_empty() {
            true => "nothing has changed".to_owned(),
            false => self.said.join(", "),
        }
    }

    /// What only a restart changes, in one line.
    pub(super) fn needs_restart(&self) -> Option<String> {
        (!self.left.is_empty()).then(|| {
            format!(
                "{} changed too, and stays as it was until the process is started again",
                self.left.join(" and ")
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// A configuration with these tables (name and text) and sinks (name and further lines).
    fn config(name: &str, tables: &[(&str, &str)], sinks: &[(&str, &str)]) -> Config {
        let folder = tempfile::tempdir().expect("made");
        let dir = folder.path();
        let mut text = format!(
            "[source]\nname = {name:?}\nurl = \"postgres://s/d\"\n[stream]\nservers = [\"nats://n\"]\n"
        );
        for (sink, lines) in sinks {
            text += &format!(
                "[sinks.{sink}]\ntype = \"postgres\"\nurl = \"postgres://t/d\"\n{lines}\n"
            );
        }
        fs::create_dir_all(dir.join("tables")).expect("made");
        fs::write(dir.join("millrace.toml"), text).expect("written");
        for (table, text) in tables {
            fs::write(dir.join(format!("tables/{table}.toml")), text).expect("written");
        }
        let mut config = Config::load(dir, &|_| None).expect("valid");
        config.dir = "etc".into();
        config
    }

    fn sinks(change: &Change) -> Vec<&str> {
        change.sinks.iter().map(String::as_str).collect()
    }

    #[test]
    fn only_what_a_change_concerns_begins_anew() {
        let (a, b) = (("public.a", ""), ("public.b", "sinks = [\"x\"]"));
        let both = [("x", ""), ("y", "")];
        let old = config("shop", &[a], &both);
        let same = compare(&old, &old.clone()).expect("one pipeline");
        assert_eq!(same, Change::default());
        assert_eq!(same.summary(), "nothing has changed");

        let added = compare(&old, &config("shop", &[a, b], &both)).expect("one pipeline");
        assert!(added.capture);
        assert_eq!(sinks(&added), ["x"]);
        assert_eq!(added.summary(), "table public.b added");

        let sink = [("x", ""), ("y", ""), ("z", "")];
        let added = compare(&old, &config("shop", &[a], &sink)).expect("one pipeline");
        // By default a table goes to every sink; those that have it already are not touched.
        assert!(added.capture);
        assert_eq!(
            (sinks(&added), added.summary()),
            (vec!["z"], "sink z added".to_owned())
        );

        let paced = [("x", "batch = { max_rows = 7 }"), ("y", "")];
        let paced = compare(&old, &config("shop", &[a], &paced)).expect("one pipeline");
        assert!(
            !paced.capture,
            "a sink's own settings are none of the capture's"
        );
        assert_eq!(
            (sinks(&paced), paced.summary()),
            (vec!["x"], "sink x changed".to_owned())
        );

        let removed = compare(&old, &config("shop", &[a], &both[..1])).expect("one pipeline");
        assert!(removed.capture && removed.sinks.contains("y"));
    }

    #[test]
    fn what_a_running_process_cannot_change_is_said() {
        let old = config("shop", &[("public.a", "")], &[("x", "")]);
        let other = config("store", &[("public.a", "")], &[("x", "")]);
        assert!(compare(&old, &other).is_err());
        let mut moved = old.clone();
        moved.admin.listen = ([127, 0, 0, 1], 1).into();
        let change = compare(&old, &moved).expect("one pipeline");
        assert_eq!(change.left, ["admin.listen"]);
        assert!(!change.capture && change.sinks.is_empty() && change.said.is_empty());
    }
}
