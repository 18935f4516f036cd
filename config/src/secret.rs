//! Values that are never printed.

use std::fmt;
use std::path::PathBuf;

/// Where a secret is found; read again at each connect, so that a rotated password is picked up.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Reference);

#[derive(Clone, PartialEq, Eq)]
enum Reference {
    Env(String),
    File(PathBuf),
    Inline(String),
}

/// What every secret prints as.
const HIDDEN: &str = "***";

impl Secret {
    /// The value of an environment variable.
    pub fn env(name: impl Into<String>) -> Self {
        Self(Reference::Env(name.into()))
    }

    /// The content of a file, without the line break at its end.
    pub fn file(path: impl Into<PathBuf>) -> Self {
        Self(Reference::File(path.into()))
    }

    /// The value itself.
    pub fn inline(value: impl Into<String>) -> Self {
        Self(Reference::Inline(value.into()))
    }

    /// Reads the secret.
    ///
    /// # Errors
    /// The variable is not set or not text, the file cannot be read, or the value is empty.
    pub fn read(&self) -> Result<Revealed, SecretError> {
        let value = match &self.0 {
            Reference::Env(name) => std::env::var(name).map_err(|error| {
                // The error itself would show a value that is not valid UTF-8.
                let reason = match error {
                    std::env::VarError::NotPresent => "is not set",
                    std::env::VarError::NotUnicode(_) => "is not valid UTF-8",
                };
                SecretError::Env {
                    name: name.clone(),
                    reason,
                }
            })?,
            Reference::File(path) => {
                let text = std::fs::read_to_string(path).map_err(|source| SecretError::File {
                    path: path.clone(),
                    source,
                })?;
                text.trim_end_matches(['\r', '\n']).to_owned()
            }
            Reference::Inline(value) => value.clone(),
        };
        if value.is_empty() {
            return Err(SecretError::Empty {
                reference: self.reference(),
            });
        }
        Ok(Revealed(value))
    }

    /// Where the secret is looked up, for messages: never its value.
    #[must_use]
    pub fn reference(&self) -> String {
        match &self.0 {
            Reference::Env(name) => format!("environment variable {name}"),
            Reference::File(path) => format!("file {}", path.display()),
            Reference::Inline(_) => "the configuration".to_owned(),
        }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(HIDDEN)
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(HIDDEN)
    }
}

/// A secret's value, on its way to the one call that needs it.
#[derive(Clone, PartialEq, Eq)]
pub struct Revealed(String);

impl Revealed {
    /// The value. Whoever calls this keeps it out of logs and errors.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Revealed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(HIDDEN)
    }
}

impl fmt::Display for Revealed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(HIDDEN)
    }
}

/// Why a secret could not be read.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The environment variable is not set, or is not valid UTF-8.
    #[error("secret cannot be read: environment variable {name} {reason}")]
    Env {
        /// The variable.
        name: String,
        /// Why.
        reason: &'static str,
    },
    /// The file cannot be read.
    #[error("secret in file {} cannot be read", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// There is nothing in it.
    #[error("secret in {reference} is empty")]
    Empty {
        /// Where it was looked up.
        reference: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_never_printed() {
        let secret = Secret::inline("postgres://u:hunter2@h/db");
        let revealed = secret.read().expect("an inline secret");
        assert_eq!(
            format!("{secret} {secret:?} {revealed} {revealed:?}"),
            "*** *** *** ***"
        );
        assert_eq!(revealed.expose(), "postgres://u:hunter2@h/db");
        assert_eq!(secret.reference(), "the configuration");
    }

    #[test]
    fn a_file_is_read_again_each_time_and_loses_its_line_break() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("secret");
        let secret = Secret::file(&path);
        assert!(matches!(secret.read(), Err(SecretError::File { .. })));
        for (content, value) in [("one\n", "one"), ("two\r\n", "two"), (" three ", " three ")] {
            std::fs::write(&path, content).expect("written");
            assert_eq!(secret.read().expect("read").expose(), value);
        }
        std::fs::write(&path, "\n").expect("written");
        assert!(matches!(secret.read(), Err(SecretError::Empty { .. })));
    }

    #[test]
    fn a_variable_that_is_not_set_is_named() {
        let error = Secret::env("MILLRACE_TEST_UNSET")
            .read()
            .expect_err("not set");
        let text = "secret cannot be read: environment variable MILLRACE_TEST_UNSET is not set";
        assert_eq!(error.to_string(), text);
    }
}
