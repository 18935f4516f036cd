//! `millrace validate`: the configuration, checked without connecting to anything.

use std::fmt::Write;

use millrace_config::{Auth, Config, Exit, Secret, SinkType, Table};

/// Prints what the configuration says. The mistakes of one that is wrong were printed when it was loaded.
pub(crate) fn validate(config: &Config) -> Exit {
    for warning in missing_secrets(config) {
        super::say(&format!("warning: {warning}"));
    }
    super::answer(&summary(config));
    Exit::Ok
}

/// Secrets that are not there, by setting: they are only needed where `run` runs, so they are no error here.
/// Their values are looked at by nobody.
fn missing_secrets(config: &Config) -> Vec<String> {
    let mut secrets: Vec<(String, &Secret)> = vec![("source.url".to_owned(), &config.source.url)];
    secrets.extend(
        config
            .source
            .mask_salt
            .iter()
            .map(|salt| ("source.mask_salt".to_owned(), salt)),
    );
    match &config.stream.auth {
        Auth::None => {}
        Auth::Creds(secret) => secrets.push(("stream.creds".to_owned(), secret)),
        Auth::Nkey(secret) => secrets.push(("stream.nkey".to_owned(), secret)),
        Auth::Token(secret) => secrets.push(("stream.token".to_owned(), secret)),
    }
    secrets.extend(
        config
            .sinks
            .iter()
            .map(|sink| (format!("sinks.{}.url", sink.name), &sink.url)),
    );
    let warning = |(key, secret): (String, &Secret)| {
        let error = secret.read().err()?;
        Some(format!("{key}: {}", crate::connection::chain(&error)))
    };
    let secrets = secrets.into_iter().filter_map(warning);
    let files = [
        &config.stream.tls_ca,
        &config.stream.tls_cert,
        &config.stream.tls_key,
    ];
    let files = files.into_iter().flatten().filter(|path| !path.is_file());
    let files = files.map(|path| format!("there is no file {}", path.display()));
    secrets.chain(files).collect()
}

fn summary(config: &Config) -> String {
    let mut text = String::new();
    let servers: Vec<_> = config
        .stream
        .servers
        .iter()
        .map(ToString::to_string)
        .collect();
    let stream = millrace_event::subject::stream_name(&config.source.name);
    let _ = writeln!(
        text,
        "source  {} ({})",
        config.source.name,
        config.source.url.reference()
    );
    let _ = writeln!(text, "stream  {stream} at {}", servers.join(", "));
    for sink in &config.sinks {
        let SinkType::Postgres = sink.r#type;
        let tables = config.tables_of(&sink.name).count();
        let _ = writeln!(
            text,
            "sink    {} (postgres, {})",
            sink.name,
            counted(tables, "table")
        );
    }
    for table in &config.tables {
        let sinks = if table.sinks.is_empty() {
            "the stream only".to_owned()
        } else {
            table.sinks.join(", ")
        };
        let target = if table.target == table.name {
            String::new()
        } else {
            format!(" as {}", table.target)
        };
        let selection = selection(table);
        let _ = writeln!(text, "table   {} -> {sinks}{target}{selection}", table.name);
    }
    let _ = writeln!(text, "the configuration is valid");
    text
}

/// What is done about a table's columns and rows.
fn selection(table: &Table) -> String {
    let columns = &table.columns;
    let mut parts = Vec::new();
    if !columns.exclude.is_empty() {
        parts.push(format!("without {}", columns.exclude.join(", ")));
    }
    let masks = columns.mask.iter();
    parts.extend(masks.map(|(column, mask)| format!("{column} by {mask}")));
    let renames = columns.rename.iter();
    parts.extend(renames.map(|(from, to)| format!("{from} as {to}")));
    if let Some(filter) = &table.filter {
        parts.push(format!("where {}", filter.sql.trim()));
    }
    match parts.is_empty() {
        true => String::new(),
        false => format!(" ({})", parts.join("; ")),
    }
}

fn counted(count: usize, noun: &str) -> String {
    if count == 1 {
        format!("1 {noun}")
    } else {
        format!("{count} {noun}s")
    }
}
