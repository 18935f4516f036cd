//! The order of all changes of one source, and where a reader stands in it.

use std::fmt;
use std::str::FromStr;

use crate::Lsn;

/// The version of a row: which change of which transaction wrote it last.
///
/// Totally ordered within one source; a row may only be overwritten by a higher version. `epoch` rises when
/// the source may have dropped commits (a failover, a restore), so that what came after outranks what came
/// before although its LSNs are lower.
///
/// The text form is 32 hexadecimal digits, so text order is version order and Postgres reads it as a `uuid`;
/// [`Version::to_bytes`] is the same as 16 big-endian bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// Rises whenever the source's history may have been rewritten.
    pub epoch: u32,
    /// Where the transaction's commit record starts.
    pub commit_lsn: Lsn,
    /// The change's number in its transaction, from 1; 0 for a row that a backfill read.
    pub seq: u32,
}

impl Version {
    /// Below every version that a change can have.
    pub const ZERO: Self = Self {
        epoch: 0,
        commit_lsn: Lsn::ZERO,
        seq: 0,
    };

    /// Assembles a version from its parts.
    #[must_use]
    pub const fn new(epoch: u32, commit_lsn: Lsn, seq: u32) -> Self {
        Self {
            epoch,
            commit_lsn,
            seq,
        }
    }

    /// The version as 16 bytes whose order under `memcmp` is the versions' order.
    #[must_use]
    pub fn to_bytes(self) -> [u8; 16] {
        let value = u128::from(self.epoch) << 96
            | u128::from(self.commit_lsn.0) << 32
            | u128::from(self.seq);
        value.to_be_bytes()
    }

    /// The inverse of [`Version::to_bytes`].
    #[must_use]
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        let value = u128::from_be_bytes(bytes);
        // Each part is cut to its own width, so no conversion below can lose a bit.
        Self {
            epoch: (value >> 96) as u32,
            commit_lsn: Lsn((value >> 32) as u64),
            seq: value as u32,
        }
    }

    /// Reads 32 hexadecimal digits; `None` for anything else.
    #[must_use]
    pub fn from_digits(text: &[u8]) -> Option<Self> {
        let text = <&[u8; 32]>::try_from(text).ok()?;
        let (mut bytes, mut wrong) = ([0; 16], 0);
        for (byte, pair) in bytes.iter_mut().zip(text.as_chunks::<2>().0) {
            let [high, low] = pair.map(|digit| DIGITS[usize::from(digit)]);
            *byte = high << 4 | low;
            wrong |= high | low;
        }
        (wrong < 16).then(|| Self::from_bytes(bytes))
    }
}

/// A text that is not 32 hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a version of 32 hexadecimal digits: {0:?}")]
pub struct ParseVersionError(String);

/// What each byte stands for as a hexadecimal digit; [`NO_DIGIT`] for every other one.
const DIGITS: [u8; 256] = {
    let mut digits = [NO_DIGIT; 256];
    let mut value = 0;
    while value < 16 {
        digits[b"0123456789abcdef"[value] as usize] = value as u8;
        digits[b"0123456789ABCDEF"[value] as usize] = value as u8;
        value += 1;
    }
    digits
};
const NO_DIGIT: u8 = 0xFF;

impl FromStr for Version {
    type Err = ParseVersionError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::from_digits(text.as_bytes()).ok_or_else(|| ParseVersionError(text.to_owned()))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:08x}{:016x}{:08x}",
            self.epoch, self.commit_lsn.0, self.seq
        )
    }
}

/// Where in the decoded change sequence a message stands: everything of the source below it comes earlier in
/// the stream.
///
/// For a streamed change it has the value of the change's version. A row that a backfill read has an older
/// version than its position; a heartbeat stands above every change of its transaction, a progress message at
/// `(wal_end, 0)`. Resume, loss checks and searches compare positions; the guard compares versions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position(pub Version);

impl Position {
    /// Below every message.
    pub const ZERO: Self = Self(Version::ZERO);

    /// Assembles a position from its parts.
    #[must_use]
    pub const fn new(epoch: u32, commit_lsn: Lsn, seq: u32) -> Self {
        Self(Version::new(epoch, commit_lsn, seq))
    }

    /// The greatest position below this one of the same transaction: where a stream stands that holds only a
    /// part of this message.
    #[must_use]
    pub fn just_below(self) -> Self {
        let Version {
            epoch,
            commit_lsn,
            seq,
        } = self.0;
        Self::new(epoch, commit_lsn, seq.saturating_sub(1))
    }

    /// The epoch this position belongs to.
    #[must_use]
    pub const fn epoch(self) -> u32 {
        self.0.epoch
    }

    /// The transaction this position belongs to, or the WAL position it reached.
    #[must_use]
    pub const fn commit_lsn(self) -> Lsn {
        self.0.commit_lsn
    }
}

impl From<Version> for Position {
    fn from(version: Version) -> Self {
        Self(version)
    }
}

impl FromStr for Position {
    type Err = ParseVersionError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self)
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

macro_rules! serde_as_text {
    ($type:ty) => {
        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

serde_as_text!(Version);
serde_as_text!(Position);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_order_and_byte_order_are_version_order() {
        let mut versions = Vec::new();
        for epoch in [0, 1, u32::MAX] {
            for lsn in [0, 1, 0xFFFF_FFFF, 1 << 32, u64::MAX] {
                for seq in [0, 1, u32::MAX] {
                    versions.push(Version::new(epoch, Lsn(lsn), seq));
                }
            }
        }
        for a in &versions {
            assert_eq!(a.to_string().parse(), Ok(*a));
            assert_eq!(Version::from_bytes(a.to_bytes()), *a);
            for b in &versions {
                assert_eq!(a.cmp(b), a.to_string().cmp(&b.to_string()));
                assert_eq!(a.cmp(b), a.to_bytes().cmp(&b.to_bytes()));
            }
        }
    }

    #[test]
    fn a_text_that_is_not_32_hexadecimal_digits_is_refused() {
        for text in [
            "",
            "0",
            "+0000000000000000000000000000001",
            &"g".repeat(32),
            &"0".repeat(33),
        ] {
            assert!(text.parse::<Version>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn just_below_stays_in_the_transaction() {
        let at = |seq| Position::new(1, Lsn(9), seq);
        assert_eq!(at(2).just_below(), at(1));
        assert_eq!(at(0).just_below(), at(0));
    }
}
