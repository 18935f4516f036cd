//! Reads `columns` of a table file or of `[defaults]`: which columns travel, in which form, and under which
//! names.

use std::collections::BTreeSet;

use crate::reader::Section;
use crate::report::Context;
use crate::settings::{Columns, Mask};
use crate::{Place, limits};

/// The column of a target table that holds a row's version.
const VERSION_COLUMN: &str = "_millrace_version";

/// The keys under `columns`: what is not set there is none.
#[derive(Clone, Default)]
pub(super) struct Keys {
    exclude: Option<Vec<(String, Place)>>,
    rename: Option<Vec<(String, String, Place)>>,
    mask: Option<Vec<(String, Mask, Place)>>,
}

/// Reads `columns`, and checks it as far as one file tells.
pub(super) fn keys(section: Section<'_>) -> Keys {
    let context = section.context;
    let exclude = section.names("exclude");
    let rename = section
        .has("rename")
        .then(|| section.section("rename").named_strings());
    let mask = section.has("mask").then(|| masks(&section.section("mask")));
    section.finish();
    let keys = Keys {
        exclude,
        rename,
        mask,
    };
    check(context, &keys);
    keys
}

fn masks(section: &Section<'_>) -> Vec<(String, Mask, Place)> {
    let read = |(column, text, place): (String, String, Place)| {
        let mask = mask(section.context, &text, &place)?;
        Some((column, mask, place))
    };
    section
        .named_strings()
        .into_iter()
        .filter_map(read)
        .collect()
}

fn mask(context: &Context<'_>, text: &str, place: &Place) -> Option<Mask> {
    let (kind, characters) = match text.split_once(':') {
        Some((kind, characters)) => (kind, Some(characters)),
        None => (text, None),
    };
    let error = |message: String| context.error(place.clone(), message);
    match (kind, characters) {
        ("hash", None) => return Some(Mask::Hash),
        ("redact", None) => return Some(Mask::Redact),
        ("truncate", Some(characters)) => {
            let bounds = 1..=limits::MASK_TRUNCATE_MAX;
            let number = characters.parse().ok();
            match number.filter(|number| bounds.contains(number)) {
                Some(number) => return Some(Mask::Truncate(number)),
                None => error(format!(
                    "\"truncate:N\" needs a number of characters from 1 to {}: {text:?}",
                    limits::MASK_TRUNCATE_MAX
                )),
            }
        }
        ("truncate", None) => {
            error("\"truncate\" needs a number of characters, such as \"truncate:4\"".to_owned());
        }
        ("hash" | "redact", Some(_)) => {
            error(format!("{kind:?} takes no number: {text:?}"));
        }
        _ => {
            let message =
                format!("unknown mask {text:?}: expected \"hash\", \"redact\" or \"truncate:N\"");
            context.unknown(place.clone(), message, kind, ["hash", "redact", "truncate"]);
        }
    }
    None
}

/// What contradicts itself whatever the table is.
fn check(context: &Context<'_>, keys: &Keys) {
    let mut excluded = BTreeSet::new();
    for (column, place) in keys.exclude.iter().flatten() {
        if !excluded.insert(column) {
            context.error(
                place.clone(),
                format!("column {column:?} is excluded twice"),
            );
        }
    }
    for (column, _, place) in keys.mask.iter().flatten() {
        if excluded.contains(column) {
            let message = format!("column {column:?} is both excluded and masked");
            context.error(place.clone(), message);
        }
    }
    let mut targets = BTreeSet::new();
    for (column, target, place) in keys.rename.iter().flatten() {
        if excluded.contains(column) {
            let message = format!("column {column:?} is both excluded and renamed");
            context.error(place.clone(), message);
        }
        if !targets.insert(target) {
            let message = format!("two columns are renamed to {target:?}");
            context.error(place.clone(), message);
        }
        if target == VERSION_COLUMN {
            let message = format!("{target:?} is the target's column for a row's version");
            context.error(place.clone(), message);
        }
    }
}

/// A table's columns: its own word, else that of `[defaults]`. What a table says of a column wins over what
/// the defaults say of it. `salted` tells whether there is a `source.mask_salt`.
pub(super) fn resolve(
    context: &Context<'_>,
    own: Keys,
    defaults: &Keys,
    key: Option<&[String]>,
    salted: bool,
) -> Columns {
    let (own_exclude, own_mask) = (own.exclude.is_some(), own.mask.is_some());
    let own_rename = own.rename.is_some();
    let mut exclude = own.exclude.or_else(|| defaults.exclude.clone());
    let mut mask = own.mask.or_else(|| defaults.mask.clone());
    let mut rename = own.rename.or_else(|| defaults.rename.clone());
    let masked = |mask: &Option<Vec<(String, Mask, Place)>>, column: &String| {
        mask.iter().flatten().any(|(name, ..)| name == column)
    };
    if own_mask && !own_exclude {
        exclude
            .iter_mut()
            .for_each(|exclude| exclude.retain(|(column, _)| !masked(&mask, column)));
    }
    let exclude = exclude.unwrap_or_default();
    let excluded = |column: &String| exclude.iter().any(|(name, _)| name == column);
    if own_exclude && !own_mask {
        mask.iter_mut()
            .for_each(|mask| mask.retain(|(column, ..)| !excluded(column)));
    }
    if own_exclude != own_rename {
        rename
            .iter_mut()
            .for_each(|rename| rename.retain(|(column, ..)| !excluded(column)));
    }
    let (mask, rename) = (mask.unwrap_or_default(), rename.unwrap_or_default());
    check_key(context, key.unwrap_or_default(), &exclude, &mask);
    check_names(context, key.unwrap_or_default(), &mask, &rename);
    if let Some((.., place)) = mask.iter().find(|(_, mask, _)| *mask == Mask::Hash)
        && !salted
    {
        let message = "a \"hash\" mask needs a secret salt: set mask_salt = { env = \"MASK_SALT\" } in [source]";
        once(context, place, message);
    }
    let mut from_defaults = Vec::new();
    let mut inherit = |own: bool, names: &mut dyn Iterator<Item = &String>| {
        if !own {
            from_defaults.extend(names.cloned());
        }
    };
    inherit(own_exclude, &mut exclude.iter().map(|(name, _)| name));
    inherit(own_mask, &mut mask.iter().map(|(name, ..)| name));
    inherit(own_rename, &mut rename.iter().map(|(name, ..)| name));
    Columns {
        exclude: exclude.into_iter().map(|(name, _)| name).collect(),
        rename: rename.into_iter().map(|(from, to, _)| (from, to)).collect(),
        mask: mask
            .into_iter()
            .map(|(name, mask, _)| (name, mask))
            .collect(),
        from_defaults,
    }
}

/// Rows are known by their key, in the stream and in every target: it travels as it is.
fn check_key(
    context: &Context<'_>,
    key: &[String],
    exclude: &[(String, Place)],
    mask: &[(String, Mask, Place)],
) {
    for (column, place) in exclude {
        if key.contains(column) {
            once(
                context,
                place,
                &format!("key column {column:?} cannot be excluded"),
            );
        }
    }
    for (column, _, place) in mask {
        if key.contains(column) {
            once(
                context,
                place,
                &format!("key column {column:?} cannot be masked"),
            );
        }
    }
}

/// A renamed column must not get the name of one that keeps its own.
fn check_names(
    context: &Context<'_>,
    key: &[String],
    mask: &[(String, Mask, Place)],
    rename: &[(String, String, Place)],
) {
    let kept = |name: &String| !rename.iter().any(|(from, ..)| from == name);
    let known: BTreeSet<_> = key
        .iter()
        .chain(mask.iter().map(|(name, ..)| name))
        .filter(|name| kept(name))
        .collect();
    for (column, target, place) in rename {
        if known.contains(target) {
            let message = format!(
                "column {column:?} is renamed to {target:?}, which is another column's name"
            );
            once(context, place, &message);
        }
    }
}

/// Reports a mistake; one of `[defaults]` is met again with every table.
fn once(context: &Context<'_>, place: &Place, message: &str) {
    let known = context
        .report
        .borrow()
        .errors
        .iter()
        .any(|error| error.place == *place && error.message == message);
    if !known {
        context.error(place.clone(), message);
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::{Config, Secret, Table};

    /// Loads one table file beside a source, with further lines in `[source]` and at the end of the main file.
    fn load(source: &str, end: &str, table: &str) -> Result<Config, String> {
        let dir = tempfile::tempdir().expect("a directory");
        let main = format!(
            "[source]\nname = \"shop\"\nurl = \"postgres://h/d\"\n{source}\n\
             [stream]\nservers = [\"nats://h\"]\n{end}"
        );
        fs::write(dir.path().join("millrace.toml"), main).expect("written");
        fs::create_dir(dir.path().join("tables")).expect("created");
        fs::write(dir.path().join("tables/public.t.toml"), table).expect("written");
        Config::load(dir.path(), &|_| None).map_err(|errors| errors.to_string())
    }

    fn table(source: &str, end: &str, table: &str) -> Table {
        let config = load(source, end, table).expect("valid");
        config.tables.into_iter().next().expect("one table")
    }

    const SALT: &str = "mask_salt = { file = \"salt\" }";

    #[test]
    fn a_table_says_which_columns_and_rows_travel_and_how() {
        let text = "where = \"status <> 'draft'\"\n[columns]\nexclude = [\"card_no\"]\n\
            rename = { ts = \"created_at\" }\n\
            mask = { email = \"hash\", note = \"redact\", phone = \"truncate:4\" }\n";
        let config = load(SALT, "", text).expect("valid");
        let salt = config.source.mask_salt.as_ref().expect("a salt");
        assert!(salt.reference().ends_with("/salt"), "{}", salt.reference());
        let [table] = config.tables.as_slice() else {
            panic!("one table")
        };
        assert_eq!(table.columns.exclude, ["card_no"]);
        assert_eq!(
            table.columns.rename,
            [("ts".to_owned(), "created_at".to_owned())]
        );
        let masks: Vec<_> = table
            .columns
            .mask
            .iter()
            .map(|(column, mask)| format!("{column}={mask}"))
            .collect();
        assert_eq!(masks, ["email=hash", "note=redact", "phone=truncate:4"]);
        assert!(table.columns.from_defaults.is_empty());
        let filter = table.filter.as_ref().expect("a filter");
        assert_eq!(filter.sql, "status <> 'draft'");
        assert_eq!(filter.place.to_string(), "tables/public.t.toml:1:9");
    }

    #[test]
    fn every_contradiction_is_reported_at_its_place() {
        let text = "key = [\"id\", \"region\"]\nwhere = \" \"\n[columns]\n\
            exclude = [\"a\", \"a\", \"id\"]\n\
            rename = { b = \"x\", c = \"x\", a = \"y\", d = \"region\", e = \"_millrace_version\", f = \"\" }\n\
            mask = { a = \"redact\", g = \"redacted\", h = \"truncate\", i = \"truncate:0\", j = \"hash:3\", \
            region = \"hash\", k = \"sha\", l = 4 }\n";
        let expected = r#"tables/public.t.toml:2:9: "where" must not be empty
tables/public.t.toml:4:17: column "a" is excluded twice
tables/public.t.toml:4:22: key column "id" cannot be excluded
tables/public.t.toml:5:25: two columns are renamed to "x"
tables/public.t.toml:5:34: column "a" is both excluded and renamed
tables/public.t.toml:5:43: column "d" is renamed to "region", which is another column's name
tables/public.t.toml:5:57: "_millrace_version" is the target's column for a row's version
tables/public.t.toml:5:82: "f" must not be empty
tables/public.t.toml:6:14: column "a" is both excluded and masked
tables/public.t.toml:6:28: unknown mask "redacted": expected "hash", "redact" or "truncate:N"; did you mean "redact"?
tables/public.t.toml:6:44: "truncate" needs a number of characters, such as "truncate:4"
tables/public.t.toml:6:60: "truncate:N" needs a number of characters from 1 to 1000000: "truncate:0"
tables/public.t.toml:6:78: "hash" takes no number: "hash:3"
tables/public.t.toml:6:97: a "hash" mask needs a secret salt: set mask_salt = { env = "MASK_SALT" } in [source]
tables/public.t.toml:6:97: key column "region" cannot be masked
tables/public.t.toml:6:109: unknown mask "sha": expected "hash", "redact" or "truncate:N"
tables/public.t.toml:6:120: "l" must be a string, not an integer"#;
        assert_eq!(load("", "", text).expect_err("mistakes"), expected);
    }

    #[test]
    fn what_a_table_says_of_a_column_wins_over_the_defaults() {
        let defaults = "[defaults]\nwhere = \"live\"\ncolumns = { exclude = [\"a\", \"b\"], \
            mask = { c = \"redact\", d = \"redact\" }, rename = { c = \"x\", e = \"y\" } }\n";
        let plain = table("", defaults, "");
        assert_eq!(plain.columns.exclude, ["a", "b"]);
        assert_eq!(plain.columns.from_defaults, ["a", "b", "c", "d", "c", "e"]);
        assert_eq!(
            plain.filter.expect("inherited").place.to_string(),
            "millrace.toml:8:9"
        );

        let own = table("", defaults, "columns = { exclude = [\"c\"] }");
        assert_eq!(own.columns.exclude, ["c"]);
        assert_eq!(own.columns.mask, [("d".to_owned(), Mask::Redact)]);
        assert_eq!(own.columns.rename, [("e".to_owned(), "y".to_owned())]);
        assert_eq!(own.columns.from_defaults, ["d", "e"]);

        let own = table("", defaults, "columns = { mask = { a = \"truncate:1\" } }");
        assert_eq!(own.columns.exclude, ["b"]);
        assert_eq!(own.columns.mask, [("a".to_owned(), Mask::Truncate(1))]);

        let none = table(
            "",
            defaults,
            "columns = { exclude = [], mask = {}, rename = {} }",
        );
        assert_eq!(none.columns, Columns::default());
    }

    #[test]
    fn a_hash_of_the_defaults_needs_its_salt_once() {
        let defaults = "[defaults]\ncolumns = { mask = { email = \"hash\" } }\n";
        let error = load("", defaults, "").expect_err("no salt");
        assert_eq!(
            error,
            "millrace.toml:8:30: a \"hash\" mask needs a secret salt: \
             set mask_salt = { env = \"MASK_SALT\" } in [source]"
        );
        let config = load("mask_salt = \"pepper\"", defaults, "").expect("valid");
        assert_eq!(config.source.mask_salt, Some(Secret::inline("pepper")));
        assert!(!format!("{config:?}").contains("pepper"));
        assert!(load("", defaults, "columns = { mask = {} }").is_ok());
    }
}
