//! Settings whose syntax is fixed and whose effect is not built yet.

use std::collections::BTreeMap;

use crate::Place;
use crate::error::ConfigError;
use crate::settings::{Config, Confirm, Guard, Mode, OnDelete, OnTruncate};

/// One error for each setting that this release cannot honour. A later release drops lines here.
pub(crate) fn refusals(config: &Config, places: &BTreeMap<String, Place>) -> Vec<ConfigError> {
    let mut refused: Vec<(bool, String, &str)> = vec![
        (
            config.stream.confirm == Confirm::Applied,
            "stream.confirm".into(),
            "\"applied\"",
        ),
        (
            config.stream.partitions > 1,
            "stream.partitions".into(),
            "more than 1",
        ),
    ];
    for sink in &config.sinks {
        let key = |key: &str| format!("sinks.{}.{key}", sink.name);
        refused.push((sink.guard == Guard::Sidecar, key("guard"), "\"sidecar\""));
        refused.push((sink.mode == Mode::Parallel, key("mode"), "\"parallel\""));
    }
    for table in &config.tables {
        let key = |key: &str| format!("tables.{}.{key}", table.name);
        let soft = matches!(table.on_delete, OnDelete::Soft(_));
        let park = table.on_truncate == OnTruncate::Park;
        refused.push((soft, key("on_delete"), "\"soft:<column>\""));
        refused.push((park, key("on_truncate"), "\"park\""));
    }
    let refused = refused.into_iter().filter(|(refused, ..)| *refused);
    refused
        .map(|(_, path, what)| error(places, &path, what))
        .collect()
}

fn error(places: &BTreeMap<String, Place>, path: &str, what: &str) -> ConfigError {
    let key = path.rsplit('.').next().unwrap_or(path);
    // A table's own key, else the default that it inherits.
    let place = places
        .get(path)
        .or_else(|| places.get(&format!("defaults.{key}")))
        .cloned()
        .unwrap_or_else(|| Place::whole(path));
    let message = format!("{key:?}: {what} is not supported in this release");
    ConfigError {
        place,
        message,
        did_you_mean: None,
    }
}
