//! The whole line on real servers, one module a scenario.

#![allow(missing_docs)]

mod admin_endpoint;
mod answers;
mod bad_input;
mod birth;
mod broker_login;
mod broker_loss;
mod broker_too_old;
mod catching_up;
mod copy;
mod copy_faults;
mod create_never;
mod deferrable_keys;
mod deferred_constraints;
mod demo;
mod hot_key;
mod idle_source;
mod insert_update_delete;
mod key_changes;
mod kill;
mod large_transactions;
mod least_privilege;
mod own_consumer;
mod parked_too_long;
mod parking;
mod partial_and_letters;
mod premade_targets;
mod rebuild;
mod redelivery;
mod replication_connection;
mod report_of_a_lost_end;
mod row_outcomes;
mod secrets;
mod slow_link;
mod source_replaced;
mod source_restart;
mod stage;
mod tables_and_names;
mod transactions;
mod truncate;
mod two_captures;
mod types;
mod unchanged_toast;
mod wide_rows;
