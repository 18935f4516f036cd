//! What reading the directory has found: mistakes, and where each key is.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;

use crate::Place;
use crate::error::ConfigError;

/// Keys or values at least this similar (Jaro-Winkler, 0 to 1) are taken for a misspelling.
const SIMILARITY_MIN: f64 = 0.8;

/// What reading the directory has found so far.
#[derive(Default)]
pub(crate) struct Report {
    /// Every mistake.
    pub(crate) errors: Vec<ConfigError>,
    /// Where each key that is set was found: `stream.confirm`, `tables.public.orders.on_delete`.
    pub(crate) places: BTreeMap<String, Place>,
}

/// What every reader shares.
pub(crate) struct Context<'a> {
    /// The configuration directory; relative paths start there.
    pub(crate) dir: &'a Path,
    /// The environment.
    pub(crate) env: &'a dyn Fn(&str) -> Option<String>,
    /// The report.
    pub(crate) report: RefCell<Report>,
}

impl Context<'_> {
    /// Adds a mistake.
    pub(crate) fn error(&self, place: Place, message: impl Into<String>) {
        self.suggest(place, message, None);
    }

    fn suggest(&self, place: Place, message: impl Into<String>, word: Option<&str>) {
        let did_you_mean = word.map(str::to_owned);
        let error = ConfigError {
            place,
            message: message.into(),
            did_you_mean,
        };
        self.report.borrow_mut().errors.push(error);
    }

    /// Adds a mistake about a name, with the known name that is most like it.
    pub(crate) fn unknown<'w>(
        &self,
        place: Place,
        message: String,
        word: &str,
        known: impl IntoIterator<Item = &'w str>,
    ) {
        self.suggest(place, message, nearest(word, known));
    }
}

/// The known word most like the one written, if it is like it at all.
fn nearest<'w>(word: &str, known: impl IntoIterator<Item = &'w str>) -> Option<&'w str> {
    known
        .into_iter()
        .map(|candidate| (strsim::jaro_winkler(word, candidate), candidate))
        .filter(|(similarity, _)| *similarity >= SIMILARITY_MIN)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}

/// One TOML file.
pub(crate) struct Document {
    /// Its name, relative to the configuration directory.
    pub(crate) name: String,
    /// Its text.
    pub(crate) text: String,
}

impl Document {
    /// The place of a byte offset.
    pub(crate) fn place(&self, offset: usize) -> Place {
        Place::at_offset(&self.name, &self.text, offset)
    }
}
