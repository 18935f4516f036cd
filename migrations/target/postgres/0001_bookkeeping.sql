-- What a sink knows about its target, beside the replicated tables.

-- One row for each worker: how far it has applied. Every transaction of a worker updates it first, comparing
-- what it holds with what the worker believes, so that two workers can never both commit.
CREATE TABLE millrace.position (
    sink       text        NOT NULL,
    partition  integer     NOT NULL,
    stream_seq bigint      NOT NULL DEFAULT 0,
    epoch      bigint      NOT NULL DEFAULT 0,
    position   uuid        NOT NULL DEFAULT '00000000-0000-0000-0000-000000000000',
    source_ts  timestamptz NOT NULL DEFAULT 'epoch',
    applied_at timestamptz NOT NULL DEFAULT now(),
    fence      bigint      NOT NULL DEFAULT 0,
    copy       jsonb       NOT NULL DEFAULT '{"stream": "", "tables": []}',
    PRIMARY KEY (sink, partition)
) WITH (fillfactor = 50, autovacuum_vacuum_threshold = 1000);

-- Deleted keys and the version of their delete: an older row that comes late must not bring them back.
CREATE TABLE millrace.tombstone (
    relation   text        NOT NULL,
    key        text        NOT NULL COLLATE "C",
    version    uuid        NOT NULL,
    deleted_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (relation, key)
);

-- For each table: rows at or below truncate_floor are gone; tombstones at or below cleanup_floor were dropped.
CREATE TABLE millrace.table_floor (
    relation       text PRIMARY KEY,
    truncate_floor uuid NOT NULL DEFAULT '00000000-0000-0000-0000-000000000000',
    cleanup_floor  uuid NOT NULL DEFAULT '00000000-0000-0000-0000-000000000000'
);

-- Rows that the target refused, whole: open until resolved_at is set.
CREATE TABLE millrace.dead_letter (
    id          bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    sink        text        NOT NULL,
    relation    text        NOT NULL,
    key         text        NOT NULL COLLATE "C",
    version     uuid        NOT NULL,
    op          text        NOT NULL,
    reason      text        NOT NULL,
    sqlstate    text,
    event       jsonb       NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now(),
    resolved_at timestamptz
);

CREATE INDEX dead_letter_open ON millrace.dead_letter (relation, key) WHERE resolved_at IS NULL;
