//! The conditions that an operator meets, each with a code that never changes its meaning.

mod catalogue;

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};

pub use catalogue::Code;

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for Code {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

/// A text that is no code of this release.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no such code: {0:?}")]
pub struct UnknownCode(String);

impl FromStr for Code {
    type Err = UnknownCode;

    /// Reads `E1104`; `e1104` and `1104` are accepted too.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let number = text.strip_prefix(['E', 'e']).unwrap_or(text);
        Self::ALL
            .iter()
            .find(|code| &code.as_str()[1..] == number)
            .copied()
            .ok_or_else(|| UnknownCode(text.to_owned()))
    }
}

/// One occurrence of a condition. Its text: `E1107: table "public.x" has no replica identity`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, thiserror::Error)]
#[error("{code}: {message}")]
pub struct Condition {
    /// Which condition.
    pub code: Code,
    /// What is the case here, with names.
    pub message: String,
    /// What the operator does about it here: exact statements where there are any.
    pub remedy: String,
}

impl Condition {
    /// Assembles a condition from its parts.
    pub fn new(code: Code, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            remedy: remedy.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_code_is_unique_explained_and_round_trips() {
        let texts: BTreeSet<_> = Code::ALL.iter().map(|code| code.as_str()).collect();
        assert_eq!(texts.len(), Code::ALL.len());
        let titles: BTreeSet<_> = Code::ALL.iter().map(|code| code.title()).collect();
        assert_eq!(titles.len(), Code::ALL.len());
        for code in Code::ALL {
            assert_eq!(code.to_string().parse(), Ok(*code));
            assert_eq!(code.as_str()[1..].parse(), Ok(*code));
            assert_eq!(code.as_str().len(), 5);
            let explanation = code.explain();
            let sentences = explanation.matches(". ").count() + 1;
            assert!(
                (2..=7).contains(&sentences),
                "{code} has {sentences} sentences"
            );
            assert!(
                explanation.ends_with('.') && !explanation.contains("  "),
                "{code}"
            );
            assert!(!code.title().ends_with('.'), "{code}");
        }
        assert!("E9999".parse::<Code>().is_err());
        assert!("".parse::<Code>().is_err());
    }

    #[test]
    fn the_codes_that_others_quote_keep_their_numbers() {
        for (code, text) in [
            (Code::ConfigInvalid, "E1001"),
            (Code::AdminPortInUse, "E1003"),
            (Code::SlotMissing, "E1102"),
            (Code::SlotAhead, "E1103"),
            (Code::SlotLost, "E1104"),
            (Code::PublicationMissing, "E1105"),
            (Code::PublicationDrift, "E1106"),
            (Code::NoReplicaIdentity, "E1107"),
            (Code::SourceChanged, "E1108"),
            (Code::SourceWentBack, "E1109"),
            (Code::StreamMissing, "E1202"),
            (Code::TargetColumnMissing, "E1302"),
        ] {
            assert_eq!(code.as_str(), text);
        }
    }

    #[test]
    fn a_condition_prints_its_code_and_message_only() {
        let condition =
            Condition::new(Code::NoReplicaIdentity, "table \"public.x\" ..", "alter it");
        assert_eq!(condition.to_string(), "E1107: table \"public.x\" ..");
        let json = serde_json::to_string(&condition).expect("json");
        assert!(json.starts_with("{\"code\":\"E1107\""), "{json}");
    }
}
