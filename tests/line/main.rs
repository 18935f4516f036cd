//! The whole line on real servers, one module a scenario.

#![allow(missing_docs)]

mod insert_update_delete;
mod stage;
