//! Readers of streams that lost something: on a real broker.

#![allow(missing_docs)]

mod decoded;
mod holes;
mod meanwhile;
mod rollback;
mod tables;
