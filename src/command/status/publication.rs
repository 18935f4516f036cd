//! What keeps configured tables from being captured, as a capture that begins now would find it.

use std::collections::BTreeMap;

use millrace_cdc::Captured;
use millrace_cdc::selection::Salt;
use millrace_cdc::source::{self, Member, SourceTable};
use millrace_config::{Code, Condition, Config, Create, Table};
use millrace_event::TableName;

use super::probe::{NAME, in_time, source_condition};
use crate::connection::{self, Side};

/// Why tables are not captured, by table.
pub(super) type Missing = BTreeMap<TableName, Condition>;

/// Looks at the publication, and at each table that it lacks or that is parked.
///
/// # Errors
/// The source cannot be reached or read.
pub(super) async fn missing(config: &Config, captured: &[Captured]) -> Result<Missing, Condition> {
    let looked = in_time(Code::SourceUnreachable, async {
        Ok(Box::pin(look(config, captured)).await)
    });
    looked.await?.map_err(|failed| match failed {
        Failed::Connecting(condition) => condition,
        Failed::Asking(error) => source_condition(&error),
    })
}

enum Failed {
    Connecting(Condition),
    Asking(millrace_cdc::Error),
}

impl From<millrace_cdc::Error> for Failed {
    fn from(error: millrace_cdc::Error) -> Self {
        Self::Asking(error)
    }
}

async fn look(config: &Config, captured: &[Captured]) -> Result<Missing, Failed> {
    let client = connection::postgres(&config.source.url, Side::Source, NAME).await;
    let client = client.map_err(Failed::Connecting)?;
    let facts = source::inspect(&client).await?;
    let name = source::publication_name(&config.source.name);
    let known = |table: &TableName| captured.iter().find(|known| known.table == *table);
    if source::find_publication(&client, &name).await?.is_none() {
        let tables = config
            .tables
            .iter()
            .filter(|table| known(&table.name).is_some());
        let gone = |table: &Table| (table.name.clone(), source::publication_gone(&name));
        return Ok(tables.map(gone).collect());
    }
    let members = source::published_tables(&client, facts.version, &name).await?;
    let suspect = |table: &&Table| {
        let Some(member) = members.get(&table.name) else {
            return true;
        };
        known(&table.name).is_some_and(|known| known.parked || known.oid != member.oid)
    };
    let suspects: Vec<_> = config.tables.iter().filter(suspect).cloned().collect();
    // Nothing is hashed here: any salt will do.
    let salt = Salt::new(&[0; Salt::BYTES_MIN]);
    let found = source::inspect_tables(&client, &facts, &suspects, Some(&salt)).await?;
    let (parked, never): (Vec<_>, Vec<_>) = found
        .refused
        .into_iter()
        .partition(|table| known(&table.name).is_some());
    let parked = source::parked_refused(&name, &parked, &members);
    let mut missing: Missing = parked.into_iter().collect();
    missing.extend(never.into_iter().map(|table| (table.name, table.condition)));
    for table in &found.tables {
        let member = members.get(&table.name);
        let condition = match known(&table.name) {
            Some(_) => Some(left(&name, table, member)),
            // The next capture puts it in.
            None if config.source.create == Create::Auto => None,
            None => {
                let alone = std::slice::from_ref(table);
                let change = source::publication_change(&client, facts.version, &name, alone);
                change.await?.map(|change| change.condition())
            }
        };
        missing.extend(condition.map(|condition| (table.name.clone(), condition)));
    }
    Ok(missing)
}

/// Why a table is parked that could be captured.
fn left(publication: &str, table: &SourceTable, member: Option<&Member>) -> Condition {
    if member.is_some_and(|member| member.clause == table.clause()) {
        return Condition::new(
            Code::PublicationDrift,
            format!("changes of {} were not captured for a while", table.name),
            "start `millrace run`: the table is read again by itself",
        );
    }
    source::left_publication(publication, table, member.is_some())
}
