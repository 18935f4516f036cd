//! What is asked of the source before a backfill starts, and while it is looked at.

use std::collections::{BTreeMap, BTreeSet};

use millrace_cdc::selection::Salt;
use millrace_cdc::source;
use millrace_config::{Code, Condition, Config, Table};
use millrace_event::TableName;
use tokio_postgres::Transaction;

use super::super::status::{in_time, source_condition};
use super::{NAME, Refusal};
use crate::connection::{self, Side, chain};

/// The longest condition that is taken: it travels with every request.
const FILTER_BYTES_MAX: usize = 10_000;

/// Checks that the source has these tables with their keys and takes the condition. Nothing is changed. Returns what
/// is worth a warning.
pub(super) async fn check(
    config: &Config,
    tables: &[Table],
    filter: Option<&str>,
) -> Result<Option<Condition>, Refusal> {
    let checked = in_time(Code::SourceUnreachable, async {
        Ok(Box::pin(check_now(config, tables, filter)).await)
    });
    checked.await?
}

async fn check_now(
    config: &Config,
    tables: &[Table],
    filter: Option<&str>,
) -> Result<Option<Condition>, Refusal> {
    let mut client = connection::postgres(&config.source.url, Side::Source, NAME).await?;
    let facts = source::inspect(&client).await;
    let facts = facts.map_err(|error| source_condition(&error))?;
    // Nothing is hashed here: any salt will do.
    let salt = Salt::new(&[0; Salt::BYTES_MIN]);
    let found = source::inspect_tables(&client, &facts, tables, Some(&salt)).await;
    let found = found.and_then(source::Inspected::all);
    found.map_err(|error| source_condition(&error))?;
    if let Some(filter) = filter {
        check_form(filter).map_err(Refusal::Filter)?;
        for table in tables {
            let transaction = client.build_transaction().read_only(true).start().await;
            let transaction = transaction.map_err(|error| unreachable(&error))?;
            check_filter(&transaction, &table.name, filter).await?;
        }
    }
    // Together, as capture reads them: while it does the slot may have to keep as much as all of them have.
    let together: Vec<_> = tables.iter().map(|table| &table.name).collect();
    let warning = source::room_for(&client, &config.source.name, &together).await;
    warning.map_err(|error| source_condition(&error).into())
}

fn unreachable(error: &tokio_postgres::Error) -> Condition {
    Condition::new(
        Code::SourceUnreachable,
        chain(error),
        "check the network and the server's load",
    )
}

fn wrong(message: impl Into<String>) -> Condition {
    Condition::new(
        Code::BackfillCondition,
        message,
        "correct what follows --where: one condition on the source's columns, quoted for the shell",
    )
}

/// What the text alone shows.
fn check_form(filter: &str) -> Result<(), Condition> {
    if filter.trim().is_empty() {
        return Err(wrong("--where is empty"));
    }
    if filter.len() > FILTER_BYTES_MAX {
        let length = filter.len();
        return Err(wrong(format!(
            "--where has {length} bytes and may have {FILTER_BYTES_MAX}"
        )));
    }
    // Of what follows a comment would hide the end.
    if let Some(begin) = ["--", "/*"]
        .into_iter()
        .find(|begin| filter.contains(begin))
    {
        return Err(wrong(format!(
            "--where holds {begin}, which begins a comment; in a string write '-' || '-'"
        )));
    }
    Ok(())
}

/// Asks the source whether it is one condition on the table's rows. It is prepared and planned, and not executed.
async fn check_filter(
    transaction: &Transaction<'_>,
    table: &TableName,
    filter: &str,
) -> Result<(), Refusal> {
    let quoted = table.quoted();
    let sql = format!("SELECT FROM {quoted} WHERE ({filter}\n)");
    let refused = |error: tokio_postgres::Error| refused(table, &error);
    let prepared = transaction.prepare(&sql).await.map_err(refused)?;
    if !prepared.params().is_empty() {
        let message =
            format!("--where of table {table} has parameters, which nobody gives a value");
        return Err(Refusal::Filter(wrong(message)));
    }
    // No text closes both kinds of brackets that it did not open: what passes here too stays between them.
    let within = format!("SELECT ARRAY[{filter}\n] FROM {quoted}");
    if transaction.prepare(&within).await.is_err() {
        let message = format!("--where of table {table} is not one expression");
        return Err(Refusal::Filter(wrong(message)));
    }
    let plan = format!("EXPLAIN {sql}");
    transaction.query(&plan, &[]).await.map_err(refused)?;
    Ok(())
}

/// The source's answer about a condition: it is wrong, or the source cannot tell for now.
fn refused(table: &TableName, error: &tokio_postgres::Error) -> Refusal {
    let Some(server) = error.as_db_error() else {
        return unreachable(error).into();
    };
    let classes = ["08", "53", "55", "57", "58", "XX"];
    if classes
        .iter()
        .any(|class| server.code().code().starts_with(class))
    {
        return unreachable(error).into();
    }
    let hint = server.hint().map(|hint| format!(" ({hint})"));
    Refusal::Filter(wrong(format!(
        "--where of table {table}: {}{}",
        server.message(),
        hint.unwrap_or_default()
    )))
}

/// How many rows the source thinks that these tables have; without those of which it does not know.
///
/// # Errors
/// The source cannot be reached.
pub(super) async fn estimates(
    config: &Config,
    tables: &BTreeSet<&TableName>,
) -> Result<BTreeMap<TableName, u64>, Condition> {
    in_time(Code::SourceUnreachable, async {
        let client = connection::postgres(&config.source.url, Side::Source, NAME).await?;
        let estimates = source::estimate_rows(&client, tables.iter().copied()).await;
        estimates.map_err(|error| unreachable(&error))
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_has_a_form_and_a_length() {
        for right in ["id > 3", "note <> 'a - -b'", "a -\n-b > 0", "(a) OR (b)"] {
            assert_eq!(check_form(right), Ok(()), "{right}");
        }
        let long = "x".repeat(FILTER_BYTES_MAX + 1);
        for wrong in [
            "",
            " \n",
            "true -- all",
            "a /* b",
            "'--' = a",
            long.as_str(),
        ] {
            let refused = check_form(wrong).expect_err("refused");
            assert_eq!(refused.code, Code::BackfillCondition, "{wrong}");
        }
    }
}
