use super::*;
use crate::row::LayoutColumn;

fn layout() -> TableLayout {
    let column = |name: &str, cast: &str| LayoutColumn {
        source: name.to_owned(),
        target: name.to_owned(),
        cast: cast.to_owned(),
    };
    TableLayout {
        source: TableName::new("public", "orders"),
        target: TableName::new("shop", "or'ders"),
        columns: vec![
            column("id", "bigint"),
            column("n\"", "bpchar"),
            column("big", "text"),
        ],
        key: vec![0],
        shape: String::new(),
    }
}

#[test]
fn upsert_is_guarded_and_casts_without_modifiers() {
    assert_eq!(
        upsert(&layout(), &[Form::Text; 3]),
        "INSERT INTO \"shop\".\"or'ders\" AS t (\"id\", \"n\"\"\", \"big\", \"_millrace_version\") \
         OVERRIDING SYSTEM VALUE SELECT s.c0::bigint, s.c1::bpchar, s.c2::text, s.v \
         FROM (SELECT unnest($1::text[]) AS c0, unnest($2::text[]) AS c1, unnest($3::text[]) AS c2, \
         unnest($4::uuid[]) AS v, unnest($5::text[]) AS k) AS s WHERE NOT EXISTS (SELECT 1 FROM millrace.tombstone x \
         WHERE x.relation = 'shop.or''ders' AND x.key = s.k AND x.version >= s.v) \
         ON CONFLICT (\"id\") DO UPDATE SET \"n\"\"\" = excluded.\"n\"\"\", \"big\" = excluded.\"big\", \
         \"_millrace_version\" = excluded.\"_millrace_version\" \
         WHERE t.\"_millrace_version\" < excluded.\"_millrace_version\""
    );
}

#[test]
fn binary_values_are_not_cast() {
    let forms = [Form::Int8, Form::Text, Form::Text];
    let text = "INSERT INTO \"shop\".\"or'ders\" AS t (\"id\", \"n\"\"\", \"big\", \"_millrace_version\") \
         OVERRIDING SYSTEM VALUE SELECT s.c0, s.c1::bpchar, s.c2::text, s.v \
         FROM (SELECT unnest($1::bigint[]) AS c0, unnest($2::text[]) AS c1, \
         unnest($3::text[]) AS c2, unnest($4::uuid[]) AS v) AS s";
    assert_eq!(insert(&layout(), &forms), text);
    let guarded = upsert_newest(&layout(), &forms);
    let guard = guarded.strip_prefix(text).expect("is the same insert");
    assert!(
        guard.starts_with(" ON CONFLICT (\"id\") DO UPDATE SET "),
        "{guard}"
    );
    assert!(
        guard.ends_with(" WHERE t.\"_millrace_version\" < excluded.\"_millrace_version\""),
        "{guard}"
    );
}

#[test]
fn delete_partial_and_truncate_are_guarded() {
    assert_eq!(
        delete(&layout()),
        "DELETE FROM \"shop\".\"or'ders\" AS t USING (SELECT unnest($1::text[]) AS c0, \
         unnest($2::uuid[]) AS v) AS s WHERE t.\"id\" = s.c0::bigint \
         AND t.\"_millrace_version\" < s.v"
    );
    assert_eq!(
        partial(&layout(), &Present::from([0, 1])),
        "UPDATE \"shop\".\"or'ders\" AS t SET \"n\"\"\" = s.c1::bpchar, \"_millrace_version\" = s.v \
         FROM (SELECT unnest($1::text[]) AS c0, unnest($2::text[]) AS c1, unnest($3::uuid[]) AS v, \
         unnest($4::text[]) AS k) AS s \
         WHERE t.\"id\" = s.c0::bigint AND t.\"_millrace_version\" < s.v \
         AND t.\"_millrace_version\" >= $5::uuid \
         AND NOT EXISTS (SELECT 1 FROM millrace.dead_letter d WHERE d.relation = 'shop.or''ders' \
         AND d.key = s.k AND d.resolved_at IS NULL)"
    );
    assert_eq!(
        delete_below(&layout()),
        "DELETE FROM \"shop\".\"or'ders\" WHERE \"_millrace_version\" < $1::uuid"
    );
}

#[test]
fn a_move_copies_what_is_not_present_from_the_old_row() {
    assert_eq!(
        move_row(&layout(), &Present::from([0, 1])),
        "INSERT INTO \"shop\".\"or'ders\" AS t (\"id\", \"n\"\"\", \"big\", \"_millrace_version\") \
         OVERRIDING SYSTEM VALUE SELECT $1::text::bigint, $2::text::bpchar, o.\"big\", $4::uuid \
         FROM \"shop\".\"or'ders\" AS o WHERE o.\"id\" = $3::text::bigint \
         AND o.\"_millrace_version\" >= $7::uuid \
         AND o.\"_millrace_version\" < $4::uuid AND NOT EXISTS (SELECT 1 FROM millrace.tombstone x \
         WHERE x.relation = 'shop.or''ders' AND x.key = $5::text AND x.version >= $4::uuid) \
         AND NOT EXISTS (SELECT 1 FROM millrace.dead_letter d WHERE d.relation = 'shop.or''ders' \
         AND d.key = $6::text AND d.resolved_at IS NULL) \
         ON CONFLICT (\"id\") DO UPDATE SET \"n\"\"\" = excluded.\"n\"\"\", \"big\" = excluded.\"big\", \
         \"_millrace_version\" = excluded.\"_millrace_version\" \
         WHERE t.\"_millrace_version\" < excluded.\"_millrace_version\""
    );
}

#[test]
fn created_tables_have_the_version_and_the_key() {
    let columns = [
        ("id".to_owned(), "bigint".to_owned(), true),
        ("n".to_owned(), "numeric(12,2)".to_owned(), false),
    ];
    let target = TableName::new("shop", "orders");
    assert_eq!(
        create_table(&target, &columns, &["id".to_owned()]),
        "CREATE TABLE \"shop\".\"orders\" (\n    \"id\" bigint NOT NULL,\n    \"n\" numeric(12,2),\n    \
         \"_millrace_version\" uuid NOT NULL DEFAULT '00000000-0000-0000-0000-000000000000',\n    \
         PRIMARY KEY (\"id\")\n)"
    );
    assert_eq!(
        create_table(&target, &columns[..1], &[]),
        "CREATE TABLE \"shop\".\"orders\" (\n    \"id\" bigint NOT NULL,\n    \
         \"_millrace_version\" uuid NOT NULL DEFAULT '00000000-0000-0000-0000-000000000000'\n)"
    );
    assert_eq!(
        add_key(&target, &["id".to_owned(), "n".to_owned()]),
        "ALTER TABLE \"shop\".\"orders\" ADD PRIMARY KEY (\"id\", \"n\")"
    );
    assert_eq!(
        add_column(&target, "x", "numeric(12,2)"),
        "ALTER TABLE \"shop\".\"orders\" ADD COLUMN \"x\" numeric(12,2)"
    );
}
