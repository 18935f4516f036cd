//! What the target's errors mean: try again, set a row aside, park a table, or stop.

use millrace_config::{Code, Condition};
use millrace_event::TableName;
use tokio_postgres::Error;
use tokio_postgres::error::SqlState;

use crate::sink::SinkError;

/// What an error is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    /// The server or the connection: the same again may work.
    World,
    /// One row's values.
    Row,
    /// A table's shape or its privileges.
    Table,
    /// Follows from an earlier error of the same transaction.
    Aborted,
    /// Anything else.
    Other,
}

/// Classifies an error by its SQLSTATE; one without a SQLSTATE comes from the connection.
pub(super) fn cause(error: &Error) -> Cause {
    let Some(state) = error.code() else {
        return Cause::World;
    };
    if *state == SqlState::IN_FAILED_SQL_TRANSACTION {
        return Cause::Aborted;
    }
    match state.code().get(..2).unwrap_or_default() {
        // Connection, rollback, resources, operator intervention, system error, and lock not available.
        "08" | "40" | "53" | "57" | "58" => Cause::World,
        "55" => Cause::World,
        // Data, integrity; a value too complex or long for an index; a check option of a view.
        "22" | "23" | "44" | "54" => Cause::Row,
        // A trigger that raised.
        "P0" => Cause::Row,
        "42" | "0A" | "3F" | "28" => Cause::Table,
        _ => Cause::Other,
    }
}

/// The server's message, or the connection's.
pub(super) fn message(error: &Error) -> String {
    error
        .as_db_error()
        .map_or_else(|| error.to_string(), |db| db.message().to_owned())
}

/// The error of something that is about no table.
pub(super) fn general(what: &'static str, error: Error) -> SinkError {
    match cause(&error) {
        Cause::World | Cause::Aborted => SinkError::Transient {
            what,
            condition: None,
            source: error.into(),
        },
        Cause::Row | Cause::Table | Cause::Other => {
            let code = match error.code() {
                Some(&SqlState::INSUFFICIENT_PRIVILEGE) => Code::TargetPrivilege,
                _ => Code::TargetType,
            };
            let condition = Condition::new(
                code,
                format!("{what}: {}", message(&error)),
                "see the target's log; `millrace init-sql` prints the grants that a sink needs",
            );
            SinkError::Fatal {
                condition: Box::new(condition),
                source: Some(error.into()),
            }
        }
    }
}

/// The error of a statement that writes one table.
pub(super) fn of_table(what: &'static str, table: &TableName, error: Error) -> SinkError {
    if cause(&error) != Cause::Table {
        return general(what, error);
    }
    let (code, remedy) = match error.code() {
        Some(&SqlState::UNDEFINED_TABLE | &SqlState::INVALID_SCHEMA_NAME) => (
            Code::TargetTableMissing,
            "create the target table again, or let Millrace create it",
        ),
        Some(&SqlState::UNDEFINED_COLUMN) => (
            Code::TargetColumnMissing,
            "add the column to the target table again",
        ),
        Some(&SqlState::INSUFFICIENT_PRIVILEGE) => (
            Code::TargetPrivilege,
            "grant it; `millrace init-sql` prints what a sink needs",
        ),
        Some(&SqlState::INVALID_COLUMN_REFERENCE) => (
            Code::TargetKey,
            "add a primary key over the key columns to the target table",
        ),
        _ => (
            Code::TargetType,
            "give the target's columns the types that the source's have",
        ),
    };
    let condition = Condition::new(code, format!("table {table}: {}", message(&error)), remedy);
    SinkError::Table {
        table: table.clone(),
        condition: Box::new(condition),
        source: Some(error.into()),
    }
}
