//! Reads tables of a TOML document key by key, collecting every mistake with its place.
//!
//! A getter returns nothing both for a key that is absent and for one that is wrong; the mistake is in the
//! report then, and the caller goes on with the default, so that one mistake hides no other.

use std::cell::RefCell;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use bytesize::ByteSize;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::report::{Context, Document};
use crate::{Place, Secret};

/// One table of a document; one that is absent reads as empty.
pub(crate) struct Section<'a> {
    pub(crate) context: &'a Context<'a>,
    pub(crate) document: &'a Document,
    table: Option<&'a DeTable<'a>>,
    /// Where the table starts.
    pub(crate) place: Place,
    /// The table's own path: `sinks.warehouse`.
    path: String,
    /// Whether the environment may override its keys.
    overridable: bool,
    /// Whether the document has syntax errors: a key that seems absent may only be unreadable.
    broken: bool,
    asked: RefCell<Vec<&'static str>>,
}

/// A value that was found, and where.
pub(crate) struct Found<'a> {
    value: Raw<'a>,
    pub(crate) place: Place,
}

enum Raw<'a> {
    Toml(&'a DeValue<'a>),
    Env(String),
}

impl<'a> Section<'a> {
    /// The table of a whole document.
    pub(crate) fn root(
        context: &'a Context<'a>,
        document: &'a Document,
        table: &'a DeTable<'a>,
        path: &str,
        broken: bool,
    ) -> Self {
        Self {
            context,
            document,
            table: Some(table),
            place: document.place(0),
            path: path.to_owned(),
            overridable: path.is_empty(),
            broken,
            asked: RefCell::default(),
        }
    }

    fn child(&self, key: &str, found: Option<(&'a DeTable<'a>, Place)>) -> Self {
        let path = if self.path.is_empty() {
            key.to_owned()
        } else {
            format!("{}.{key}", self.path)
        };
        let (table, place) = match found {
            Some((table, place)) => (Some(table), place),
            None => (None, self.place.clone()),
        };
        Section {
            context: self.context,
            document: self.document,
            table,
            place,
            path,
            overridable: self.overridable,
            broken: self.broken,
            asked: RefCell::default(),
        }
    }

    fn entry(&self, key: &str) -> Option<&'a Spanned<DeValue<'a>>> {
        self.table?
            .iter()
            .find(|(name, _)| name.get_ref() == key)
            .map(|(_, value)| value)
    }

    /// The value of a key: the environment's, else the file's.
    pub(crate) fn get(&self, key: &'static str) -> Option<Found<'a>> {
        self.asked.borrow_mut().push(key);
        let path = if self.path.is_empty() {
            key.to_owned()
        } else {
            format!("{}.{key}", self.path)
        };
        let overridden = self.overridable.then(|| variable(&path)).and_then(|name| {
            let value = (self.context.env)(&name)?;
            Some(Found {
                value: Raw::Env(value),
                place: Place::whole(name),
            })
        });
        let found = overridden.or_else(|| {
            let value = self.entry(key)?;
            let place = self.document.place(value.span().start);
            Some(Found {
                value: Raw::Toml(value.get_ref()),
                place,
            })
        })?;
        self.context
            .report
            .borrow_mut()
            .places
            .insert(path, found.place.clone());
        Some(found)
    }

    /// The table under a key; an empty one if there is none.
    pub(crate) fn section(&self, key: &'static str) -> Section<'a> {
        self.asked.borrow_mut().push(key);
        let found = self.entry(key).and_then(|value| self.as_table(key, value));
        let set = found.is_some();
        let child = self.child(key, found);
        if set {
            let mut report = self.context.report.borrow_mut();
            report
                .places
                .insert(child.path.clone(), child.place.clone());
        }
        child
    }

    /// Whether a key is in the file.
    pub(crate) fn has(&self, key: &'static str) -> bool {
        self.asked.borrow_mut().push(key);
        self.entry(key).is_some()
    }

    /// The tables under a section whose keys the user chooses, with the place of each key.
    pub(crate) fn named_sections(&self) -> Vec<(String, Place, Section<'a>)> {
        let entries = self.table.into_iter().flat_map(|table| table.iter());
        entries
            .map(|(key, value)| {
                let name = key.get_ref().to_string();
                let place = self.document.place(key.span().start);
                let section = self.child(&name, self.as_table(&name, value));
                (name, place, section)
            })
            .collect()
    }

    /// The string values under a section whose keys the user chooses, with the place of each value.
    pub(crate) fn named_strings(&self) -> Vec<(String, String, Place)> {
        let entries = self.table.into_iter().flat_map(|table| table.iter());
        let pairs = entries.map(|(key, value)| {
            let text = value.get_ref().as_str();
            let place = self.document.place(value.span().start);
            let Some(text) = text else {
                self.wrong_type(place, key.get_ref(), "a string", value.get_ref().type_str());
                return None;
            };
            if text.is_empty() {
                let message = format!("{:?} must not be empty", key.get_ref());
                self.context.error(place, message);
                return None;
            }
            Some((key.get_ref().to_string(), text.to_owned(), place))
        });
        pairs.flatten().collect()
    }

    fn as_table(
        &self,
        key: &str,
        value: &'a Spanned<DeValue<'a>>,
    ) -> Option<(&'a DeTable<'a>, Place)> {
        let place = self.document.place(value.span().start);
        match value.get_ref() {
            DeValue::Table(table) => Some((table, place)),
            other => {
                self.wrong_type(place, key, "a table", other.type_str());
                None
            }
        }
    }

    fn wrong_type(&self, place: Place, key: &str, expected: &str, found: &str) {
        let article = if found.starts_with(['a', 'i']) {
            "an"
        } else {
            "a"
        };
        self.context.error(
            place,
            format!("{key:?} must be {expected}, not {article} {found}"),
        );
    }

    /// A key that must be set is not.
    pub(crate) fn missing(&self, key: &str, example: &str) {
        if !self.is_set(key) && !self.broken {
            let at = if self.path.is_empty() {
                String::new()
            } else {
                format!(" in [{}]", self.path)
            };
            let message = format!("missing key {key:?}{at}, for example {key} = {example}");
            self.context.error(self.place.clone(), message);
        }
    }

    fn is_set(&self, key: &str) -> bool {
        let path = format!("{}.{key}", self.path);
        self.context
            .report
            .borrow()
            .places
            .contains_key(path.trim_start_matches('.'))
    }

    /// A string.
    pub(crate) fn string(&self, key: &'static str) -> Option<(String, Place)> {
        let Found { value, place } = self.get(key)?;
        let text = match value {
            Raw::Env(text) => text,
            Raw::Toml(DeValue::String(text)) => text.to_string(),
            Raw::Toml(other) => {
                self.wrong_type(place, key, "a string", other.type_str());
                return None;
            }
        };
        if text.is_empty() {
            self.context
                .error(place, format!("{key:?} must not be empty"));
            return None;
        }
        Some((text, place))
    }

    /// A string that means something; `parse` says what is wrong with it, without repeating a secret.
    pub(crate) fn parsed<T>(
        &self,
        key: &'static str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        let (text, place) = self.string(key)?;
        match parse(&text) {
            Ok(value) => Some(value),
            Err(reason) => {
                self.context.error(place, format!("{key:?} {reason}"));
                None
            }
        }
    }

    /// One of a few words.
    pub(crate) fn choice<T: Clone>(
        &self,
        key: &'static str,
        choices: &[(&'static str, T)],
    ) -> Option<T> {
        let (text, place) = self.string(key)?;
        let chosen = choices.iter().find(|(word, _)| *word == text);
        if chosen.is_none() {
            let message = format!(
                "unknown value {text:?} for {key:?}: expected {}",
                one_of(choices.iter().map(|(word, _)| *word))
            );
            self.context
                .unknown(place, message, &text, choices.iter().map(|(word, _)| *word));
        }
        chosen.map(|(_, value)| value.clone())
    }

    /// A whole number within bounds.
    pub(crate) fn integer(&self, key: &'static str, bounds: RangeInclusive<u64>) -> Option<u64> {
        let Found { value, place } = self.get(key)?;
        let number = match value {
            Raw::Env(text) => text.parse().ok(),
            Raw::Toml(DeValue::Integer(n)) => u64::from_str_radix(n.as_str(), n.radix()).ok(),
            Raw::Toml(other) => {
                self.wrong_type(place, key, "a whole number", other.type_str());
                return None;
            }
        };
        let valid = number.filter(|number| bounds.contains(number));
        if valid.is_none() {
            let (low, high) = (bounds.start(), bounds.end());
            let message = format!("{key:?} must be a whole number from {low} to {high}");
            self.context.error(place, message);
        }
        valid
    }

    /// A truth value.
    pub(crate) fn boolean(&self, key: &'static str) -> Option<bool> {
        let Found { value, place } = self.get(key)?;
        match value {
            Raw::Toml(DeValue::Boolean(value)) => Some(*value),
            Raw::Env(text) if text == "true" || text == "false" => Some(text == "true"),
            Raw::Env(_) => {
                self.wrong_type(place, key, "true or false", "string");
                None
            }
            Raw::Toml(other) => {
                self.wrong_type(place, key, "true or false", other.type_str());
                None
            }
        }
    }

    /// A list of strings with the place of each; from the environment separated by commas.
    pub(crate) fn list(&self, key: &'static str) -> Option<Vec<(String, Place)>> {
        let items = self.names(key)?;
        if items.is_empty() {
            let place = self.get(key)?.place;
            self.context
                .error(place, format!("{key:?} must not be empty"));
            return None;
        }
        Some(items)
    }

    /// The same; there may be none.
    pub(crate) fn names(&self, key: &'static str) -> Option<Vec<(String, Place)>> {
        let Found { value, place } = self.get(key)?;
        let items = match value {
            Raw::Env(text) => text
                .split(',')
                .map(|item| (item.trim().to_owned(), place.clone()))
                .collect(),
            Raw::Toml(DeValue::Array(items)) => self.strings(key, items),
            Raw::Toml(other) => {
                self.wrong_type(place, key, "a list of strings", other.type_str());
                return None;
            }
        };
        Some(items)
    }

    fn strings(&self, key: &str, items: &'a [Spanned<DeValue<'a>>]) -> Vec<(String, Place)> {
        let strings = items.iter().map(|item| {
            let place = self.document.place(item.span().start);
            match item.get_ref().as_str() {
                Some("") => self
                    .context
                    .error(place, format!("{key:?} has an empty entry")),
                Some(text) => return Some((text.to_owned(), place)),
                None => {
                    let found = item.get_ref().type_str();
                    self.wrong_type(place, key, "a list of strings", found);
                }
            }
            None
        });
        strings.flatten().collect()
    }

    /// A duration with its unit, within bounds.
    pub(crate) fn duration(
        &self,
        key: &'static str,
        bounds: RangeInclusive<Duration>,
    ) -> Option<Duration> {
        self.parsed(key, |text| duration(text, &bounds))
    }

    /// A number of bytes with its unit, within bounds.
    pub(crate) fn size(&self, key: &'static str, bounds: RangeInclusive<u64>) -> Option<u64> {
        self.parsed(key, |text| size(text, &bounds))
    }

    /// A secret: `{ env = ".." }`, `{ file = ".." }`, or the value itself.
    pub(crate) fn secret(&self, key: &'static str) -> Option<Secret> {
        if let Some(DeValue::Table(_)) = self.entry(key).map(Spanned::get_ref) {
            let overridden = self.get(key).map(|found| found.value);
            if let Some(Raw::Env(text)) = overridden {
                return self.inline(key, text);
            }
            return self.reference(key);
        }
        let text = self.string(key)?.0;
        self.inline(key, text)
    }

    fn inline(&self, key: &str, text: String) -> Option<Secret> {
        if text.is_empty() {
            self.context.error(
                Place::whole(variable(&format!("{}.{key}", self.path))),
                "is empty",
            );
            return None;
        }
        Some(Secret::inline(text))
    }

    fn reference(&self, key: &'static str) -> Option<Secret> {
        let mut section = self.section(key);
        section.overridable = false;
        let env = section.string("env");
        let file = section.string("file");
        let secret = match (env, file) {
            (Some((name, _)), None) => Some(Secret::env(name)),
            (None, Some((path, _))) => Some(Secret::file(self.context.dir.join(path))),
            (None, None) if section.table.is_some_and(|table| !table.is_empty()) => None,
            _ => {
                let message =
                    format!("{key:?} needs either {{ env = \"NAME\" }} or {{ file = \"path\" }}");
                self.context.error(section.place.clone(), message);
                None
            }
        };
        section.finish();
        secret
    }

    /// A path, relative to the configuration directory: a string or `{ file = ".." }`.
    pub(crate) fn path(&self, key: &'static str) -> Option<PathBuf> {
        let text = if let Some(DeValue::Table(_)) = self.entry(key).map(Spanned::get_ref) {
            self.get(key)?;
            let section = self.section(key);
            let path = section.string("file");
            section.missing("file", "\"path\"");
            section.finish();
            path
        } else {
            self.string(key)
        };
        text.map(|(path, _)| self.context.dir.join(path))
    }

    /// Reports the keys that nobody asked for.
    pub(crate) fn finish(self) {
        let asked = self.asked.into_inner();
        for (key, _) in self.table.into_iter().flat_map(|table| table.iter()) {
            let name = key.get_ref();
            if !asked.iter().any(|known| known == name) {
                let place = self.document.place(key.span().start);
                let message = format!("unknown key {name:?}");
                self.context
                    .unknown(place, message, name, asked.iter().copied());
            }
        }
    }
}

/// The variable that overrides a key: `MILLRACE_SOURCE__URL` for `source.url`.
fn variable(path: &str) -> String {
    format!("MILLRACE_{}", path.to_uppercase().replace('.', "__"))
}

fn one_of<'w>(words: impl Iterator<Item = &'w str>) -> String {
    let quoted: Vec<_> = words.map(|word| format!("{word:?}")).collect();
    match quoted.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        _ => quoted.concat(),
    }
}

pub(crate) fn duration(text: &str, bounds: &RangeInclusive<Duration>) -> Result<Duration, String> {
    let value = humantime::parse_duration(text)
        .map_err(|_| format!("is not a duration with its unit, such as \"5s\": {text:?}"))?;
    if bounds.contains(&value) {
        return Ok(value);
    }
    let limit = |value: &Duration| humantime::format_duration(*value).to_string();
    let (low, high) = (limit(bounds.start()), limit(bounds.end()));
    Err(format!("must be from {low} to {high}: {text:?}"))
}

fn size(text: &str, bounds: &RangeInclusive<u64>) -> Result<u64, String> {
    let unit = text.ends_with(|end: char| end.is_ascii_alphabetic());
    let value = text.parse::<ByteSize>().ok().filter(|_| unit);
    let value =
        value.ok_or_else(|| format!("is not a size with its unit, such as \"8MiB\": {text:?}"))?;
    if bounds.contains(&value.0) {
        return Ok(value.0);
    }
    let (low, high) = (ByteSize(*bounds.start()), ByteSize(*bounds.end()));
    Err(format!("must be from {low} to {high}: {text:?}"))
}
