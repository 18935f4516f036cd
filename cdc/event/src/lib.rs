//! The wire contract between capture and everything that reads its stream.
//!
//! Pure: no I/O, no clock, no client of any server. `FORMAT.md` beside this crate says what each byte means.

mod lsn;
mod table;
mod version;

pub use lsn::{Lsn, ParseLsnError};
pub use table::{TableName, quote_identifier, quote_literal};
pub use version::{ParseVersionError, Position, Version};
