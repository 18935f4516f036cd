//! What is wrong with a configuration: everything at once.

use std::fmt;

use crate::Place;

/// One mistake in the configuration. Its text: `tables/public.orders.toml:3:1: unknown key "colums"`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
#[error("{place}: {message}{}", suggestion(self.did_you_mean.as_deref()))]
pub struct ConfigError {
    /// Where it is written.
    pub place: Place,
    /// What is wrong.
    pub message: String,
    /// The known word that looks most like the one written.
    pub did_you_mean: Option<String>,
}

fn suggestion(word: Option<&str>) -> String {
    word.map(|word| format!("; did you mean {word:?}?"))
        .unwrap_or_default()
}

/// Every mistake of a configuration, by place; never empty. Its text has one line for each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigErrors(Vec<ConfigError>);

impl ConfigErrors {
    /// The errors in the order of their places, each once; none if there are none.
    pub(crate) fn new(mut errors: Vec<ConfigError>) -> Option<Self> {
        errors.sort();
        errors.dedup();
        (!errors.is_empty()).then_some(Self(errors))
    }

    /// The errors by place.
    #[must_use]
    pub fn as_slice(&self) -> &[ConfigError] {
        &self.0
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.0.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            write!(f, "{error}")?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}
