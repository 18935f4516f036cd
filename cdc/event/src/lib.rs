//! The wire contract between capture and everything that reads its stream.
//!
//! Pure: no I/O, no clock, no client of any server. `FORMAT.md` beside this crate says what each byte means.

pub mod as_text;
mod control;
mod decode;
mod encode;
mod fnv;
pub mod header;
mod load;
mod lsn;
mod op;
mod schema;
pub mod subject;
mod table;
mod value;
mod version;
pub mod work;

pub use control::{Control, ControlKind, StreamOrigin};
pub use decode::{ChangeEvent, Columns, DecodeError, Source, decode, decode_line};
pub use encode::{
    Before, Change, Column, EncodeError, LineEnd, Relation, Transaction, write_change,
    write_line_end,
};
pub use load::{
    BINARY_END, BINARY_HEAD, BINARY_NULL, BinaryType, LoadColumn, LoadError, LoadFormat, LoadHead,
    as_streamed, binary_field, binary_row, escape_load_value, load_fields, load_rows, load_value,
};
pub use lsn::{Lsn, ParseLsnError};
pub use op::Op;
pub use schema::{ColumnSchema, ColumnShape, TableSchema, TypeSchema, fingerprint};
pub use table::{TableName, quote_identifier, quote_literal};
pub use value::{Datum, Element, Kind, NotUtf8, Value};
pub use version::{ParseVersionError, Position, Version};
