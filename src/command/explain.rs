//! `millrace explain`: what a code means.

use std::fmt::Write;

use millrace_config::{Code, Exit};

/// How wide explanations are set.
const COLUMNS: usize = 80;

/// Explains a code, or lists all of them.
pub(crate) fn explain(code: Option<&str>) -> Exit {
    let Some(text) = code else {
        super::answer(&list(Code::ALL));
        return Exit::Ok;
    };
    match text.trim().parse::<Code>() {
        Ok(code) => {
            let explanation = wrap(code.explain(), COLUMNS);
            super::answer(&format!("{code}: {}\n\n{explanation}\n", code.title()));
            Exit::Ok
        }
        Err(error) => {
            let near = near(text.trim());
            let hint = if near.is_empty() {
                "`millrace explain` lists all codes".to_owned()
            } else {
                format!("did you mean one of these?\n{}", list(&near).trim_end())
            };
            super::usage(&format!("{error}; {hint}"))
        }
    }
}

/// One line for each code.
fn list(codes: &[Code]) -> String {
    codes.iter().fold(String::new(), |mut text, code| {
        let _ = writeln!(text, "{code}  {}", code.title());
        text
    })
}

/// The codes that differ from a text in one character, or whose title holds it.
fn near(text: &str) -> Vec<Code> {
    let upper = text.to_uppercase();
    let lower = text.to_lowercase();
    let is_near = |code: &&Code| {
        let same_number = strsim::damerau_levenshtein(code.as_str(), &upper) <= 1
            || strsim::damerau_levenshtein(&code.as_str()[1..], &upper) <= 1;
        same_number || (lower.len() > 2 && code.title().contains(&lower))
    };
    Code::ALL.iter().filter(is_near).copied().collect()
}

/// Breaks a text into lines of at most `width` characters, between words.
fn wrap(text: &str, width: usize) -> String {
    let mut lines = String::with_capacity(text.len());
    let mut column = 0;
    for word in text.split_whitespace() {
        let length = word.chars().count();
        if column > 0 && column + 1 + length > width {
            lines.push('\n');
            column = 0;
        } else if column > 0 {
            lines.push(' ');
            column += 1;
        }
        lines.push_str(word);
        column += length;
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_code_has_neighbours() {
        assert!(near("E1140").contains(&Code::SlotLost));
        assert!(near("e11044").contains(&Code::SlotLost));
        assert!(near("slot").contains(&Code::SlotMissing));
        assert!(near("nonsense").is_empty() && near("").is_empty());
    }

    #[test]
    fn words_are_kept_whole() {
        assert_eq!(wrap("one two  three", 7), "one two\nthree");
        assert_eq!(wrap("seventeen", 3), "seventeen");
        for code in Code::ALL {
            assert!(
                wrap(code.explain(), COLUMNS)
                    .lines()
                    .all(|line| line.chars().count() <= COLUMNS)
            );
        }
    }
}
