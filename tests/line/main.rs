//! The whole line on real servers, one module a scenario.

#![allow(missing_docs)]

mod admin_endpoint;
mod bad_input;
mod birth;
mod broker_loss;
mod copy;
mod hot_key;
mod idle_source;
mod insert_update_delete;
mod key_changes;
mod kill;
mod large_transactions;
mod parking;
mod partial_and_letters;
mod rebuild;
mod redelivery;
mod replication_connection;
mod secrets;
mod source_restart;
mod stage;
mod tables_and_names;
mod transactions;
mod truncate;
mod two_captures;
mod types;
mod unchanged_toast;
