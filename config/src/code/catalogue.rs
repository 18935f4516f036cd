//! The table of codes. A code is never given a second meaning; one that is no longer used stays reserved.

/// Declares [`Code`] from rows of `Name = "number", "title", "explanation"`.
macro_rules! codes {
    ($($name:ident = $text:literal, $title:literal, $explanation:literal;)+) => {
        /// A condition that an operator may meet. `E10xx`: settings and process; `E11xx`: the source;
        /// `E12xx`: the stream; `E13xx`: the sinks.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Code {
            $(#[doc = concat!($text, ": ", $title, ".")] $name,)+
        }

        impl Code {
            /// Every code, by number.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// The code as it is printed: `E1104`.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)+
                }
            }

            /// The condition in a few words.
            #[must_use]
            pub const fn title(self) -> &'static str {
                match self {
                    $(Self::$name => $title,)+
                }
            }

            /// What the condition means and what to do about it, in a few sentences.
            #[must_use]
            pub const fn explain(self) -> &'static str {
                match self {
                    $(Self::$name => $explanation,)+
                }
            }
        }
    };
}

codes! {
    ConfigInvalid = "E1001", "the configuration is invalid",
        "A file of the configuration directory is missing, is not TOML, or holds a key or value that is not \
        known. Every mistake is listed with its file, line and column. Correct them and run `millrace \
        validate`, which checks the files without connecting to anything.";
    SecretUnreadable = "E1002", "a secret cannot be read",
        "A setting refers to an environment variable or a file that does not exist, is empty, or may not be \
        read by this user. Secrets are read again at each connect, so no restart is needed once it is there. \
        The paths of secret files are relative to the configuration directory.";
    AdminPortInUse = "E1003", "the admin address is in use",
        "Another process listens on `admin.listen`, often a second Millrace. This one warns and goes on \
        without its endpoint, because one that only stands by must not fail for it. What asks at this address, \
        `millrace status` and `millrace reload` included, meets the other process. To have this one's endpoint \
        choose another port, or port 0 for any free one, and start it again.";

    SourceUnreachable = "E1101", "the source cannot be reached",
        "No connection to the source database could be made, or it broke. Millrace tries again for ever with \
        growing pauses; the slot keeps every change meanwhile. Check the address, the network and whether the \
        server runs. The reason of the last attempt is shown beside this code.";
    SlotMissing = "E1102", "the replication slot is missing",
        "The stream exists but the slot that fed it does not, so the changes since the last one in the stream \
        may be gone. Millrace never makes a new slot over a gap by itself. If the replicas may be built anew, \
        remove the rest with `millrace drop` and start again, which copies every table.";
    SlotAhead = "E1103", "the replication slot is ahead of the stream",
        "The slot was told to forget changes that the stream does not hold: the slot was dropped and made \
        again or advanced by hand, or the broker lost more than the confirm policy covers. The changes between \
        the two positions cannot be read any more. Rebuild the replicas: `millrace drop`, then start again.";
    SlotLost = "E1104", "the replication slot was invalidated",
        "The source removed WAL that the slot still needed, usually because the slot lagged by more than \
        `max_slot_wal_keep_size`. The changes in that WAL are lost to every logical consumer. Rebuild the \
        replicas: `millrace drop`, then start again. Raise `max_slot_wal_keep_size`, and alert on the slot's \
        lag before it reaches the limit.";
    PublicationMissing = "E1105", "the publication is missing",
        "The publication that selects the tables does not exist. With `source.create = \"auto\"` it is created \
        at the first start only. A publication that was dropped while the slot was in use is not mended by \
        creating it again: decoding looks it up as it was at each change's time, and fails there. In that case \
        rebuild with `millrace drop` and start again.";
    PublicationDrift = "E1106", "the publication no longer matches the configuration",
        "A configured table left the publication, or its column list, row filter or operations were changed \
        outside Millrace. Changes made meanwhile were never decoded, without any error. The table is parked, \
        because its replica may lack rows, and the others go on. Run the statement beside this code: the table is \
        then read again by itself. One that is locked while it is to be put in needs nothing but the lock's end. \
        Where the operations or the publication itself were changed, capture halts: run `millrace drop`, then \
        `millrace run`, which copies the tables again.";
    NoReplicaIdentity = "E1107", "a table has no replica identity",
        "Postgres does not log the key of the table's old rows: it has no primary key (a DEFERRABLE one does \
        not count), or its replica identity is another index or NOTHING; since Postgres 18 it may have no \
        generated column either, and FULL has them all. Of a partitioned table every partition counts: each has a \
        replica identity of its own. Publishing the table would make the application's own \
        UPDATE and DELETE statements fail, so Millrace does not touch the publication. Run the statement \
        beside this code; or add a primary key, set `REPLICA IDENTITY USING INDEX` to a unique index over columns \
        that are not null, or remove the table's file. A table that was captured before is parked, and the others \
        go on. Where Postgres refuses its UPDATEs and DELETEs it is taken out of the publication within seconds; \
        with `source.create = \"never\"` run the statement for that first. Once the identity is back the table is \
        published and read again by itself.";
    SourceChanged = "E1108", "the source is another server or timeline",
        "The source's system identifier or timeline differs from the one the stream was fed from: a standby \
        was promoted, or the address leads to another server. Commits may have been dropped in between, and \
        positions of the new history can be lower than those already applied. Verify what the new server \
        holds. Then rebuild the replicas: `millrace drop`, and start again.";
    SourceWentBack = "E1109", "the source went back in time",
        "The source's WAL ends before a position that the stream already holds: it was restored from a backup \
        or is a copy. New changes would look older than those already applied and be rejected. Point \
        `source.url` at the right server, or rebuild the replicas: `millrace drop`, and start again.";
    WalLevel = "E1110", "wal_level is not logical",
        "Logical decoding needs `wal_level = logical`. Run `ALTER SYSTEM SET wal_level = logical` as a \
        superuser and restart the server. Managed services have a parameter of their own for it.";
    NoFreeSlot = "E1111", "no replication slot is free",
        "All `max_replication_slots` slots, or all `max_wal_senders` connections, are in use. Look at \
        `pg_replication_slots` for slots that nobody reads and drop those. Or raise the limit and restart the \
        server.";
    SourceAuth = "E1112", "the source refused the login",
        "The user or the password is wrong, or `pg_hba.conf` has no line that admits this user, database, \
        address and kind of encryption; replication needs `LOGIN` and `REPLICATION`. At start this ends the \
        process. Later it is tried again with the secret read anew, so a rotated password is picked up.";
    SlotActive = "E1113", "another process reads the replication slot",
        "One process can read a slot at a time. This one stands by and takes over when the other one ends; \
        nothing needs to be done. If no other Millrace should be running, the process id at the source is in \
        `pg_replication_slots.active_pid`.";
    TableMissing = "E1114", "a configured table does not exist",
        "The source has no table of the name that a file under `tables/` has. File names are \
        `<schema>.<table>.toml`, spelt as in the catalog: unquoted SQL names are lower case there. Views and \
        foreign tables have no changes of their own and cannot be captured. Correct or remove the file. A table that \
        was captured before is parked and the others go on; once it is there again it is read by itself.";
    NoKey = "E1115", "a table has no key",
        "The table has no primary key and its file names no `key`, so its rows cannot be told apart in a \
        target. Add a primary key. Or set `key` to the columns of a unique index without nulls that is also \
        the table's replica identity. A DEFERRABLE constraint does not count: two rows may share its columns \
        until the transaction's end, so their changes cannot be told apart. Generated columns are not \
        published and cannot be part of a key; nor can a column whose NOT NULL is not yet validated. A table that \
        was captured before and has lost its key is parked as under E1107, and the others go on.";
    SourcePrivilege = "E1116", "the source user lacks a privilege",
        "The user of `source.url` may not do what is needed: reading a table, creating the publication, or \
        using replication. `millrace init-sql` prints the least-privilege roles and grants. The missing \
        privilege is named beside this code.";
    EpochLower = "E1117", "the source's epoch is lower than one already known",
        "A sink or the stream has already seen a later epoch of this source than the one this start would \
        use: state was restored from an old copy, or two installations share a name. Going on would write \
        rows that every guard rejects. Restore the newer state, or rebuild: `millrace drop`, and start again.";
    SourceEncoding = "E1118", "the source's encoding is not UTF-8",
        "Millrace carries text as UTF-8. A database in another encoding, SQL_ASCII above all, can hold bytes \
        that have no UTF-8 form. Move the data to a database that was created with `ENCODING 'UTF8'`.";
    SlotBlocked = "E1119", "the replication slot cannot be created yet",
        "A new slot waits until every transaction that was open before has ended. Long transactions, \
        sessions that are idle in a transaction and prepared transactions hold it up. Find them in \
        `pg_stat_activity` by `xact_start` and in `pg_prepared_xacts`, and end them. Millrace keeps trying.";
    SourceVersion = "E1120", "the source's version is not supported",
        "Postgres 14 to 18 are supported. Older servers lack what the heartbeat and the replication protocol \
        need; a newer major has not been tested. Upgrade the source, or use a release of Millrace that knows \
        its version.";
    CopyFailed = "E1121", "the existing rows of a table cannot be copied for now",
        "Reading a table's existing rows at the source, or putting them on a sink's copy stream, failed. \
        Changes flow on, and other tables and other sinks are copied; the sink that waits for this table \
        applies nothing meanwhile. The copy is tried again by itself, at most a minute later. What failed is \
        named beside this code.";
    BackfillBlocked = "E1122", "a backfill waits for older transactions",
        "Before the first chunk is read, every transaction that was open when the backfill began must have ended: \
        one that commits unseen could be lost to the replica. Long transactions, sessions that are idle in a \
        transaction and prepared transactions hold it up; those found are named beside this code. End them. The \
        backfill goes on by itself, and changes flow on meanwhile.";
    BackfillLimbo = "E1123", "a backfill waits for a commit to become visible",
        "A transaction has committed and is not visible yet, usually because it waits for a synchronous standby \
        that does not answer. A chunk read now would show the rows before it, so it is read again until the \
        commit is visible. Repair the standby, or change `synchronous_standby_names`.";
    BackfillFilter = "E1124", "a backfill's condition fails",
        "The source answered with an error to the SQL condition that the backfill was started with: it names a \
        column that is not there, or compares what cannot be compared. Other tables and all changes flow on. \
        Cancel the backfill, and start it with a condition that is right.";
    HeartbeatRefused = "E1125", "the source takes no heartbeat",
        "A backfill writes small messages into the source's WAL with `pg_logical_emit_message`, to know which \
        rows the stream has passed. The source refuses: it is a standby, is read-only, or the user may not call \
        the function. Point `source.url` at the primary and grant what is named beside this code. Existing rows \
        are copied without it only when a replica is made for the first time.";
    ColumnSelection = "E1130", "a column selection does not fit its table",
        "A file under `tables/` excludes, renames or masks a column that the table does not have, or in a way that \
        its type or its part in the key does not allow. Nothing is captured before this is put right: a misspelt \
        name would let the values through. The same is said where the application renamed a column that was \
        excluded or masked. Correct the file as the text beside this code says.";
    SelectionIdentity = "E1131", "a selection does not fit a table's replica identity",
        "Postgres refuses the application's own UPDATE and DELETE statements on a published table unless every \
        column of its row filter is in the replica identity, and the replica identity is in its column list; \
        under REPLICA IDENTITY FULL it takes any filter and no column list. So Millrace does not touch the \
        publication. Run the statement beside this code, or change `where` or `columns.exclude` of the table. Where \
        it is the identity of a captured table that has changed, that table is parked as under E1107.";
    FilterInvalid = "E1132", "a row filter is not valid",
        "Postgres does not take the `where` of a table's file: it is no SQL condition on the table's columns, or \
        uses what a publication's row filter may not, such as functions and types that are not built in. The \
        publication was not changed. Correct the expression; the place and Postgres's own words are beside this \
        code.";
    FilterUnsupported = "E1133", "the source is too old for row filters",
        "The table's file has a `where`, and only Postgres 15 and later publish a part of a table's rows. \
        Upgrade the source, or remove `where`: then all rows are captured.";
    SelectionChanged = "E1134", "a table's selection was changed",
        "The columns, masks or row filter of a table differ from those that its rows were captured under. Changes \
        from now on follow the new selection, and a backfill of the table is ordered for each of its sinks, which \
        brings the rows and columns that came in and removes rows that went out. Nothing is to be done. A column \
        that is left out from now on keeps its old values in the targets; and the stream keeps what it holds as \
        long as it keeps anything.";
    BackfillCondition = "E1140", "the condition of a backfill is not valid",
        "What follows `--where` must be one SQL condition on the source's table, as it stands behind WHERE: \
        columns by the source's names, other tables, types and functions with their schema, no comment, no \
        semicolon, no aggregate. The source checked it and said what is beside this code; nothing was changed. \
        Quote it for the shell: --where \"status = 'open'\".";
    BackfillWal = "E1141", "a backfill may outgrow the WAL that the slot may keep",
        "The source removes WAL that the replication slot still needs once it is more than \
        `max_slot_wal_keep_size`, and the slot is then lost with every replica behind it. What is left of that \
        is less than the table that is read again, so a capture that falls behind meanwhile may reach it. \
        Raise `max_slot_wal_keep_size`, slow the backfill down with `--rate`, or watch the slot in `millrace \
        status`.";

    StreamUnreachable = "E1201", "NATS cannot be reached",
        "No server of `stream.servers` answered, or the connection broke. Millrace tries again for ever; the \
        slot keeps the changes meanwhile. Check addresses, network, TLS settings and whether the servers run. \
        The reason of the last attempt is shown beside this code.";
    StreamMissing = "E1202", "the stream is missing",
        "The slot or a sink's position exists, but the stream does not: it was deleted, or \
        `stream.servers` leads to another NATS. Changes that were confirmed to the slot and not yet applied \
        are gone with it. If the address is right, rebuild the replicas: `millrace drop`, and start again.";
    NatsTooOld = "E1203", "the NATS server is too old",
        "Fenced publishing needs JetStream API level 4, which NATS 2.14 brought. Upgrade every server of the \
        cluster; in a mixed one the stream's leader decides. The version found is shown beside this code.";
    JetStreamOff = "E1204", "JetStream is not available",
        "The server or the account has no JetStream, or it was switched off because the disk was full. Start \
        `nats-server` with `-js` or a `jetstream {}` block, and enable it for the account. After a full disk \
        free space and restart that server.";
    StreamShape = "E1205", "the stream exists with another shape",
        "A stream of our name has subjects or settings that Millrace would not give it, so it may belong to \
        somebody else. The difference is shown beside this code. Change the stream, remove it if it holds \
        nothing of value, or choose another `source.name`.";
    StreamTailLost = "E1206", "the stream lost its end beyond repair",
        "The broker lost messages that it had acknowledged, and the slot has already let go of them. JetStream \
        acknowledges before it writes to disk, so a power failure can do this. `confirm = \"synced\"` with the \
        broker's true `sync_interval` makes such a loss repairable. Now rebuild the replicas: `millrace drop`, \
        and start again.";
    StreamAuth = "E1207", "NATS refused the login or an operation",
        "The credentials are wrong, expired, or lack a permission. `millrace init-sql` prints the permissions \
        that capture and sinks need. Secrets are read again at each connect, so a rotated one is picked up.";
    StreamFull = "E1208", "the stream is nearly full",
        "The stream holds 90 % of `retention.max_bytes`, so capture has stopped reading and the slot holds \
        the backlog on the source's disk. Nothing is lost. What every required sink has applied goes, whatever \
        its age; if the code stays, one is behind or stopped: look at `millrace status`. Raise `max_bytes`, repair the sink, or set `required = false` for it.";
    RowTooLarge = "E1209", "a row is larger than the limit",
        "One change is larger than Millrace carries. Rows above the server's `max_payload` travel in parts, \
        but the whole must fit in memory on both sides. Make the value smaller in the source; the row's table \
        and key are shown beside this code.";
    StreamStorage = "E1210", "NATS has not enough storage for the stream",
        "The server or account may not store as much as `retention.max_bytes` asks for. Raise `max_file_store` \
        or the account's limit, or lower `max_bytes`. With replicas each server needs the room. Millrace tries again \
        by itself.";
    StoredUnreadable = "E1211", "what is stored beside the stream is not understood",
        "A value in one of the buckets `MILLRACE_<source>_*` is not what Millrace writes there: somebody else wrote \
        it, or another release. What it said is not known, so it is neither taken for empty nor overwritten: orders \
        of backfills would be lost. The bucket and the key are shown beside this code. Let the release read it that \
        wrote it, or remove it and do what is shown beside this code.";

    SinkUnreachable = "E1301", "the target cannot be reached",
        "No connection to the sink's database could be made, or it broke. Millrace tries again for ever, and \
        the stream keeps the changes for a required sink. Check the address, the network and whether the \
        server runs. The reason of the last attempt is shown beside this code.";
    TargetColumnMissing = "E1302", "the target table lacks a column",
        "The source has a column that the target table does not, and Millrace may not add it. The table is \
        parked; the others flow on, and its changes wait in the stream. Run the ALTER TABLE statement beside \
        this code. The table continues by itself.";
    TargetAuth = "E1303", "the target refused the login",
        "The user or the password is wrong, or the target does not admit this user, database and address. At \
        start this ends the process. Later it is tried again with the secret read anew, so a rotated password \
        is picked up.";
    TargetTableMissing = "E1304", "the target table does not exist",
        "`create = \"never\"` forbids Millrace to create target tables, and this one is missing. Run the CREATE \
        TABLE statement beside this code, or set `create = \"auto\"`.";
    TargetType = "E1305", "a target column has another type",
        "A column of the target table cannot take the source column's values exactly. Change its type with \
        the statement beside this code. The table is parked until then; the others flow on.";
    TargetOccupied = "E1306", "the target table already holds rows",
        "The target table holds rows that Millrace did not write, and copying into it would mix the two. Empty \
        the table, choose another `target`, or set `adopt = true` in the table's file: rows of the same key \
        are then overwritten. Rows that another sink gave a newer version than the stream's would not be: reset \
        their version with the statement beside this code.";
    TargetKey = "E1307", "the target table has no matching key",
        "The upsert needs a primary key or a unique constraint over exactly the key columns. Add it with the \
        statement beside this code. Without it two versions of a row could stand side by side.";
    TargetPrivilege = "E1308", "the target user lacks a privilege",
        "The user of the sink may not write a table, or not create what `create = \"auto\"` asks for. `millrace \
        init-sql` prints the least-privilege roles and grants. The missing privilege is named beside this code.";
    // E1309 and E1310 are reserved: a sink that another worker holds stands by, and one that is ahead of the stream
    // waits for capture; neither is an operator's concern.
    RowRefused = "E1311", "the target refuses a row",
        "A constraint or a type of the target does not admit one row. The row was set aside with its reason in \
        `millrace.dead_letter` of the target; all others flow on. Mend the constraint or the row: a later \
        complete version of the same row takes its place.";
    StreamGap = "E1312", "the stream no longer holds what the sink needs",
        "The sink's next change was removed from the stream before it was applied: the sink was away for \
        longer than the stream keeps changes and is not `required`, or somebody purged the stream. Its \
        replicas must be copied anew: drop the sink's tables and its `millrace` schema in the target, then \
        start again.";
    TargetWentBack = "E1313", "the target went back in time",
        "The position in the target is lower than one this process has already committed there: the target \
        was restored from a backup or failed over. Millrace continues from the older position where the \
        stream still holds what follows. Otherwise the replicas must be copied anew.";
    ParkedTooLong = "E1314", "a parked table waited for longer than the stream keeps changes",
        "The target still refuses a table, and the stream reached `retention.max_age` or 90 % of \
        `retention.max_bytes` and let the table's oldest changes go. The others flow on. Nothing is lost at the \
        source: once the target takes the table, it is copied again by itself. Correct what the condition of \
        the parked table names.";
    SchemaChanged = "E1315", "a table was changed at the source",
        "The columns of a table were changed at the source, and `on_schema_change` of its file is `\"park\"`: the \
        table waits for its operator, and the others flow on. Run the statements beside this code in the target: \
        the table then goes on by itself, from where it stopped. Or set `on_schema_change = \"evolve\"`, which runs \
        what is safe by itself, or `\"ignore\"`, which leaves new columns out.";
    KeyChanged = "E1316", "the key of a table was changed",
        "The table has another primary key at the source than before. Changes of the old key and of the new one \
        cannot be applied to the same target, so the table is parked, and the others flow on. Run the statement \
        beside this code in the target. The table is then copied again by itself, beside its changes; what was \
        remembered of keys of the old kind is forgotten.";
    TargetLost = "E1317", "the target lost what it had of a table",
        "A table, or a column of it, that Millrace had filled is gone from the target, and its values with it: \
        dropped there, or given another name in the table's file. Only the source has them, so all rows of the \
        table are read again, beside its changes. Where Millrace may alter the target, it first makes what is \
        missing by itself; else run the statement beside this code. The others flow on meanwhile.";
    KeyTooLong = "E1318", "the key of an incomplete row is too long to be asked for",
        "A change did not bring all columns of a row that the replica does not have, and the row cannot be read \
        again by its key: all keys of a request have a third of the broker's `max_payload`, and never more than \
        384 KiB. The change stays in `millrace.dead_letter` of the target; everything else flows on. Write the \
        row's large columns anew at the source, as the statement beside this code does (for text; for another type, as \
        jsonb: `col::text::jsonb`; any way that writes the value anew): a complete version of the row takes its place. Where the broker's `max_payload` is below 1152 KiB, a larger one helps too.";

    BackfillTwice = "E1320", "a backfill of the table is under way already",
        "One backfill of a table runs at a time for a sink, and nothing was changed. `millrace backfill status` \
        shows how far it is. Wait for its end, or cancel it with `millrace backfill cancel` and start the other \
        one. To change its pace use `millrace backfill resume --rate`.";
    BackfillNotReady = "E1321", "the table is not ready for a backfill",
        "A backfill reads rows again that the replica has had. This replica is still being made, is parked, or \
        its sink has never run, and nothing was changed. A replica that is being made becomes whole by itself; \
        a parked table is copied or caught up by itself once its target takes it.";
    BackfillNone = "E1322", "there is no such backfill",
        "The table has no backfill that could be paused, resumed or cancelled: it was never started for this \
        sink, or has come to its end. Nothing was changed. `millrace backfill status` lists those there are.";
    BackfillOwed = "E1323", "a copy that a replica needs cannot be stopped",
        "The table's rows come because the replica lacks them, not because somebody started a backfill. The \
        first load reads one snapshot and can neither be paused nor cancelled: it would have to begin anew. A \
        copy in chunks can be paused and slowed down, and not cancelled: the replica would stay wrong. To give \
        up the replica remove the sink from the table's file.";
    BackfillContended = "E1324", "the list of backfills keeps changing",
        "Several commands, or a command and the sink, changed the sink's list of backfills at the same moment, \
        more often than this one tries. Nothing was changed by it. Run it again.";
}
