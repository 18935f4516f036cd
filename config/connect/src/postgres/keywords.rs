//! Takes a connection string apart into its parameters, and puts it together again.

use super::DsnError;
use crate::percent;

/// A connection string whose parameters have been taken out.
pub(super) struct Parts {
    /// What comes before the parameters of a URL; none for the form `key=value key=value`.
    base: Option<String>,
    /// The parameters, decoded.
    pub(super) parameters: Vec<(String, String)>,
}

impl Parts {
    /// Takes `postgres://..?key=value&..` or `key=value ..` apart.
    pub(super) fn parse(text: &str) -> Result<Self, DsnError> {
        let scheme = ["postgres://", "postgresql://"]
            .into_iter()
            .find(|s| text.starts_with(s));
        let Some(scheme) = scheme else {
            return Ok(Self {
                base: None,
                parameters: keywords(text)?,
            });
        };
        // A password may hold a '?'; what follows the '@' may not.
        let host = text[scheme.len()..]
            .find('@')
            .map_or(scheme.len(), |at| scheme.len() + at + 1);
        let query = text[host..].find('?').map(|at| host + at);
        let (base, query) = match query {
            Some(at) => (&text[..at], &text[at + 1..]),
            None => (text, ""),
        };
        let pairs = query
            .split('&')
            .filter(|pair| !pair.is_empty())
            .map(|pair| {
                let (key, value) = pair.split_once('=').ok_or(DsnError::Syntax)?;
                let decode = |text| percent::decode(text).ok_or(DsnError::Syntax);
                Ok((decode(key)?, decode(value)?))
            });
        Ok(Self {
            base: Some(base.to_owned()),
            parameters: pairs.collect::<Result<_, _>>()?,
        })
    }

    /// Removes a parameter; the last one counts, as in libpq.
    pub(super) fn take(&mut self, key: &str) -> Option<String> {
        let value = self
            .parameters
            .iter()
            .rev()
            .find(|(name, _)| name == key)?
            .1
            .clone();
        self.parameters.retain(|(name, _)| name != key);
        Some(value)
    }

    /// The connection string with the parameters that are left.
    pub(super) fn assemble(&self) -> String {
        match &self.base {
            Some(base) => {
                let pairs: Vec<_> = self
                    .parameters
                    .iter()
                    .map(|(key, value)| format!("{}={}", encode(key), encode(value)))
                    .collect();
                let mark = if pairs.is_empty() { "" } else { "?" };
                format!("{base}{mark}{}", pairs.join("&"))
            }
            None => {
                let pairs = self.parameters.iter().map(|(key, value)| {
                    let value = value.replace('\\', "\\\\").replace('\'', "\\'");
                    format!("{key}='{value}'")
                });
                pairs.collect::<Vec<_>>().join(" ")
            }
        }
    }
}

/// `key=value key = 'quoted \' value'`.
fn keywords(text: &str) -> Result<Vec<(String, String)>, DsnError> {
    let mut pairs = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let (key, after) = rest.split_once('=').ok_or(DsnError::Syntax)?;
        let key = key.trim_end();
        if key.is_empty() || key.contains(char::is_whitespace) {
            return Err(DsnError::Syntax);
        }
        let (value, after) = value(after.trim_start())?;
        pairs.push((key.to_owned(), value));
        rest = after.trim_start();
    }
    Ok(pairs)
}

/// A value, quoted or up to the next blank, and what follows it.
fn value(text: &str) -> Result<(String, &str), DsnError> {
    let quoted = text.starts_with('\'');
    let text = text.strip_prefix('\'').unwrap_or(text);
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
            '\'' if quoted => return Ok((value, &text[at + 1..])),
            blank if !quoted && blank.is_whitespace() => return Ok((value, &text[at..])),
            other => value.push(other),
        }
    }
    if quoted {
        Err(DsnError::Syntax)
    } else {
        Ok((value, ""))
    }
}

/// Writes what is not plain as `%20` and the like.
fn encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~' | b'/') {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}
