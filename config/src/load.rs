//! Reads the configuration directory.

mod columns;
mod sections;
mod tables;

use std::cell::RefCell;
use std::path::Path;

use toml::de::DeTable;

use crate::error::{ConfigError, ConfigErrors};
use crate::reader::Section;
use crate::report::{Context, Document, Report};
use crate::{Config, Place, unbuilt};

/// The main file.
const MAIN: &str = "millrace.toml";

/// The folder of the table files.
const TABLES: &str = "tables";

impl Config {
    /// Reads `millrace.toml` and `tables/*.toml` of a directory. `env` looks up environment variables:
    /// `MILLRACE_SOURCE__URL` overrides `source.url`, and so on for every key that holds one value.
    ///
    /// # Errors
    /// Every mistake at once: files that cannot be read, syntax, unknown keys, values that are wrong, missing,
    /// contradict each other or are not built yet.
    pub fn load(dir: &Path, env: &dyn Fn(&str) -> Option<String>) -> Result<Self, ConfigErrors> {
        let context = Context {
            dir,
            env,
            report: RefCell::new(Report::default()),
        };
        let config = read(&context);
        let mut report = context.report.into_inner();
        if let Some(config) = &config {
            report
                .errors
                .extend(unbuilt::refusals(config, &report.places));
        }
        match (config, ConfigErrors::new(report.errors)) {
            (_, Some(errors)) => Err(errors),
            (Some(config), None) => Ok(config),
            (None, None) => unreachable!("a setting is missing only where its error was reported"),
        }
    }
}

fn read(context: &Context<'_>) -> Option<Config> {
    if !context.dir.is_dir() {
        let place = Place::whole(context.dir.display().to_string());
        context.error(place, "there is no such directory");
        return None;
    }
    let main = read_file(context, MAIN);
    let (sections, sinks, defaults) = match &main {
        Some(document) => read_document(context, document, "", sections::read),
        None => (None, Vec::new(), tables::Keys::default()),
    };
    let known = main.is_some().then_some(sinks.as_slice());
    let tables = tables::read(context, known, &defaults);
    let sections = sections?;
    Some(Config {
        dir: context.dir.to_owned(),
        source: sections.source,
        stream: sections.stream,
        sinks: sections.sinks,
        tables,
        admin: sections.admin,
        log: sections.log,
    })
}

/// The text of a file of the directory.
fn read_file(context: &Context<'_>, name: &str) -> Option<Document> {
    match std::fs::read_to_string(context.dir.join(name)) {
        Ok(text) => Some(Document {
            name: name.to_owned(),
            text,
        }),
        Err(error) => {
            context.error(
                Place::whole(name),
                format!("the file cannot be read: {error}"),
            );
            None
        }
    }
}

/// Parses a document and reads what could be parsed of it. Mistakes on a line that has a syntax error are left
/// out: they follow from it.
fn read_document<T>(
    context: &Context<'_>,
    document: &Document,
    path: &str,
    read: impl FnOnce(&Section<'_>) -> T,
) -> T {
    let (table, syntax) = DeTable::parse_recoverable(&document.text);
    let before = context.report.borrow().errors.len();
    let section = Section::root(context, document, table.get_ref(), path, !syntax.is_empty());
    let value = read(&section);
    section.finish();
    let mut report = context.report.borrow_mut();
    let mut lines = Vec::new();
    for error in syntax {
        let place = document.place(error.span().map_or(0, |span| span.start));
        let line = place.at.map(|(line, _)| line);
        // A second syntax error of a line follows from the first.
        if !lines.contains(&line) {
            lines.push(line);
            let message = error.message().replace('\n', " ");
            report.errors.push(ConfigError {
                place,
                message,
                did_you_mean: None,
            });
        }
    }
    let syntax_from = report.errors.len() - lines.len();
    let mut index = 0;
    report.errors.retain(|error| {
        let own = (before..syntax_from).contains(&index);
        index += 1;
        !(own
            && error.place.file == document.name
            && lines.contains(&error.place.at.map(|(line, _)| line)))
    });
    value
}

#[cfg(test)]
mod tests;
