//! Generated columns, which no publication of ours has: what may not depend on them.

use millrace_config::{Code, Condition};
use millrace_event::TableName;

use super::logged::Identity;

/// Postgres 18: from then on a generated column that a publication could have and has not, in the replica
/// identity, keeps the application from updating and deleting rows.
const MATTERS_TO_THE_APPLICATION_SINCE: i32 = 180_000;

/// Checks that neither the key nor, where Postgres minds, what is logged of old rows needs a generated column.
pub(super) fn check_generated(
    name: &TableName,
    version: i32,
    generated: &[String],
    key: &[String],
    identities: &[Identity],
) -> Result<(), Condition> {
    if let Some(column) = generated.iter().find(|column| key.contains(column)) {
        return Err(Condition::new(
            Code::NoKey,
            format!("table {name}: key column {column:?} is generated, and is not published"),
            format!(
                "set `key` in tables/{name}.toml to the columns of a unique index without generated ones, and make \
                 that index the table's replica identity"
            ),
        ));
    }
    if version < MATTERS_TO_THE_APPLICATION_SINCE {
        return Ok(());
    }
    let needs = |identity: &&Identity| {
        let contains = |column| identity.columns.contains(column);
        !generated.is_empty() && (identity.full || generated.iter().any(contains))
    };
    match identities.iter().find(needs) {
        None => Ok(()),
        Some(identity) => {
            let relation = &identity.relation;
            Err(Condition::new(
                Code::NoReplicaIdentity,
                format!(
                    "the replica identity of {relation} has generated columns ({}): since Postgres 18, publishing \
                     table {name} would break the application's own updates and deletes",
                    generated.join(", ")
                ),
                format!(
                    "ALTER TABLE {relation} REPLICA IDENTITY DEFAULT, or USING INDEX a unique index that has \
                     none of them"
                ),
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(version: i32, key: &str, full: bool, logged: &str) -> Option<Code> {
        let name = TableName::new("public", "t");
        let owned = |name: &str| vec![name.to_owned()];
        let identity = Identity {
            relation: "public.t".to_owned(),
            full,
            columns: owned(logged),
        };
        let result = check_generated(&name, version, &owned("g"), &owned(key), &[identity]);
        result.err().map(|condition| condition.code)
    }

    #[test]
    fn a_generated_key_is_never_one() {
        assert_eq!(checked(150_000, "g", false, "g"), Some(Code::NoKey));
        assert_eq!(checked(180_000, "g", true, ""), Some(Code::NoKey));
    }

    #[test]
    fn since_18_old_rows_must_be_logged_without_them() {
        for (full, logged, refused) in [(false, "id", false), (false, "g", true), (true, "", true)]
        {
            assert_eq!(checked(170_000, "id", full, logged), None);
            let expected = refused.then_some(Code::NoReplicaIdentity);
            assert_eq!(checked(180_000, "id", full, logged), expected);
        }
    }
}
