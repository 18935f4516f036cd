//! The publication.

use std::collections::HashMap;

use millrace_config::{Code, Condition, Create};
use millrace_event::{TableName, quote_identifier, quote_literal};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, SimpleQueryMessage};

use super::membership::{Alteration, Member, only, published_tables, within_lock_timeout};
use super::{SourceTable, selection};
use crate::Error;

/// How long a table's lock may be waited for before its columns are looked at, in milliseconds. Streaming waits.
const NAMES_LOCK_TIMEOUT_MS: u32 = 10_000;

/// The publication of a source: `millrace_<source>`.
#[must_use]
pub fn publication_name(source: &str) -> String {
    format!("millrace_{source}")
}

impl SourceTable {
    /// The table as a publication's statement names it, with its columns and its filter.
    pub(super) fn published_as(&self) -> String {
        let mut sql = only(&self.name);
        if let Some(list) = &self.list {
            let names: Vec<_> = list
                .iter()
                .map(|(_, name)| quote_identifier(name))
                .collect();
            sql = format!("{sql} ({})", names.join(", "));
        }
        match &self.filter {
            Some(filter) => format!("{sql} WHERE ({filter})"),
            None => sql,
        }
    }

    /// Whether a membership publishes of the table what is configured.
    pub(crate) fn is_published_as(&self, member: &Member) -> bool {
        let Member { clause, .. } = member;
        if !member.unread {
            return *clause == self.clause();
        }
        // A membership with another condition has another OID.
        let known = self.published.as_ref();
        let known = known.filter(|(oid, _)| *oid == member.oid);
        clause.columns == self.clause().columns
            && known.is_some_and(|(_, filter)| filter.is_some() && *filter == self.filter)
    }
}

/// What a publication lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicationChange {
    name: String,
    code: Code,
    message: String,
    /// One after the other, in one transaction.
    statements: Vec<String>,
    /// Tables that are not published.
    pub added: Vec<TableName>,
    /// Tables that are published already, with other columns or rows.
    pub altered: Vec<TableName>,
}

/// Compares the publication with what it should be. Nothing is ever removed from it: that is the operator's call.
///
/// # Errors
/// It does not publish every kind of change, or publishes what has no members to change; or the connection failed.
pub async fn publication_change(
    client: &Client,
    version: i32,
    name: &str,
    tables: &[SourceTable],
) -> Result<Option<PublicationChange>, Error> {
    if !check_options(client, name, tables).await? {
        return Ok(Some(PublicationChange {
            name: name.to_owned(),
            code: Code::PublicationMissing,
            message: format!("publication \"{name}\" does not exist"),
            statements: vec![create_publication(
                name,
                &join(tables, SourceTable::published_as),
            )],
            added: Vec::new(),
            altered: Vec::new(),
        }));
    }
    let members = published_tables(client, version, name).await?;
    difference(name, tables, &members).map_err(Error::halt)
}

/// What a publication with these members lacks.
fn difference(
    name: &str,
    tables: &[SourceTable],
    members: &HashMap<TableName, Member>,
) -> Result<Option<PublicationChange>, Condition> {
    let quoted = quote_identifier(name);
    let (mut missing, mut altered) = (Vec::new(), Vec::new());
    for table in tables {
        match members.get(&table.name) {
            None => missing.push(table),
            Some(member) if table.is_published_as(member) => {}
            Some(member) if member.own => altered.push(table),
            Some(_) => return Err(shared(name, table, tables)),
        }
    }
    let (mut said, mut statements) = (Vec::new(), Vec::new());
    if !missing.is_empty() {
        let names = join(missing.iter().copied(), |table| table.name.quoted());
        said.push(format!("lacks {names}"));
        let added = join(missing.iter().copied(), SourceTable::published_as);
        statements.push(format!("ALTER PUBLICATION {quoted} ADD TABLE {added}"));
    }
    if !altered.is_empty() {
        let names = join(altered.iter().copied(), |table| table.name.quoted());
        said.push(format!(
            "publishes other columns or rows of {names} than are configured"
        ));
        // Both in one transaction: no change of the table ever sees it unpublished. SET TABLE would have to repeat
        // all that the operator has put into the publication beside our tables.
        let dropped = join(altered.iter().copied(), |table| only(&table.name));
        statements.push(format!("ALTER PUBLICATION {quoted} DROP TABLE {dropped}"));
        let added = join(altered.iter().copied(), SourceTable::published_as);
        statements.push(format!("ALTER PUBLICATION {quoted} ADD TABLE {added}"));
    }
    let names = |tables: &[&SourceTable]| tables.iter().map(|table| table.name.clone()).collect();
    Ok((!said.is_empty()).then(|| PublicationChange {
        name: name.to_owned(),
        code: Code::PublicationDrift,
        message: format!("publication \"{name}\" {}", said.join(", and ")),
        statements,
        added: names(&missing),
        altered: names(&altered),
    }))
}

/// The publication has a table that is no member by itself, so nothing can be changed about it alone.
fn shared(name: &str, table: &SourceTable, tables: &[SourceTable]) -> Condition {
    Condition::new(
        Code::PublicationDrift,
        format!(
            "publication \"{name}\" is of all tables or of a schema, and cannot publish a part of {}",
            table.name
        ),
        format!(
            "make it one of single tables: DROP PUBLICATION {}; {}; \
             then run `millrace drop` and `millrace run`",
            quote_identifier(name),
            create_publication(name, &join(tables, SourceTable::published_as))
        ),
    )
}

/// Checks that a publication publishes every kind of change, and a partitioned table's under its own name. Says
/// whether it exists.
///
/// # Errors
/// It does not; or the connection failed.
pub async fn check_options(
    client: &Client,
    name: &str,
    tables: &[SourceTable],
) -> Result<bool, Error> {
    let names: Vec<_> = tables.iter().map(|table| table.name.quoted()).collect();
    let row = client
        .query_opt(
            "SELECT pubinsert AND pubupdate AND pubdelete AND pubtruncate, pubviaroot OR NOT EXISTS (\
             SELECT FROM unnest($2::text[]) w(name) JOIN pg_class c ON c.oid = to_regclass(w.name) \
             WHERE c.relkind = 'p') FROM pg_publication WHERE pubname = $1",
            &[&name, &names],
        )
        .await?;
    let Some(row) = row else { return Ok(false) };
    let (said, option) = match (row.get(0), row.get(1)) {
        (true, true) => return Ok(true),
        (false, _) => (
            "does not publish every kind of change",
            "publish = 'insert, update, delete, truncate'",
        ),
        (true, false) => (
            "publishes partitions instead of their tables",
            "publish_via_partition_root = true",
        ),
    };
    Err(Error::halt(Condition::new(
        Code::PublicationDrift,
        format!("publication \"{name}\" {said}"),
        format!(
            "ALTER PUBLICATION {} SET ({option}); \
             what was changed meanwhile is missing: then run `millrace drop` and `millrace run`",
            quote_identifier(name)
        ),
    )))
}

fn join<'t>(
    tables: impl IntoIterator<Item = &'t SourceTable>,
    part: impl Fn(&SourceTable) -> String,
) -> String {
    let parts: Vec<_> = tables.into_iter().map(part).collect();
    parts.join(", ")
}

/// The statement that makes a publication of these tables.
fn create_publication(name: &str, tables: &str) -> String {
    format!(
        "CREATE PUBLICATION {} FOR TABLE {tables} WITH (publish_via_partition_root = true)",
        quote_identifier(name)
    )
}

impl PublicationChange {
    /// The change as an operator runs it.
    #[must_use]
    pub fn sql(&self) -> String {
        match self.statements.as_slice() {
            [only] => only.clone(),
            all => format!("BEGIN; {}; COMMIT", all.join("; ")),
        }
    }

    /// The change as what keeps the product from going on.
    #[must_use]
    pub fn condition(&self) -> Condition {
        Condition::new(self.code, self.message.clone(), self.sql())
    }

    /// Makes the change, or nothing of it. `tables` are those that it was found for.
    ///
    /// # Errors
    /// It may not be made, a privilege is missing, Postgres does not take a row filter, or the connection failed.
    pub async fn make(
        &self,
        client: &Client,
        tables: &[SourceTable],
        create: Create,
    ) -> Result<Alteration, Error> {
        let name = &self.name;
        if create == Create::Never {
            return Err(Error::halt(self.condition()));
        }
        let sql = self.sql();
        tracing::info!(publication = name, %sql, "changing the publication");
        let Err(error) = client
            .batch_execute(&within_lock_timeout(&self.statements.join("; ")))
            .await
        else {
            return Ok(Alteration::Settled);
        };
        if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) {
            return Ok(Alteration::Locked);
        }
        if error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) {
            return Err(Error::halt(Condition::new(
                Code::SourcePrivilege,
                format!("publication \"{name}\" cannot be created or changed by this user"),
                format!("as the tables' owner, with CREATE on the database: {sql}"),
            )));
        }
        for table in tables {
            try_filter(client, table).await?;
        }
        match error.as_db_error() {
            // What the publication is keeps it from being changed so: trying again changes nothing.
            // Except where another capture was quicker: the next look finds what it made.
            Some(server)
                if ["0A", "22", "42", "55"].contains(&&server.code().code()[..2])
                    && server.code() != &SqlState::DUPLICATE_OBJECT =>
            {
                Err(Error::halt(Condition::new(
                    Code::PublicationDrift,
                    format!(
                        "{}, and Postgres does not change it: {}",
                        self.message,
                        server.message()
                    ),
                    format!("resolve what Postgres says, so that this can be run: {sql}"),
                )))
            }
            _ => Err(error.into()),
        }
    }
}

/// Lets Postgres say what is wrong with a table's row filter, in a publication that is rolled back.
async fn try_filter(client: &Client, table: &SourceTable) -> Result<(), Error> {
    let Some(filter) = &table.settings.filter else {
        return Ok(());
    };
    let name = format!("millrace_try_{:08x}", rand::random::<u32>());
    let sql = create_publication(&name, &table.published_as());
    client.batch_execute("BEGIN").await?;
    let tried = client.batch_execute(&sql).await;
    client.batch_execute("ROLLBACK").await?;
    tried.map_err(|error| selection::filter_refused(&table.settings, filter, error))
}

/// Takes the row filters that are published for those that are configured: on a standby, which cannot read them.
///
/// # Errors
/// A table is locked, so that nobody reads its filter; or the connection failed.
pub async fn adopt_filters(
    client: &Client,
    version: i32,
    name: &str,
    tables: &mut [SourceTable],
) -> Result<(), Error> {
    let members = published_tables(client, version, name).await?;
    for table in tables {
        let member = members.get(&table.name);
        if member.is_some_and(|member| member.unread) {
            let reason = format!("table {} is locked at the source", table.name);
            return Err(Error::retry_because(reason));
        }
        let published = member.and_then(|member| member.clause.filter.clone());
        if table.filter.is_some() && published.is_some() {
            table.filter = published;
        }
    }
    Ok(())
}

/// The OID of a publication, if there is one of that name.
///
/// # Errors
/// The connection failed.
pub async fn find_publication(client: &Client, name: &str) -> Result<Option<u32>, Error> {
    let sql = "SELECT oid FROM pg_publication WHERE pubname = $1";
    let row = client.query_opt(sql, &[&name]).await?;
    Ok(row.map(|row| row.get(0)))
}

/// Why capture cannot go on when its publication was dropped: a slot decodes older WAL with the publication that
/// was there then.
#[must_use]
pub fn publication_gone(name: &str) -> Condition {
    Condition::new(
        Code::PublicationDrift,
        format!("publication \"{name}\" was dropped"),
        "changes made meanwhile are lost: run `millrace drop`, then `millrace run`, \
         which copies the tables again",
    )
}

/// Of the tables with a column list, one that has a column since which neither the list nor the configuration
/// names: the list keeps it from being published.
///
/// # Errors
/// The connection failed.
pub async fn unlisted_column(
    client: &Client,
    tables: &[&SourceTable],
) -> Result<Option<(TableName, String)>, Error> {
    for table in tables {
        let Some(list) = &table.list else { continue };
        let rows = client
            .query(
                "SELECT attnum, attname::text FROM pg_attribute WHERE attrelid = to_regclass($1) \
                 AND attnum > 0 AND NOT attisdropped AND attgenerated = ''",
                &[&table.name.quoted()],
            )
            .await?;
        let columns = rows.iter().map(|row| (row.get(0), row.get(1)));
        let unlisted = |(number, name): &(i16, String)| {
            let listed = list.iter().any(|(listed, _)| listed == number);
            !listed
                && !table.known.iter().any(|(known, _)| known == number)
                && !table.selection.excludes(name)
        };
        if let Some((_, name)) = columns.into_iter().find(unlisted) {
            return Ok(Some((table.name.clone(), name)));
        }
    }
    Ok(None)
}

/// Checks that nothing which must not go out as it is goes out under a new name: of a shape that the WAL
/// announced, before anything of it is published. `is_same` says that the catalog has just that shape: then no lock is
/// waited for.
///
/// # Errors
/// A column was renamed, or one came that the configuration names; or the connection failed.
pub async fn check_names(
    client: &Client,
    table: &SourceTable,
    announced: &[&str],
    is_same: bool,
) -> Result<(), Error> {
    let settings = &table.settings;
    let masked = settings.columns.mask.iter().map(|(name, _)| name);
    let withheld: Vec<&String> = settings.columns.exclude.iter().chain(masked).collect();
    if withheld.is_empty() {
        return Ok(());
    }
    let now = names_now(client, table, is_same).await?;
    names_allow(table, &withheld, announced, &now)
}

/// The table's columns in the catalog, by number. Unless it `is_settled`, with all that the WAL has told of it: a commit is in the WAL
/// before it is visible, and whoever changed the table's shape holds its lock until it is.
async fn names_now(
    client: &Client,
    table: &SourceTable,
    is_settled: bool,
) -> Result<Vec<(i16, String)>, Error> {
    let quoted = table.name.quoted();
    let lock = match is_settled {
        true => String::new(),
        false => format!("LOCK TABLE ONLY {quoted} IN ACCESS SHARE MODE; "),
    };
    // Sent together they are one transaction, beside what others send on this connection.
    let sql = format!(
        "SET LOCAL lock_timeout = {NAMES_LOCK_TIMEOUT_MS}; {lock}SELECT attnum, attname FROM pg_attribute WHERE attrelid = to_regclass({}) \
         AND attnum > 0 AND NOT attisdropped",
        quote_literal(&quoted)
    );
    let answer = match client.simple_query(&sql).await {
        Ok(answer) => answer,
        // It was dropped since.
        Err(error) if error.code() == Some(&SqlState::UNDEFINED_TABLE) => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    let rows = answer.iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some((row.get(0)?.parse().ok()?, row.get(1)?.to_owned())),
        _ => None,
    });
    Ok(rows.collect())
}

fn names_allow(
    table: &SourceTable,
    withheld: &[&String],
    announced: &[&str],
    now: &[(i16, String)],
) -> Result<(), Error> {
    for name in withheld {
        let Some((number, _)) = table.known.iter().find(|(_, known)| known == *name) else {
            if now.iter().any(|(_, now)| now == *name) {
                let reason = format!("table {} has changed since capture began", table.name);
                return Err(Error::retry_because(reason));
            }
            continue;
        };
        let Some((_, called)) = now.iter().find(|(now, _)| now == number) else {
            continue;
        };
        // A shape of before or after, under a name that the catalog does not know any more, may hold it too.
        let unknown = |column: &&&str| !now.iter().any(|(_, now)| now == **column);
        let bare = announced.iter().find(|column| {
            table.selection.leaves(column) && (**column == called || unknown(column))
        });
        if let (true, Some(bare)) = (called != *name, bare) {
            let condition = selection::renamed_column(&table.settings, name, bare);
            return Err(Error::halt(condition));
        }
    }
    Ok(())
}
