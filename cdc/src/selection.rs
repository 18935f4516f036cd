//! Which columns of a table travel, and in which form.
//!
//! Pure. A relation message and a copy's `SELECT` bind a [`Selection`] to the columns that they have; the
//! [`Binding`] then turns each row into the published one.

use std::fmt;

use millrace_event::{ColumnShape, Datum};
use ring::hmac;

/// The type of masked texts: `text`.
const TEXT_OID: u32 = 25;

/// What travels for a text that is redacted.
const REDACTED: &[u8] = b"***";

/// The hexadecimal digits of an HMAC-SHA-256.
const HASH_BYTES: usize = 64;

/// The key of `hash` masks.
#[derive(Clone)]
pub struct Salt {
    key: hmac::Key,
    fingerprint: String,
}

impl Salt {
    /// The fewest bytes that a salt may have: with fewer the values can be guessed.
    pub const BYTES_MIN: usize = 16;

    /// Prepares a salt.
    #[must_use]
    pub fn new(secret: &[u8]) -> Self {
        let key = hmac::Key::new(hmac::HMAC_SHA256, secret);
        let mut digits = Vec::with_capacity(HASH_BYTES);
        write_hex(
            &mut digits,
            hmac::sign(&key, b"millrace mask_salt").as_ref(),
        );
        digits.truncate(16);
        let fingerprint = String::from_utf8_lossy(&digits).into_owned();
        Self { key, fingerprint }
    }

    /// Tells salts apart without telling them.
    #[must_use]
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }
}

impl fmt::Debug for Salt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl PartialEq for Salt {
    fn eq(&self, other: &Self) -> bool {
        self.fingerprint == other.fingerprint
    }
}

impl Eq for Salt {}

/// What travels in place of a column's values. NULL stays NULL, and what is not known stays so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mask {
    /// The HMAC-SHA-256 of the text, in hexadecimal digits.
    Hash(Salt),
    /// `***`.
    Text,
    /// NULL.
    Null,
    /// The text's first characters, so many.
    Truncate(u32),
}

impl Mask {
    /// The column as its masked values have it.
    fn shape<'a>(&self, column: ColumnShape<'a>) -> ColumnShape<'a> {
        match self {
            Self::Null => column,
            // A masked text need not keep to what the column's own type demands.
            Self::Hash(_) | Self::Text | Self::Truncate(_) => ColumnShape {
                type_oid: TEXT_OID,
                typmod: -1,
                ..column
            },
        }
    }
}

/// What is done about some columns of a table, by their names; all others travel as they are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    excluded: Vec<String>,
    masks: Vec<(String, Mask)>,
}

impl Selection {
    /// Leaves a column out. That wins over a mask.
    pub fn exclude(&mut self, column: impl Into<String>) {
        self.excluded.push(column.into());
    }

    /// Masks a column, in this way only.
    pub fn mask(&mut self, column: impl Into<String>, mask: Mask) {
        let column = column.into();
        self.masks.retain(|(name, _)| *name != column);
        self.masks.push((column, mask));
    }

    /// Whether a column travels as it is.
    #[must_use]
    pub fn leaves(&self, column: &str) -> bool {
        !self.excludes(column) && self.mask_of(column).is_none()
    }

    /// Whether a column is left out.
    #[must_use]
    pub fn excludes(&self, column: &str) -> bool {
        self.excluded.iter().any(|name| name == column)
    }

    /// The mask of a column.
    #[must_use]
    pub fn mask_of(&self, column: &str) -> Option<&Mask> {
        let mask = self.masks.iter().find(|(name, _)| name == column);
        mask.map(|(_, mask)| mask)
    }

    /// A column as it is published; `None` where it is left out.
    #[must_use]
    pub fn published<'a>(&self, column: ColumnShape<'a>) -> Option<ColumnShape<'a>> {
        if self.excludes(column.name) {
            return None;
        }
        Some(match self.mask_of(column.name) {
            Some(mask) => mask.shape(column),
            None => column,
        })
    }

    /// What is to be done with rows of these columns; `None` where they travel as they are.
    #[must_use]
    pub fn bind<'n>(&self, columns: impl IntoIterator<Item = &'n str>) -> Option<Binding> {
        let (mut kept, mut masks, mut published) = (Vec::new(), Vec::new(), 0);
        for name in columns {
            let keeps = !self.excludes(name);
            kept.push(keeps);
            if keeps {
                masks.extend(self.mask_of(name).map(|mask| (published, mask.clone())));
                published += 1;
            }
        }
        let whole = kept.iter().all(|kept| *kept);
        (!whole || !masks.is_empty()).then_some(Binding { kept, masks })
    }
}

/// A [`Selection`] bound to the columns of some rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binding {
    /// Whether each column travels.
    kept: Vec<bool>,
    /// The masks, by index among the columns that travel.
    masks: Vec<(usize, Mask)>,
}

impl Binding {
    /// Whether the column of this index travels.
    #[must_use]
    pub fn keeps(&self, column: usize) -> bool {
        self.kept.get(column).is_some_and(|kept| *kept)
    }

    /// Masks a row of the columns that travel. `room` holds what the masks wrote; what was in it is gone.
    pub fn mask<'r>(&self, row: &mut [Datum<'r>], room: &'r mut Vec<u8>) {
        room.clear();
        for (index, mask) in &self.masks {
            let datum = row.get(*index);
            if let (Mask::Hash(salt), Some(Datum::Text(text))) = (mask, datum) {
                write_hex(room, hmac::sign(&salt.key, text).as_ref());
            }
        }
        let mut hashes = room.chunks_exact(HASH_BYTES);
        for (index, mask) in &self.masks {
            let Some(datum) = row.get_mut(*index) else {
                continue;
            };
            // A key tuple's other columns are NULL, and an untouched TOAST value is not known.
            let Datum::Text(text) = *datum else { continue };
            *datum = match mask {
                Mask::Hash(_) => Datum::Text(hashes.next().expect("one was written for each")),
                Mask::Text => Datum::Text(REDACTED),
                Mask::Null => Datum::Null,
                Mask::Truncate(characters) => Datum::Text(first(text, *characters)),
            };
        }
    }
}

/// The first characters of a text in UTF-8.
fn first(text: &[u8], characters: u32) -> &[u8] {
    let begins = |byte: &u8| byte & 0b1100_0000 != 0b1000_0000;
    let starts = text.iter().enumerate().filter(|(_, byte)| begins(byte));
    let mut beyond = starts.skip(usize::try_from(characters).unwrap_or(usize::MAX));
    let end = beyond.next().map_or(text.len(), |(at, _)| at);
    text.get(..end).unwrap_or(text)
}

fn write_hex(out: &mut Vec<u8>, bytes: &[u8]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for byte in bytes {
        for half in [byte >> 4, byte & 0xF] {
            out.push(DIGITS[usize::from(half)]);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn selection() -> Selection {
        let mut selection = Selection::default();
        selection.exclude("secret");
        selection.mask("email", Mask::Hash(Salt::new(b"Jefe")));
        selection.mask("note", Mask::Text);
        selection.mask("born", Mask::Null);
        selection.mask("phone", Mask::Truncate(4));
        selection
    }

    const COLUMNS: [&str; 7] = ["id", "email", "secret", "note", "born", "phone", "v"];

    fn shape(name: &str) -> ColumnShape<'_> {
        ColumnShape {
            name,
            type_oid: 1082,
            typmod: 7,
        }
    }

    #[test]
    fn each_mask_gives_its_value_and_null_stays_null() {
        let binding = selection().bind(COLUMNS).expect("something to do");
        let kept: Vec<_> = (0..COLUMNS.len())
            .map(|index| binding.keeps(index))
            .collect();
        assert_eq!(kept, [true, true, false, true, true, true, true]);
        let mut room = b"from before".to_vec();
        let text = |text: &'static str| Datum::Text(text.as_bytes());
        // RFC 4231, test case 2.
        let mut row = [
            text("7"),
            text("what do ya want for nothing?"),
            text("my note"),
            text("2000-01-01"),
            text("+49äöü123"),
            text("v"),
        ];
        binding.mask(&mut row, &mut room);
        let hash = "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843";
        let expected = [
            text("7"),
            text(hash),
            text("***"),
            Datum::Null,
            text("+49ä"),
            text("v"),
        ];
        assert_eq!(row, expected);

        for datum in [Datum::Null, Datum::Unchanged] {
            let (mut row, mut room) = ([datum; 6], Vec::new());
            binding.mask(&mut row, &mut room);
            assert_eq!(row, [datum; 6]);
        }
    }

    #[test]
    fn masked_texts_have_the_type_text_and_nulls_their_own() {
        let selection = selection();
        assert_eq!(selection.published(shape("secret")), None);
        assert_eq!(selection.published(shape("v")), Some(shape("v")));
        assert_eq!(selection.published(shape("born")), Some(shape("born")));
        for name in ["email", "note", "phone"] {
            let text = ColumnShape {
                type_oid: TEXT_OID,
                typmod: -1,
                name,
            };
            assert_eq!(selection.published(shape(name)), Some(text));
        }
    }

    #[test]
    fn rows_without_a_selected_column_are_left_alone() {
        assert_eq!(selection().bind(["id", "v"]), None);
        assert_eq!(Selection::default().bind(COLUMNS), None);
        assert!(selection().bind(["id", "secret"]).is_some());
        assert!(
            selection().leaves("v") && !selection().leaves("secret") && !selection().leaves("note")
        );
    }

    #[test]
    fn a_salt_is_not_shown() {
        let salt = Salt::new(b"a salt of sixteen bytes");
        assert_eq!(format!("{salt:?}"), "***");
        assert_ne!(salt, Salt::new(b"another one"));
        assert_eq!(salt.fingerprint().len(), 16);
    }

    proptest! {
        /// Whatever is masked, nothing of the text is left but the prefix that was asked for.
        #[test]
        fn masks_keep_what_they_say_and_nothing_more(
            texts in prop::collection::vec(prop::option::of(".{0,12}"), 3),
            characters in 1_u32..6,
        ) {
            let mut selection = Selection::default();
            selection.mask("a", Mask::Hash(Salt::new(b"salt")));
            selection.mask("b", Mask::Truncate(characters));
            selection.mask("c", Mask::Hash(Salt::new(b"salt")));
            let binding = selection.bind(["a", "b", "c"]).expect("masks");
            let datum = |text: &'static Option<String>| text.as_ref().map_or(Datum::Null, |text| Datum::Text(text.as_bytes()));
            let texts: &'static Vec<Option<String>> = Box::leak(Box::new(texts));
            let mut row: Vec<_> = texts.iter().map(datum).collect();
            let mut room = Vec::new();
            binding.mask(&mut row, &mut room);
            for (index, (text, datum)) in texts.iter().zip(&row).enumerate() {
                let Some(text) = text else {
                    prop_assert_eq!(*datum, Datum::Null);
                    continue;
                };
                let Datum::Text(masked) = datum else { panic!("a text stays one") };
                let masked = std::str::from_utf8(masked).expect("UTF-8");
                if index == 1 {
                    let expected: String = text.chars().take(characters as usize).collect();
                    prop_assert_eq!(masked, expected);
                } else {
                    let mut expected = Vec::new();
                    write_hex(&mut expected, hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, b"salt"), text.as_bytes()).as_ref());
                    prop_assert_eq!(masked.as_bytes(), expected);
                }
            }
        }
    }
}
