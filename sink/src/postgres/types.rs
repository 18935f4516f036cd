//! Creates the enums and domains that a target lacks.

use millrace_event::{TypeSchema, quote_literal};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Error};

/// Creates a type, in the open transaction. One that is made of something that the target lacks too, as a
/// composite type or a function in a constraint, is left out: its columns become text.
pub(super) async fn create(client: &Client, definition: &TypeSchema) -> Result<(), Error> {
    let sql = format!(
        "SAVEPOINT millrace_type; {}; RELEASE SAVEPOINT millrace_type",
        statement(definition)
    );
    match client.batch_execute(&sql).await {
        Err(error) if lacks_a_part(&error) => {
            let undo = "ROLLBACK TO SAVEPOINT millrace_type";
            client.batch_execute(undo).await
        }
        result => result,
    }
}

/// Whether a definition names something that the target does not have.
fn lacks_a_part(error: &Error) -> bool {
    let lacking = [
        SqlState::UNDEFINED_OBJECT,
        SqlState::UNDEFINED_FUNCTION,
        SqlState::UNDEFINED_TABLE,
        SqlState::INVALID_SCHEMA_NAME,
    ];
    error.code().is_some_and(|code| lacking.contains(code))
}

/// The statement that creates a type.
fn statement(definition: &TypeSchema) -> String {
    match definition {
        TypeSchema::Enum { name, labels } => {
            let labels: Vec<_> = labels.iter().map(|label| quote_literal(label)).collect();
            format!(
                "CREATE TYPE {} AS ENUM ({})",
                name.quoted(),
                labels.join(", ")
            )
        }
        TypeSchema::Domain {
            name,
            base,
            not_null,
            checks,
        } => {
            let not_null = if *not_null { " NOT NULL" } else { "" };
            let checks: String = checks.iter().map(|check| format!(" {check}")).collect();
            format!(
                "CREATE DOMAIN {} AS {base}{not_null}{checks}",
                name.quoted()
            )
        }
    }
}
