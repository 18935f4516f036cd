//! `millrace validate`: the configuration, checked without connecting to anything.

use std::fmt::Write;

use millrace_config::{Auth, Config, Exit, Secret, SinkType};

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
        let _ = writeln!(text, "table   {} -> {sinks}{target}", table.name);
    }
    let _ = writeln!(text, "the configuration is valid");
    text
}

fn counted(count: usize, noun: &str) -> String {
    if count == 1 {
        format!("1 {noun}")
    } else {
        format!("{count} {noun}s")
    }
}
