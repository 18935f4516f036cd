//! The parts of a request that are read in chunks: tables in the order of their key, and the rows of single keys.

use std::time::Duration;

use millrace_event::work::{Copied, CopyRequest, CopyStatus, Part, TableRequest, Wanted};
use millrace_event::{Lsn, Relation, TableName, subject};

use super::failure::Failure;
use super::reading::{Chunk, Looks, Reading, Rows, Tried};
use super::rule::Wait;
use super::throttle::Throttle;
use super::writer::{Writer, read_applied, store_status};
use super::{Asked, LOOK_INTERVAL, read, waits};
use crate::source::SourceTable;

/// The most keys of one statement.
const KEYS_MAX: usize = 500;

/// The first and the longest pause before a snapshot is tried again that was taken too early.
const PAUSE_FIRST: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// What holds a chunk up for longer is told.
const TELL_AFTER: Duration = Duration::from_secs(2);

/// One turn at a request's chunks.
struct Turn<'t, 'c> {
    tables: &'t [TableRequest],
    asked: &'t mut Asked<'c>,
    reading: &'t mut Reading<'c>,
    out: Writer<'c>,
    status: CopyStatus,
}

/// A table's progress in a turn.
struct Progress<'t> {
    table: &'t SourceTable,
    relation: Relation,
    looks: Looks,
}

impl<'c> Asked<'c> {
    /// Reads these tables, or keys of them, in chunks, one after another. Ends well also where some could not be
    /// read: those are noted, and due later.
    pub(super) async fn backfill(
        &mut self,
        status: CopyStatus,
        tables: &[TableRequest],
    ) -> Result<(), Failure> {
        let copier = self.copier;
        let Some(first) = tables.first() else {
            return Ok(());
        };
        let out = self.begin(&status, &first.table).await?;
        let kept = self.reading.take();
        let mut reading = kept.unwrap_or_else(|| Reading::new(copier));
        reading.answer(&status.request);
        let mut turn = Turn {
            tables,
            asked: self,
            reading: &mut reading,
            out,
            status,
        };
        let read = turn.run().await;
        self.read_at = copier.began.elapsed();
        // An error drops it, and the next turn begins with a barrier. Neither what a table met is a reason to, nor
        // another request.
        if matches!(read, Ok(()) | Err(Failure::Replaced)) {
            self.reading = Some(reading);
        }
        read
    }

    /// Begins an attempt on the copy stream.
    async fn begin(&self, status: &CopyStatus, first: &TableName) -> Result<Writer<'c>, Failure> {
        let (config, stream) = (self.copier.config, self.copier.stream);
        let source = &config.source.name;
        let replicas = usize::from(config.stream.replicas);
        crate::stream::ensure_copy_stream(&stream.jetstream, source, self.sink, replicas).await?;
        store_status(&stream.copies, self.sink, status).await?;
        let name = subject::copy_stream_name(source, self.sink);
        let mark = subject::copy(source, self.sink, first);
        Writer::begin(stream, self.sink, name, status, mark).await
    }
}

impl Turn<'_, '_> {
    async fn run(&mut self) -> Result<(), Failure> {
        let copier = self.asked.copier;
        let request = &self.status.request;
        let applied = read_applied(copier.stream, self.asked.sink, request).await?;
        if self.reading.begun() == Lsn::ZERO {
            let mark = self.reading.begin().await?;
            let commit_lsn = self.seen(mark).await?;
            self.reading.mark_seen(commit_lsn);
        }
        self.asked.setbacks.attempt_goes_on();
        for wanted in self.tables {
            let table = copier
                .table(&wanted.table)
                .expect("only configured tables are copied");
            let mut progress = Progress {
                table,
                relation: Relation::new(
                    &copier.config.source.name,
                    &copier.source.facts.database,
                    table.name.clone(),
                    &table.shapes(),
                    table.key_indexes(),
                ),
                looks: Looks::default(),
            };
            let read = match &wanted.rows {
                Wanted::Load => Ok(()),
                Wanted::Keys { keys } => self.keys(&mut progress, keys).await,
                Wanted::Chunks {
                    after,
                    filter,
                    rows_per_second,
                    ..
                } => {
                    let found = applied.iter().flat_map(|applied| &applied.after);
                    let mut found = found.filter(|(name, _)| *name == table.name);
                    // Never behind what is only on the stream: the broker may lose it.
                    let after = found.next().map(|(_, key)| key).or(after.as_ref());
                    let throttle = Throttle::new(*rows_per_second);
                    let filter = filter.as_deref();
                    self.chunks(&mut progress, after.cloned(), filter, throttle)
                        .await
                }
            };
            match read {
                Ok(()) => {}
                Err(Failure::Table { condition, .. }) => {
                    self.reading.end_session();
                    self.asked.table_failed(&table.name, condition);
                    self.tell().await?;
                }
                Err(failure) => return Err(failure),
            }
        }
        Ok(())
    }

    async fn chunks(
        &mut self,
        progress: &mut Progress<'_>,
        mut after: Option<Vec<String>>,
        filter: Option<&str>,
        mut throttle: Throttle,
    ) -> Result<(), Failure> {
        let name = &progress.table.name;
        tracing::info!(sink = self.asked.sink, table = %name, begun = %self.reading.begun(), "backfilling");
        let mut rows = 0;
        loop {
            self.sleep_until(throttle.due()).await?;
            let limit = throttle.rows();
            let wanted = Rows::Behind {
                after: after.as_deref(),
                filter,
                limit,
            };
            let Some(chunk) = self.chunk(progress, wanted).await? else {
                unreachable!("only keys can be too many");
            };
            let (last, count, taken) = (chunk.is_last, chunk.rows, chunk.taken);
            let part = Part::Chunk {
                after: chunk.last_key.clone(),
                last,
            };
            after = chunk.last_key.clone().or(after);
            let reach = self.publish(progress.table, chunk).await?;
            self.whole(progress.table, count, part, Some(reach)).await?;
            throttle.read(taken, self.asked.copier.began.elapsed());
            rows += count;
            if last {
                break;
            }
        }
        self.copied(progress.table, rows).await
    }

    async fn keys(
        &mut self,
        progress: &mut Progress<'_>,
        keys: &[Vec<String>],
    ) -> Result<(), Failure> {
        let (mut rest, mut most, mut rows, mut reach) = (keys, KEYS_MAX, 0, None);
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(most));
            let Some(chunk) = self.chunk(progress, Rows::Of(now)).await? else {
                most = (now.len() / 2).max(1);
                continue;
            };
            rest = later;
            rows += chunk.rows;
            // That of the last statement is above those before.
            reach = Some(self.publish(progress.table, chunk).await?);
        }
        self.whole(progress.table, rows, Part::Keys, reach).await?;
        self.copied(progress.table, rows).await
    }

    /// Reads a chunk, as soon as it may be read. `None` where it is too large to be held.
    async fn chunk(
        &mut self,
        progress: &mut Progress<'_>,
        rows: Rows<'_>,
    ) -> Result<Option<Chunk>, Failure> {
        let name = &progress.table.name;
        let (mut pause, mut waited) = (PAUSE_FIRST, Duration::ZERO);
        loop {
            self.still_wanted().await?;
            let read = self.reading.read(
                progress.table,
                &progress.relation,
                &mut progress.looks,
                rows,
            );
            match read.await? {
                Tried::Read(chunk) => {
                    self.goes_on(name).await?;
                    return Ok(Some(chunk));
                }
                Tried::TooLarge => return Ok(None),
                Tried::Rewritten => {
                    tracing::info!(table = %name, "the table was rewritten; its chunk is read again");
                }
                Tried::Wait(Wait::Barrier) => self.take_barrier().await?,
                Tried::Wait(wait) => {
                    if waited >= TELL_AFTER {
                        self.waits(name, wait).await?;
                    }
                    tokio::time::sleep(pause).await;
                    waited += pause;
                    pause = (pause * 2).min(PAUSE_MAX);
                }
            }
        }
    }

    async fn take_barrier(&mut self) -> Result<(), Failure> {
        let mark = self.reading.take_barrier().await?;
        let commit_lsn = self.seen(mark).await?;
        self.reading.mark_seen(commit_lsn);
        Ok(())
    }

    /// Waits until the reader of the WAL has seen a mark; returns its commit LSN.
    async fn seen(&self, mark: u64) -> Result<Lsn, Failure> {
        loop {
            let seen = self.reading.recording().seen(mark);
            match tokio::time::timeout(LOOK_INTERVAL, seen).await {
                Ok(commit_lsn) => return Ok(commit_lsn),
                Err(_) => self.still_wanted().await?,
            }
        }
    }

    /// Publishes a chunk's rows, once the stream tells of everything that its snapshot shows: what a crash of the
    /// source takes back was not in it, and a sink that waits for the mark's LSN, which is returned, has all of that.
    /// That there are no rows is told by a snapshot too.
    async fn publish(&mut self, table: &SourceTable, chunk: Chunk) -> Result<Lsn, Failure> {
        let (mark, _) = self.reading.mark().await?;
        let reach = self.seen(mark).await?;
        tracing::debug!(
            table = %table.name, version = %chunk.version, %reach, rows = chunk.rows, "chunk"
        );
        let source = &self.asked.copier.config.source.name;
        let subject = subject::copy(source, self.asked.sink, &table.name);
        for message in chunk.messages {
            self.out
                .publish_behind(subject.clone(), message, Some(reach))
                .await?;
        }
        Ok(reach)
    }

    /// Says that what came is a whole. The sink removes what is not among it, so it waits for `reach` like the rows.
    async fn whole(
        &mut self,
        table: &SourceTable,
        rows: u64,
        part: Part,
        reach: Option<Lsn>,
    ) -> Result<(), Failure> {
        let copier = self.asked.copier;
        let copied = Copied {
            table: table.name.clone(),
            epoch: copier.source.epoch,
            lsn: self.reading.begun(),
            rows,
            part,
        };
        let payload = serde_json::to_vec(&copied).expect("plain JSON");
        let subject = subject::copied(&copier.config.source.name, self.asked.sink);
        self.out
            .publish_behind(subject, payload.into(), reach)
            .await
    }

    /// All that was wanted of a table is on the stream.
    async fn copied(&mut self, table: &SourceTable, rows: u64) -> Result<(), Failure> {
        self.status.last_seq = self.out.settle().await?;
        self.status.copied.push(table.name.clone());
        self.asked.setbacks.copied(&table.name);
        self.asked.show();
        self.status.troubles = self.troubles();
        self.store().await?;
        tracing::info!(sink = self.asked.sink, table = %table.name, rows, "table backfilled");
        Ok(())
    }

    /// Sleeps, and ends early where the request is replaced.
    async fn sleep_until(&self, due: Duration) -> Result<(), Failure> {
        loop {
            let rest = due.saturating_sub(self.asked.copier.began.elapsed());
            if rest.is_zero() {
                return Ok(());
            }
            tokio::time::sleep(rest.min(LOOK_INTERVAL)).await;
            self.still_wanted().await?;
        }
    }

    /// # Errors
    /// [`Failure::Replaced`]: the sink asks for something else by now.
    async fn still_wanted(&self) -> Result<(), Failure> {
        let copies = &self.asked.copier.stream.copies;
        let request: Option<CopyRequest> =
            read(copies, &format!("request.{}", self.asked.sink)).await?;
        match request.is_some_and(|request| request.id == self.status.request) {
            true => Ok(()),
            false => Err(Failure::Replaced),
        }
    }

    /// Tells what holds a table up.
    async fn waits(&mut self, table: &TableName, wait: Wait) -> Result<(), Failure> {
        let client = self.reading.client().await?;
        let condition = waits::condition(client, table, wait).await;
        let (code, remedy) = (condition.code, condition.remedy.clone());
        let told = self.asked.setbacks.troubles();
        let known = told
            .filter(|(of, _)| *of == Some(table))
            .any(|(_, known)| known.code == code);
        if !known {
            tracing::warn!(
                sink = self.asked.sink, %table, code = code.as_str(), remedy, "{}", condition.message
            );
        }
        let now = self.asked.copier.began.elapsed();
        self.asked.setbacks.table_waits(table, condition, now);
        self.tell().await
    }

    /// What held a table up is history.
    async fn goes_on(&mut self, table: &TableName) -> Result<(), Failure> {
        self.asked.setbacks.table_goes_on(table);
        self.tell().await
    }

    /// Lets the statuses tell what fails, where that has changed.
    async fn tell(&mut self) -> Result<(), Failure> {
        let troubles = self.troubles();
        if troubles != self.status.troubles {
            self.asked.show();
            self.status.troubles = troubles;
            self.store().await?;
        }
        Ok(())
    }

    fn troubles(&self) -> Vec<(TableName, String)> {
        let left = self.tables.iter().map(|wanted| &wanted.table);
        let left = left.filter(|table| !self.status.copied.contains(table));
        self.asked.troubles(&left.cloned().collect::<Vec<_>>())
    }

    async fn store(&self) -> Result<(), Failure> {
        let copies = &self.asked.copier.stream.copies;
        Ok(store_status(copies, self.asked.sink, &self.status).await?)
    }
}
