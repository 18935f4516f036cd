//! Where a setting is written.

use std::fmt;

/// A place in a file of the configuration, or an environment variable. Its text: `millrace.toml:3:1`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The file, relative to the configuration directory, or the name of the variable.
    pub file: String,
    /// Line and column in characters, both from 1; none for a whole file or a variable.
    pub at: Option<(usize, usize)>,
}

impl Place {
    /// A whole file, directory or variable.
    pub fn whole(file: impl Into<String>) -> Self {
        Self {
            file: file.into(),
            at: None,
        }
    }

    /// The place of a byte offset of a file's text.
    #[must_use]
    pub fn at_offset(file: &str, text: &str, offset: usize) -> Self {
        let before = text.get(..offset).unwrap_or(text);
        let line = before.matches('\n').count() + 1;
        let start = before.rfind('\n').map_or(0, |at| at + 1);
        Self {
            file: file.to_owned(),
            at: Some((line, before[start..].chars().count() + 1)),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.at {
            Some((line, column)) => write!(f, "{}:{line}:{column}", self.file),
            None => f.write_str(&self.file),
        }
    }
}
