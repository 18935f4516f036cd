//! Whether capture would go on with a configuration, as far as it shows without changing anything.

use millrace_config::{Code, Condition, Config, Create};
use millrace_connect::nats::{self, Reconnect};
use millrace_connect::postgres::{Session, connect};
use millrace_event::TableName;
use tokio_postgres::Client;

use crate::identity::published::Earlier;
use crate::source::{self, PublicationChange, SourceTable};
use crate::{Error, life};

/// What the servers' monitoring shows.
const NAME: &str = "millrace check";

/// Looks at the source, and at what was stored beside the stream, as a capture with this configuration would when it
/// begins anew, on connections of its own. Nothing is changed, and what runs with the configuration `running` is not
/// disturbed. A table that would be parked is no reason against it, unless its own settings have changed.
///
/// # Errors
/// [`Error::Halt`] or [`Error::Refused`]: capture would not go on. [`Error::Retry`]: that cannot be found out now.
pub async fn check(running: &Config, config: &Config) -> Result<(), Error> {
    let dsn = source::dsn(&config.source)?;
    let session = Session {
        application_name: NAME.to_owned(),
        options: Vec::new(),
    };
    let client = connect(&dsn, session).await?;
    let facts = source::inspect(&client).await?;
    let salt = life::salt(config)?;
    let inspected = source::inspect_tables(&client, &facts, &config.tables, salt.as_ref()).await?;

    let nats = nats::connect(&config.stream, NAME, life::INBOX, Reconnect::Never).await?;
    let jetstream = async_nats::jetstream::new(nats);
    if !life::captured_before(config, &jetstream).await? {
        let tables = inspected.all()?;
        // Nothing was ever captured: no name of a column can be one that it had before.
        let unknown = tables.iter().find(|table| !table.absent.is_empty());
        return match unknown {
            Some(table) => Err(Error::halt(source::unknown_columns(
                &table.settings,
                &table.absent,
            ))),
            None => Ok(()),
        };
    }
    let stream = life::open_buckets(config, jetstream).await?;
    let earlier = Earlier::read(&stream).await?;
    let publication = source::publication_name(&config.source.name);
    let mut members = source::published_tables(&client, facts.version, &publication).await?;
    earlier.recall(&mut members);
    let unchanged = |table: &TableName| {
        let of = |config: &Config| config.tables.iter().find(|of| of.name == *table).cloned();
        of(running) == of(config)
    };
    let (mut tables, _) = earlier.admit(inspected, &members, unchanged)?;
    earlier.carry_over(&mut tables)?;
    if facts.in_recovery {
        source::adopt_filters(&client, facts.version, &publication, &mut tables).await?;
    }
    let found = source::find_publication(&client, &publication).await?;
    let known = earlier.publication();
    if known.is_some_and(|known| found != Some(known)) {
        return Err(Error::halt(source::publication_gone(&publication)));
    }
    let drift = earlier.check(&publication, &tables, &members, config.source.create)?;
    tables.retain(|table| !drift.has_lost(&table.name));
    let change = source::publication_change(&client, facts.version, &publication, &tables).await?;
    match change {
        None => Ok(()),
        Some(change) if config.source.create == Create::Never => {
            Err(Error::halt(change.condition()))
        }
        Some(change) => {
            tables.retain(|table| {
                let published = members.contains_key(&table.name);
                !published || change.altered.contains(&table.name)
            });
            may_change(&client, &publication, &change, &tables).await
        }
    }
}

/// Whether this user may change the publication: its owner must be among the user's roles, and that of each table.
const MAY_CHANGE: &str = "SELECT coalesce((SELECT pg_has_role(pubowner, 'USAGE') FROM pg_publication WHERE pubname = $1), \
    has_database_privilege(current_database(), 'CREATE')) \
    AND NOT EXISTS (SELECT FROM unnest($2::text[]) name JOIN pg_class c ON c.oid = to_regclass(name) \
    WHERE NOT pg_has_role(c.relowner, 'USAGE'))";

async fn may_change(
    client: &Client,
    publication: &str,
    change: &PublicationChange,
    tables: &[SourceTable],
) -> Result<(), Error> {
    let names: Vec<_> = tables.iter().map(|table| table.name.quoted()).collect();
    let row = client
        .query_one(MAY_CHANGE, &[&publication, &names])
        .await?;
    match row.get(0) {
        true => Ok(()),
        false => Err(Error::halt(Condition::new(
            Code::SourcePrivilege,
            format!("publication \"{publication}\" cannot be created or changed by this user"),
            format!(
                "as the tables' owner, with CREATE on the database: {}",
                change.sql()
            ),
        ))),
    }
}
