//! What a backfill waits for at the source, for those who can do something about it.

use millrace_config::{Code, Condition};
use millrace_event::TableName;
use tokio_postgres::Client;

use super::rule::Wait;

/// How many transactions are named.
const NAMED: i64 = 3;

/// Transactions with an id, and prepared ones, the oldest first. What they wait for is shown only to those who may
/// see it.
const OPEN: &str = "SELECT 'process ' || pid || ' (' || coalesce(nullif(application_name, ''), 'unnamed') || ', ' \
    || coalesce('open for ' || extract(epoch FROM now() - xact_start)::bigint || ' s', 'age not shown') \
    || coalesce(', waits for ' || wait_event, '') || ')' FROM pg_stat_activity \
    WHERE backend_xid IS NOT NULL AND pid <> pg_backend_pid() ORDER BY age(backend_xid) DESC LIMIT $1";

const PREPARED: &str = "SELECT 'prepared transaction ' || quote_literal(gid) || ' (' \
    || extract(epoch FROM now() - prepared)::bigint || ' s old)' FROM pg_prepared_xacts \
    ORDER BY prepared LIMIT $1";

/// What holds a table's next chunk up, and what can be done about it.
pub(super) async fn condition(client: &Client, table: &TableName, wait: Wait) -> Condition {
    let mut open = Vec::new();
    for sql in [OPEN, PREPARED] {
        let rows = client.query(sql, &[&NAMED]).await.unwrap_or_default();
        open.extend(rows.iter().map(|row| row.get::<_, String>(0)));
    }
    let open = match open.is_empty() {
        true => "unknown".to_owned(),
        false => open.join(", "),
    };
    match wait {
        Wait::Barrier | Wait::Older => Condition::new(
            Code::BackfillBlocked,
            format!(
                "the backfill of table {table} waits for the transactions that were open when it began; open: {open}"
            ),
            "end the transactions that are open for long; the backfill then goes on by itself",
        ),
        Wait::Limbo => Condition::new(
            Code::BackfillLimbo,
            format!(
                "the backfill of table {table} waits for a commit that is not visible yet; open: {open}"
            ),
            "let the synchronous standby answer again, or change synchronous_standby_names; \
             the backfill then goes on by itself",
        ),
    }
}
