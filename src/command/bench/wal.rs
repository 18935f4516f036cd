//! When transactions were committed, as a server's WAL tells it.

use std::collections::HashMap;
use std::process::Stdio;

use millrace_lab::LabError;
use tokio::process::Command;
use tokio_postgres::Client;
use tokio_postgres::types::PgLsn;

use super::stage::{Stage, TABLE};

/// Where the server's WAL ends.
pub(super) async fn position(client: &Client) -> Result<PgLsn, LabError> {
    let row = client
        .query_one("SELECT pg_current_wal_insert_lsn()", &[])
        .await;
    let row = row.map_err(LabError::postgres("read the WAL's end"))?;
    Ok(row.get(0))
}

/// When the target committed each row whose id is in the range, in microseconds, by id. The transactions
/// lie behind `start`.
pub(super) async fn commits(
    stage: &Stage,
    target: &Client,
    start: &PgLsn,
    (first, last): (u64, u64),
) -> Result<Vec<(i64, i64)>, LabError> {
    // A subscription does not wait for its WAL to be written; this commit does, and what is before it is
    // written with it.
    let row = target
        .query_one("SELECT pg_logical_emit_message(true, 'bench', '')", &[])
        .await
        .map_err(LabError::postgres("write the WAL out"))?;
    let dump = dump(stage, start, &row.get(0)).await?;
    let (xids, times): (Vec<i64>, Vec<&str>) = dump.lines().filter_map(parse).unzip();
    let query = "SELECT xid, (extract(epoch FROM at::timestamptz) * 1000000)::bigint \
                 FROM unnest($1::bigint[], $2::text[]) AS t (xid, at)";
    let rows = target.query(query, &[&xids, &times]).await;
    let rows = rows.map_err(LabError::postgres("read the WAL's times"))?;
    let at: HashMap<i64, i64> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    let query = format!(
        "SELECT id, xmin::text::bigint FROM {TABLE} WHERE id BETWEEN {first} AND {last} ORDER BY id"
    );
    let rows = target.query(&query, &[]).await;
    let rows = rows.map_err(LabError::postgres("read the rows' transactions"))?;
    rows.iter()
        .map(|row| (row.get(0), row.get::<_, i64>(1)))
        .map(|(id, xid)| at.get(&xid).map(|at| (id, *at)))
        .collect::<Option<_>>()
        .ok_or_else(|| LabError::Unexpected("a row's commit is not in the WAL".to_owned()))
}

async fn dump(stage: &Stage, start: &PgLsn, end: &PgLsn) -> Result<String, LabError> {
    let output = Command::new(stage.target.bin("pg_waldump"))
        .arg("--path")
        .arg(stage.target.data_dir().join("pg_wal"))
        .args(["--start", &start.to_string(), "--end", &end.to_string()])
        .args(["--rmgr", "Transaction"])
        .env("TZ", "UTC")
        .stdin(Stdio::null())
        .output()
        .await
        .map_err(LabError::io("run pg_waldump"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(LabError::Process {
        what: "pg_waldump".to_owned(),
        output: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

/// A commit's transaction and time, in the form of `2026-01-01 00:00:00.000000 UTC`.
fn parse(line: &str) -> Option<(i64, &str)> {
    let (_, rest) = line.split_once("tx:")?;
    let (xid, rest) = rest.split_once(',')?;
    let (_, commit) = rest.split_once("desc: COMMIT ")?;
    Some((xid.trim().parse().ok()?, commit.split(';').next()?.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commits_are_read_with_their_own_time() {
        let head = "rmgr: Transaction len (rec/tot):     65/    65, tx:        745, lsn: 0/015D2F38, prev \
                    0/015D2EF0, desc: ";
        let own = "2026-02-03 04:05:06.789012 UTC";
        let line =
            format!("{head}COMMIT {own}; origin: node 1, lsn 0/1, at 2020-01-01 00:00:00 UTC");
        assert_eq!(parse(&line), Some((745, own)));
        assert_eq!(parse(&format!("{head}COMMIT {own}")), Some((745, own)));
        assert_eq!(parse(&format!("{head}ABORT {own}")), None);
    }
}
