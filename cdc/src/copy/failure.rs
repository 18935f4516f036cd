//! What a failure means for the rest of a copy. Pure.

use millrace_config::{Code, Condition, limits};
use millrace_event::TableName;
use tokio_postgres::error::Severity;

use super::keyset::KeyMismatch;
use crate::Error;
use crate::stream::StreamError;

/// A failure of a copy, by how far it reaches.
#[derive(Debug)]
pub(super) enum Failure {
    /// One table cannot be copied for now.
    Table {
        /// Why.
        condition: Condition,
        /// Whether the others can still be read under the same snapshot: the source itself ended the command.
        snapshot_lives: bool,
    },
    /// The attempt is over; another may do better.
    Attempt(Condition),
    /// Capture must find out anew what the source is.
    Life(Error),
    /// The sink asks for something else by now.
    Replaced,
}

impl Failure {
    /// What the source's answer to reading a table means.
    pub(super) fn of_table(table: &TableName, error: tokio_postgres::Error) -> Self {
        let Some(server) = error.as_db_error() else {
            return Error::from(error).into();
        };
        let gone = matches!(
            server.parsed_severity(),
            Some(Severity::Fatal | Severity::Panic)
        );
        let (sqlstate, said) = (server.code().code(), server.message());
        if gone || is_of_the_session(sqlstate) {
            return Error::from(error).into();
        }
        let condition = |code, remedy: String| {
            Condition::new(
                code,
                format!("table {table} cannot be copied: {said}"),
                remedy,
            )
        };
        let condition = match sqlstate {
            // A column is gone since capture looked at the table: the next life knows.
            "42703" => {
                let reason = format!("table {table} has changed since capture began");
                return Self::Life(Error::retry(reason, error));
            }
            "42501" => condition(
                Code::SourcePrivilege,
                format!(
                    "GRANT SELECT ON {} TO the user of source.url, and USAGE on its schema (see `millrace \
                     init-sql`); where the table has row level security, ALTER ROLE that user BYPASSRLS",
                    table.quoted()
                ),
            ),
            "42P01" | "3F000" => condition(
                Code::TableMissing,
                format!("create it, or remove tables/{table}.toml"),
            ),
            _ => Condition::new(
                Code::CopyFailed,
                format!("table {table} cannot be copied: the source answered {sqlstate}: {said}"),
                "resolve what the source says; the copy is tried again by itself",
            ),
        };
        Self::Table {
            condition,
            snapshot_lives: true,
        }
    }

    /// What the source's answer to reading a chunk means. The table's columns were just found to be as capture
    /// knows them, so another one that is missing was named by the request's condition.
    pub(super) fn of_chunk(
        table: &TableName,
        filter: Option<&str>,
        error: tokio_postgres::Error,
    ) -> Self {
        let (Some(filter), Some(server)) = (filter, error.as_db_error()) else {
            return Self::of_table(table, error);
        };
        let (sqlstate, said) = (server.code().code(), server.message());
        let of_condition = ["22", "42"].iter().any(|class| sqlstate.starts_with(class));
        if !of_condition || matches!(sqlstate, "42501" | "42P01") {
            return Self::of_table(table, error);
        }
        Self::Table {
            condition: Condition::new(
                Code::BackfillFilter,
                format!("the backfill of table {table} with the condition {filter}: {said}"),
                "cancel the backfill, and start it with another condition: \
                 `millrace backfill cancel`, then `start`",
            ),
            snapshot_lives: true,
        }
    }

    /// The source refuses to take a mark into its WAL.
    pub(super) fn heartbeat_refused(error: &tokio_postgres::Error) -> Self {
        let said = error
            .as_db_error()
            .map_or_else(|| error.to_string(), |said| said.message().to_owned());
        Self::Attempt(Condition::new(
            Code::HeartbeatRefused,
            format!("the source takes no heartbeat: {said}"),
            "let source.url lead to the primary, and grant its user EXECUTE on the function \
             pg_logical_emit_message where that was revoked",
        ))
    }

    /// A key that was asked for and is none of this table.
    pub(super) fn of_key(table: &TableName, error: &KeyMismatch) -> Self {
        Self::Table {
            condition: Condition::new(
                Code::CopyFailed,
                format!("table {table} cannot be copied: {error}"),
                "start the backfill anew: the table's key has changed since it was asked for",
            ),
            snapshot_lives: true,
        }
    }

    /// A row that cannot be put on the stream.
    pub(super) fn of_row(table: &TableName, error: &(impl std::error::Error + 'static)) -> Self {
        let why = millrace_config::chain(error);
        Self::in_the_middle(Condition::new(
            Code::CopyFailed,
            format!("a row of table {table} cannot be copied: {why}"),
            "correct the row in the source; the copy is tried again by itself",
        ))
    }

    /// A row that is larger than the stream carries.
    pub(super) fn too_large(table: &TableName, bytes: usize) -> Self {
        Self::in_the_middle(Condition::new(
            Code::RowTooLarge,
            format!(
                "a row of table {table} needs {bytes} bytes on the stream and may have {}",
                limits::ROW_BYTES_MAX
            ),
            "make the row's values smaller in the source; the copy is tried again by itself",
        ))
    }

    /// The source would send the rest of the table: only a new session is rid of it.
    fn in_the_middle(condition: Condition) -> Self {
        Self::Table {
            condition,
            snapshot_lives: false,
        }
    }
}

/// Connection exceptions, transactions that are over, missing resources, and a server that goes away: nothing
/// of it is the table's fault.
fn is_of_the_session(sqlstate: &str) -> bool {
    let classes = ["08", "25", "53"];
    classes.iter().any(|class| sqlstate.starts_with(class)) || sqlstate.starts_with("57P")
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Attempt(match error {
            Error::Halt(condition)
            | Error::Refused(condition)
            | Error::Standby(condition)
            | Error::Retry {
                condition: Some(condition),
                ..
            } => condition,
            error @ Error::Retry { .. } => Condition::new(
                Code::CopyFailed,
                error.chain(),
                "nothing to do if it passes: the copy is tried again by itself",
            ),
        })
    }
}

impl From<tokio_postgres::Error> for Failure {
    fn from(error: tokio_postgres::Error) -> Self {
        Error::from(error).into()
    }
}

impl From<StreamError> for Failure {
    fn from(error: StreamError) -> Self {
        Error::from(error).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_that_ends_is_no_fault_of_the_table() {
        for sqlstate in ["57P01", "57P03", "08006", "53300", "25P02"] {
            assert!(is_of_the_session(sqlstate), "{sqlstate}");
        }
        for sqlstate in ["42501", "57014", "55P03", "XX001", "22021"] {
            assert!(!is_of_the_session(sqlstate), "{sqlstate}");
        }
    }

    #[test]
    fn a_condition_keeps_its_code_and_another_failure_gets_one() {
        let slot = Condition::new(Code::NoFreeSlot, "none", "raise");
        let code = |error: Error| match Failure::from(error) {
            Failure::Attempt(condition) => condition.code,
            other => panic!("{other:?}"),
        };
        assert_eq!(code(Error::halt(slot)), Code::NoFreeSlot);
        assert_eq!(code(Error::retry_because("away")), Code::CopyFailed);
    }
}
