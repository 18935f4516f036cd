//! The partitions of a table, as the catalog has them.

/// A subquery with the relation of this OID and its partitions of every level: `relid`, `isleaf`, `attached`. Those are
/// its OID, whether it may hold rows, and the `xmin` of what attached it; NULL of the relation itself.
///
/// Unlike `pg_partition_tree` it locks no partition, and so waits for nobody who rewrites one.
pub(crate) fn partition_tree(root: &str) -> String {
    format!(
        "(WITH RECURSIVE tree AS (SELECT oid AS relid, relkind, NULL::xid AS attached FROM pg_class WHERE oid = {root} \
         UNION ALL SELECT c.oid, c.relkind, i.xmin FROM tree t JOIN pg_inherits i ON i.inhparent = t.relid \
         AND NOT i.inhdetachpending JOIN pg_class c ON c.oid = i.inhrelid WHERE t.relkind = 'p') \
         SELECT relid, relkind <> 'p' AS isleaf, attached FROM tree)"
    )
}
