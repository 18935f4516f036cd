//! Reads one table under an exported snapshot, by ranges of blocks on several connections, and puts its rows onto
//! the copy stream as the source's COPY writes them.
//!
//! The snapshot was taken before the table is locked. A rewrite of the table in between leaves none of its rows
//! where the snapshot looks for them, and a partition that was attached or detached has rows that the stream does
//! not tell of. Names in a statement are those of today, whatever its snapshot shows: where two columns have swapped
//! theirs, the masked one would go out as the other. So once the lock is held, what the catalog says now is compared
//! with what it said to the snapshot. (A chunk's snapshot is taken with the lock held: it shows today's names.)

mod packing;
mod rows;

use std::iter::Enumerate;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::future::{join, try_join, try_join_all};
use millrace_config::{Code, Condition, limits};
use millrace_connect::postgres::{Dsn, connect};
use millrace_event::{
    LoadColumn, LoadFormat, LoadHead, Lsn, Version, fingerprint, quote_literal, subject,
};
use tokio::sync::{Mutex, mpsc, watch};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::Asked;
use super::failure::Failure;
use super::keyset::Keyset;
use super::ranges::{Range, ranges};
use super::reading::check_columns;
use super::room::{Place, Room};
use super::session::session;
use super::writer::Writer;
use crate::Error;
use crate::source::SourceTable;
use packing::{Message, Packing};
use rows::{Rows, format_of, option, text_bytes};

/// Connections that read a table at the same time.
const READERS_MAX: usize = 2;

/// The second one begins once the sink was not waited for so long: usually one reads at least twice as fast as a target
/// takes rows, and more would only take processors from it.
const ALONE: Duration = Duration::from_secs(1);

/// How long a table's lock may be waited for, in milliseconds: the other tables wait behind it.
const LOCK_TIMEOUT_MS: u32 = 30_000;

/// Messages of one range that are read and not yet published: about a range of usual rows, so that its reader need not
/// wait for its turn. Of large rows there are fewer: see [`Room`].
const READ_AHEAD: usize = 16;

/// The tables that hold the rows of one, whether they have the files and names now that the snapshot shows, and their
/// blocks. What the functions answer is of now; of one that is gone they answer nothing.
const LEAVES: &str = "WITH RECURSIVE tree AS ( \
    SELECT c.oid, c.relkind FROM pg_class c WHERE c.oid = $1::text::regclass \
    UNION ALL SELECT c.oid, c.relkind FROM tree t JOIN pg_inherits i ON i.inhparent = t.oid \
    JOIN pg_class c ON c.oid = i.inhrelid WHERE t.relkind = 'p') \
    SELECT format('%I.%I', n.nspname, c.relname), c.relfilenode IS NOT DISTINCT FROM pg_relation_filenode(c.oid) AND NOT EXISTS ( \
    SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped \
    AND (pg_identify_object_as_address('pg_class'::regclass, c.oid, a.attnum)).object_names \
    IS DISTINCT FROM ARRAY[n.nspname, c.relname, a.attname]::text[]), \
    coalesce(pg_relation_size(c.oid), 0) / current_setting('block_size')::bigint \
    FROM tree JOIN pg_class c USING (oid) JOIN pg_namespace n ON n.oid = c.relnamespace \
    WHERE c.relkind <> 'p' ORDER BY c.oid";

/// How many there are now. The function knows no snapshot; of a table without partitions it knows nothing.
const LEAVES_NOW: &str = "SELECT count(*) FROM pg_partition_tree($1::text::regclass) WHERE isleaf";

/// What a load is read with.
pub(super) struct Reader<'r> {
    /// The source.
    pub(super) dsn: &'r Dsn,
    /// A transaction under the snapshot, which holds the table's lock.
    pub(super) client: &'r Client,
    /// The exported snapshot's name.
    pub(super) snapshot: &'r str,
    /// Its consistent point.
    pub(super) lsn: Lsn,
    /// The types that the sink takes in binary format.
    pub(super) binary: &'r [u32],
}

/// Begins a transaction that sees what the snapshot shows, and waits for no lock for long.
pub(super) fn begin(snapshot: &str) -> String {
    format!(
        "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET TRANSACTION SNAPSHOT {}; \
         SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}",
        quote_literal(snapshot)
    )
}

impl Asked<'_> {
    /// Puts all rows of a table onto the copy stream; returns how many.
    pub(super) async fn load(
        &mut self,
        reader: &Reader<'_>,
        table: &SourceTable,
        out: &mut Writer<'_>,
    ) -> Result<u64, Failure> {
        let source = &self.copier.config.source.name;
        let ranges = look(reader.client, table).await?;
        let version = Version::new(self.copier.source.epoch, reader.lsn, 0);
        let format = format_of(table, reader.binary);
        let head = head_of(table, version, format).line();
        let subject = subject::copy(source, out.sink(), &table.name);
        // One range may wait beside those that are read: what is read ahead has a limit.
        let (turns, mut order) = mpsc::channel(1);
        let count = ranges.len();
        let room = Arc::new(Room::default());
        let ranges = Mutex::new(Ranges {
            rest: ranges.into_iter().enumerate(),
            turns: Some(turns),
        });
        let work = Work {
            table,
            format,
            head: &head,
            ranges: &ranges,
            room: &room,
        };
        let (help, helps) = watch::channel(Help::NotWanted);
        let (help, began) = (&help, Instant::now());
        let reading = async {
            let others = (1..READERS_MAX.min(count)).map(|_| work.on_own(reader, helps.clone()));
            let first = async {
                let read = work.read(reader.client).await;
                help.send_replace(Help::TooLate);
                read
            };
            let read = try_join(first, try_join_all(others)).await;
            // Whatever became of it: nothing more comes.
            ranges.lock().await.turns = None;
            read
        };
        // Not dropped where a reader fails: a message half published would be missing to the tables behind this one.
        let publishing = async {
            let (mut rows, mut turn) = (0, 0);
            while let Some(mut messages) = order.recv().await {
                room.turn_of(turn);
                turn += 1;
                while let Some((message, place)) = messages.recv().await {
                    let Message { payload, count } = message;
                    if rows == 0 {
                        self.setbacks.table_goes_on(&table.name);
                        self.show();
                    }
                    rows += count;
                    let published = out.publish(subject.clone(), payload).await;
                    if let Err(failure) = published {
                        // The readers find nobody who takes what they read.
                        order.close();
                        while order.try_recv().is_ok() {}
                        return Err(failure);
                    }
                    drop(place);
                    let waited_at = out.waited_at().unwrap_or(began).max(began);
                    help.send_if_modified(|help| help.is_wanted_now(waited_at.elapsed()));
                }
            }
            Ok(rows)
        };
        let (read, published) = join(reading, publishing).await;
        let rows = published?;
        read?;
        Ok(rows)
    }
}

/// Whether a reader beside the first one would make a load faster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Help {
    NotWanted,
    Wanted,
    /// All ranges are taken.
    TooLate,
}

impl Help {
    /// Takes notice of how long the sink was not waited for; returns whether that has changed anything.
    fn is_wanted_now(&mut self, not_waited: Duration) -> bool {
        let changes = *self == Self::NotWanted && not_waited >= ALONE;
        if changes {
            *self = Self::Wanted;
        }
        changes
    }
}

/// Keeps out whoever changes the shape of a table or of one of its partitions.
async fn lock(client: &Client, table: &SourceTable) -> Result<(), Failure> {
    let locked = client.batch_execute(&Keyset::lock(&table.name)).await;
    locked.map_err(|error| Failure::of_table(&table.name, error))
}

/// Locks the table and finds its ranges.
async fn look(client: &Client, table: &SourceTable) -> Result<Vec<Range>, Failure> {
    let refused = |error| Failure::of_table(&table.name, error);
    let name = table.name.quoted();
    lock(client, table).await?;
    let leaves = client.query(LEAVES, &[&name]).await.map_err(refused)?;
    let now = client.query_one(LEAVES_NOW, &[&name]).await;
    let now: i64 = now.map_err(refused)?.get(0);
    let is_same = leaves.iter().all(|leaf| leaf.get(1));
    if !is_same || (now != 0 && now != leaves.len() as i64) {
        return Err(Failure::Table {
            condition: Condition::new(
                Code::CopyFailed,
                format!(
                    "table {} was rewritten, or names in it or its partitions changed, after the copy's snapshot \
                     was taken",
                    table.name
                ),
                "nothing to do: the copy is tried again by itself, with another snapshot",
            ),
            snapshot_lives: true,
        });
    }
    check_columns(client, table).await?;
    let leaves = leaves.iter().flat_map(|leaf| {
        let blocks = leaf.get::<_, i64>(2);
        ranges(leaf.get(0), u32::try_from(blocks).unwrap_or(u32::MAX))
    });
    Ok(leaves.collect())
}

fn head_of(table: &SourceTable, version: Version, format: LoadFormat) -> LoadHead {
    let shapes = table.shapes();
    let key = table.key.iter().map(String::as_str);
    LoadHead {
        load: table.name.clone(),
        version,
        table_version: fingerprint(shapes.iter().copied(), key),
        format,
        columns: shapes
            .iter()
            .map(|column| LoadColumn {
                name: column.name.to_owned(),
                type_oid: column.type_oid,
            })
            .collect(),
    }
}

/// What the readers of a table share.
#[derive(Clone, Copy)]
struct Work<'w> {
    table: &'w SourceTable,
    format: LoadFormat,
    head: &'w [u8],
    ranges: &'w Mutex<Ranges>,
    room: &'w Arc<Room>,
}

/// The ranges that no reader has taken yet, and the order in which they were taken.
///
/// They are published in that order, however many readers there are: rows of a table often lie in the order of their
/// key, and a target's index takes keys in order at less than half the cost of any other.
struct Ranges {
    rest: Enumerate<std::vec::IntoIter<Range>>,
    turns: Option<mpsc::Sender<mpsc::Receiver<Placed>>>,
}

impl Ranges {
    /// The next range, and where its messages go.
    async fn next(&mut self) -> Option<(Range, Outlet)> {
        let range = self.rest.next();
        if let (Some((number, range)), Some(turns)) = (range, &self.turns) {
            let (read, messages) = mpsc::channel(READ_AHEAD);
            if turns.send(messages).await.is_ok() {
                return Some((range, Outlet { number, read }));
            }
        }
        // Whoever publishes is told that there is no other.
        self.turns = None;
        None
    }
}

/// A message with the room that it takes.
type Placed = (Message, Place);

/// Where a range's messages go.
struct Outlet {
    /// The range's number in the order of publishing.
    number: usize,
    read: mpsc::Sender<Placed>,
}

impl Outlet {
    async fn send(&self, message: Message, room: &Arc<Room>) -> Result<(), Failure> {
        let bytes = message.payload.len();
        let sent = tokio::select! {
            place = room.take(self.number, bytes) => self.read.send((message, place)).await.ok(),
            () = self.read.closed() => None,
        };
        // The other end is gone only where publishing failed, which says so itself.
        sent.ok_or_else(|| Error::retry_because("the copy was cut off").into())
    }
}

impl Work<'_> {
    /// Reads ranges on a connection of its own, once help is wanted.
    async fn on_own(
        self,
        reader: &Reader<'_>,
        mut helps: watch::Receiver<Help>,
    ) -> Result<(), Failure> {
        let help = helps.wait_for(|help| *help != Help::NotWanted).await;
        if !help.is_ok_and(|help| *help == Help::Wanted) {
            return Ok(());
        }
        let client = connect(reader.dsn, session()).await.map_err(Error::from)?;
        client.batch_execute(&begin(reader.snapshot)).await?;
        // All of it, at once, and without waiting: who waits for the lock of the first connection goes before us, and
        // would have to wait for a load that waits for us.
        let name = &self.table.name;
        let at_once = format!("{} NOWAIT", Keyset::lock(name));
        match client.batch_execute(&at_once).await {
            Ok(()) => {
                self.read(&client).await?;
                // The other tables still have long to go: whoever waits for this one need not.
                Ok(client.batch_execute("ROLLBACK").await?)
            }
            // The others read it without us.
            Err(error) if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => Ok(()),
            Err(error) => Err(Failure::of_table(name, error)),
        }
    }

    /// Reads ranges until none is left.
    async fn read(self, client: &Client) -> Result<(), Failure> {
        loop {
            let next = self.ranges.lock().await.next().await;
            let Some((range, outlet)) = next else {
                return Ok(());
            };
            self.range(client, &range, &outlet).await?;
        }
    }

    async fn range(self, client: &Client, range: &Range, outlet: &Outlet) -> Result<(), Failure> {
        let table = self.table;
        let condition = range.condition();
        let conditions: Vec<_> = condition.iter().map(String::as_str).collect();
        let sql = format!(
            "COPY (SELECT {} FROM ONLY {}{}) TO STDOUT{}",
            table.select_list(),
            range.relation,
            table.where_clause(&conditions),
            option(self.format)
        );
        let refused = |error| Failure::of_table(&table.name, error);
        let mut sent = pin!(client.copy_out(&sql).await.map_err(refused)?);
        let mut packing = Packing::new(self.head);
        let mut rows = Rows::new(table, self.format);
        while let Some(message) = sent.next().await {
            let message = message.map_err(refused)?;
            let row = rows
                .row(&message)
                .map_err(|error| Failure::of_row(&table.name, &error))?;
            let Some(row) = row else { continue };
            let bytes = text_bytes(table, self.format, row);
            if bytes + self.head.len() > limits::ROW_BYTES_MAX {
                return Err(Failure::too_large(&table.name, bytes));
            }
            for message in packing.push(row).into_iter().flatten() {
                outlet.send(message, self.room).await?;
            }
        }
        match packing.take() {
            Some(message) => outlet.send(message, self.room).await,
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    /// Ranges of two tables with so many blocks, and the end where what is read of them is published.
    fn of_two(blocks: [u32; 2]) -> (Mutex<Ranges>, mpsc::Receiver<mpsc::Receiver<Placed>>) {
        let (turns, order) = mpsc::channel(1);
        let those = ["a", "b"].into_iter().zip(blocks);
        let those = those.flat_map(|(relation, blocks)| ranges(relation, blocks));
        let rest = those.collect::<Vec<_>>().into_iter().enumerate();
        let turns = Some(turns);
        (Mutex::new(Ranges { rest, turns }), order)
    }

    fn named(range: &Range) -> Bytes {
        let condition = range.condition().unwrap_or_default();
        format!("{} {condition}", range.relation).into()
    }

    /// What is published of these ranges by two readers, one of which takes long.
    async fn published(blocks: [u32; 2]) -> Vec<Bytes> {
        let (ranges, mut order) = of_two(blocks);
        let room = Arc::new(Room::default());
        let read = async |pauses: usize| {
            loop {
                let next = ranges.lock().await.next().await;
                let Some((range, outlet)) = next else { break };
                for _ in 0..pauses {
                    tokio::task::yield_now().await;
                }
                let payload = named(&range);
                let sent = outlet.send(Message { payload, count: 1 }, &room).await;
                assert!(sent.is_ok(), "taken");
            }
        };
        let publish = async {
            let mut published = Vec::new();
            for turn in 0.. {
                let Some(mut messages) = order.recv().await else {
                    break;
                };
                room.turn_of(turn);
                while let Some((Message { payload, .. }, _place)) = messages.recv().await {
                    published.push(payload);
                }
            }
            published
        };
        let all = async { tokio::join!(read(0), read(7), publish).2 };
        let in_time = tokio::time::timeout(std::time::Duration::from_secs(10), all).await;
        in_time.expect("nobody waits for ever")
    }

    #[tokio::test]
    async fn each_range_is_read_once_and_published_in_its_order() {
        // A table that is empty, or that has grown since, is read to its end too: its last range has none.
        for blocks in [[0, 0], [5_000, 0], [0, 513], [512 * 20 + 1, 512 * 7]] {
            let [a, b] = blocks;
            let expected: Vec<_> = ranges("a", a).chain(ranges("b", b)).collect();
            let last = expected.last().and_then(Range::condition);
            assert!(last.is_none_or(|condition| !condition.contains('<')));
            let expected: Vec<_> = expected.iter().map(named).collect();
            assert_eq!(published(blocks).await, expected, "{blocks:?}");
        }
    }

    #[test]
    fn help_is_wanted_once_and_not_too_late() {
        let mut help = Help::NotWanted;
        assert!(!help.is_wanted_now(ALONE - Duration::from_millis(1)));
        assert!(help.is_wanted_now(ALONE) && help == Help::Wanted);
        assert!(!help.is_wanted_now(ALONE));
        let mut help = Help::TooLate;
        assert!(!help.is_wanted_now(ALONE * 2) && help == Help::TooLate);
    }

    #[tokio::test]
    async fn no_range_is_begun_that_nobody_publishes() {
        let (ranges, order) = of_two([5_000, 5_000]);
        drop(order);
        let mut ranges = ranges.lock().await;
        assert!(ranges.next().await.is_none());
        assert!(ranges.turns.is_none() && ranges.rest.len() > 0);
        assert!(ranges.next().await.is_none());
    }
}
