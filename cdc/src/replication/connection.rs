//! A replication connection before its stream is started, and the thread that owns it.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use millrace_config::limits::CAPTURE_QUEUE_BYTES_MAX;
use millrace_connect::postgres::{
    Attempt, ConnectError, Dialed, Dsn, MaybeTlsStream, dial_with, pinned_options,
};
use millrace_event::Lsn;
use postgres_protocol::message::frontend;
use tokio::io::AsyncWriteExt;
use tokio::runtime::Builder;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::timeout;

use super::auth::Credentials;
use super::command::{self, CreatedSlot, Row, SlotKind, Snapshot, StartOptions, SystemIdentity};
use super::error::WalError;
use super::feedback::Feedback;
use super::framing::Framer;
use super::reader::Stream;
use super::session::{Login, Session};
use super::wal::{Delivery, Shared, WalReader};

/// How long asking the server to cancel a command may take.
const CANCEL_LIMIT: Duration = Duration::from_secs(5);

/// SQLSTATE of a login refused by `pg_hba.conf`, which may admit another kind of encryption.
const LOGIN_REFUSED: &str = "28000";

/// A `replication=database` session that runs commands.
///
/// A call that is dropped before it is done abandons the connection: the command is cancelled at the server,
/// the session ends, and later calls fail with [`WalError::ThreadGone`]. Dropping the connection ends it, too.
#[derive(Debug)]
pub struct ReplicationConnection {
    commands: mpsc::UnboundedSender<Command>,
    shared: Arc<Shared>,
    parameters: HashMap<String, String>,
}

type Reply<T> = oneshot::Sender<Result<T, WalError>>;

enum Command {
    Query { sql: String, reply: Reply<Vec<Row>> },
    Start(Box<Start>),
    Terminate,
}

struct Start {
    sql: String,
    slot: String,
    sender_timeout: Option<Duration>,
    queue: mpsc::UnboundedSender<Delivery>,
    reply: Reply<()>,
}

impl ReplicationConnection {
    /// Connects and logs in, on a new thread.
    ///
    /// # Errors
    /// The server is out of reach ([`WalError::Connect`]) or does not let us in.
    pub async fn connect(dsn: &Dsn, application_name: &str) -> Result<Self, WalError> {
        let failed = |source| WalError::Io {
            doing: "starting its thread",
            source,
        };
        let (commands, receiver) = mpsc::unbounded_channel();
        let (ready, greeting) = oneshot::channel();
        let shared = Arc::new(Shared::default());
        let runtime = Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()
            .map_err(failed)?;
        let owner = Owner {
            dsn: dsn.clone(),
            application_name: application_name.to_owned(),
            shared: Arc::clone(&shared),
        };
        let ended = shared.ended.clone().drop_guard();
        let thread = std::thread::Builder::new()
            .name("wal-reader".to_owned())
            .spawn(move || {
                let _ended = ended;
                runtime.block_on(owner.run(ready, receiver));
                // A name lookup that hangs must not hold the thread back.
                runtime.shutdown_background();
            })
            .map_err(failed)?;
        *shared.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
        let parameters = greeting.await.map_err(|_| WalError::ThreadGone)??;
        Ok(Self {
            commands,
            shared,
            parameters,
        })
    }

    /// The server's version as it reports it, like `17.6`.
    #[must_use]
    pub fn server_version(&self) -> &str {
        self.parameters
            .get("server_version")
            .map_or("", String::as_str)
    }

    /// IDENTIFY_SYSTEM.
    ///
    /// # Errors
    /// The connection failed.
    pub async fn identify_system(&mut self) -> Result<SystemIdentity, WalError> {
        let rows = self.query("IDENTIFY_SYSTEM").await?;
        command::system_identity(rows).ok_or_else(|| malformed("IDENTIFY_SYSTEM"))
    }

    /// Each timeline before `timeline`, oldest first, and the LSN at which it was left.
    ///
    /// # Errors
    /// The server does not have this timeline's history, or the connection failed.
    pub async fn timeline_history(&mut self, timeline: u32) -> Result<Vec<(u32, Lsn)>, WalError> {
        if timeline <= 1 {
            // The first timeline has no history file.
            return Ok(Vec::new());
        }
        let rows = self.query(&format!("TIMELINE_HISTORY {timeline}")).await?;
        command::timeline_history(rows).ok_or_else(|| malformed("TIMELINE_HISTORY"))
    }

    /// Creates a pgoutput slot. Waits until every transaction that is running now has ended; to give up, drop
    /// the call.
    ///
    /// # Errors
    /// The server refused (42710: it exists, 53400: no free slot, 55000: `wal_level`), or the connection failed.
    pub async fn create_slot(
        &mut self,
        name: &str,
        kind: SlotKind,
        snapshot: Snapshot,
    ) -> Result<CreatedSlot, WalError> {
        let rows = self
            .query(&command::create_slot(name, kind, snapshot))
            .await?;
        command::created_slot(rows).ok_or_else(|| malformed("CREATE_REPLICATION_SLOT"))
    }

    /// Drops a slot; with `wait`, after the connection that reads it has ended.
    ///
    /// # Errors
    /// The server refused (42704: it does not exist, 55006: in use), or the connection failed.
    pub async fn drop_slot(&mut self, name: &str, wait: bool) -> Result<(), WalError> {
        self.query(&command::drop_slot(name, wait)).await.map(drop)
    }

    /// Runs one statement and returns its rows as text.
    ///
    /// # Errors
    /// [`WalError::Server`] if the server refused, after which the connection is still good; others end it.
    pub async fn query(&mut self, sql: &str) -> Result<Vec<Vec<Option<String>>>, WalError> {
        let (reply, answer) = oneshot::channel();
        let command = Command::Query {
            sql: sql.to_owned(),
            reply,
        };
        self.commands
            .send(command)
            .map_err(|_| WalError::ThreadGone)?;
        answer.await.map_err(|_| WalError::ThreadGone)?
    }

    /// Starts to stream. The connection does nothing else from then on.
    ///
    /// # Errors
    /// The slot is [active](WalError::SlotActive), [missing](WalError::SlotMissing) or
    /// [unusable](WalError::SlotUnusable); or the connection failed.
    pub async fn start(mut self, options: &StartOptions<'_>) -> Result<WalReader, WalError> {
        let sender_timeout = command::sender_timeout(self.query(command::SENDER_TIMEOUT).await?);
        let (queue, deliveries) = mpsc::unbounded_channel();
        let (reply, answer) = oneshot::channel();
        let start = Start {
            sql: command::start(options),
            slot: options.slot.to_owned(),
            sender_timeout,
            queue,
            reply,
        };
        let command = Command::Start(Box::new(start));
        self.commands
            .send(command)
            .map_err(|_| WalError::ThreadGone)?;
        answer.await.map_err(|_| WalError::ThreadGone)??;
        Ok(WalReader::new(deliveries, self.shared))
    }

    /// Ends the session and waits until its thread has.
    pub async fn terminate(self) {
        // Both fail only if the thread has ended already.
        let _ = self.commands.send(Command::Terminate);
        self.shared.ended.cancelled().await;
    }
}

fn malformed(command: &'static str) -> WalError {
    WalError::Unexpected {
        command,
        found: "rows of another form".to_owned(),
    }
}

/// What the thread runs.
struct Owner {
    dsn: Dsn,
    application_name: String,
    shared: Arc<Shared>,
}

impl Owner {
    async fn run(
        self,
        mut ready: Reply<HashMap<String, String>>,
        mut commands: mpsc::UnboundedReceiver<Command>,
    ) {
        let opened = tokio::select! {
            biased;
            opened = self.open() => opened,
            () = ready.closed() => return,
        };
        let mut session = match opened {
            Ok(session) => session,
            Err(error) => {
                let _ = ready.send(Err(error));
                return;
            }
        };
        if ready.send(Ok(session.parameters().clone())).is_err() {
            return session.terminate().await;
        }
        while let Some(command) = commands.recv().await {
            match command {
                Command::Query { sql, mut reply } => {
                    let answer = tokio::select! {
                        biased;
                        answer = session.query(&sql) => answer,
                        () = reply.closed() => return self.abandon(session).await,
                    };
                    let broken = answer.as_ref().is_err_and(|error| !error.keeps_session());
                    let _ = reply.send(answer);
                    if broken {
                        return;
                    }
                }
                Command::Start(start) => return self.stream(session, *start).await,
                Command::Terminate => break,
            }
        }
        session.terminate().await;
    }

    /// Connects in each of the ways that the `sslmode` allows.
    async fn open(&self) -> Result<Session<MaybeTlsStream>, WalError> {
        let mut refused = None;
        for attempt in self.dsn.attempts() {
            match self.open_by(*attempt).await {
                Err(WalError::Server(error)) if error.sqlstate == LOGIN_REFUSED => {
                    refused = Some(WalError::Server(error));
                }
                opened => return opened,
            }
        }
        Err(refused.unwrap_or(WalError::Closed))
    }

    async fn open_by(&self, attempt: Attempt) -> Result<Session<MaybeTlsStream>, WalError> {
        let limit = self.dsn.connect_timeout();
        let dialed = dial_with(&self.dsn, attempt, limit).await?;
        let Dialed {
            stream,
            channel_binding,
            address,
        } = dialed;
        let config = self.dsn.config();
        let user = config.get_user().unwrap_or_default();
        let options = match config.get_options() {
            Some(own) if !own.is_empty() => format!("{own} {}", pinned_options()),
            _ => pinned_options(),
        };
        let login = Login {
            credentials: Credentials {
                user,
                password: config.get_password(),
                binding: config.get_channel_binding(),
                server_end_point: channel_binding.as_deref(),
            },
            database: config.get_dbname().unwrap_or(user),
            application_name: &self.application_name,
            options: &options,
        };
        timeout(limit, Session::open(stream, &login))
            .await
            .unwrap_or_else(|late| {
                let source = io::Error::from(late);
                Err(ConnectError::Unreachable { address, source }.into())
            })
    }

    /// The caller has lost interest in a command: asks the server to give it up, which it does not notice from
    /// a closed socket while it waits (a new slot waits for other transactions).
    async fn abandon(&self, session: Session<MaybeTlsStream>) {
        if let Some((process_id, secret_key)) = session.cancel_key() {
            let cancel = async {
                for attempt in self.dsn.attempts() {
                    if let Ok(mut dialed) = dial_with(&self.dsn, *attempt, CANCEL_LIMIT).await {
                        let mut out = BytesMut::new();
                        frontend::cancel_request(process_id, secret_key, &mut out);
                        dialed.stream.write_all(&out).await?;
                        return dialed.stream.shutdown().await;
                    }
                }
                Ok(())
            };
            match timeout(CANCEL_LIMIT, cancel).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => tracing::debug!("an abandoned command was not cancelled"),
            }
        }
        session.terminate().await;
    }

    async fn stream(&self, mut session: Session<MaybeTlsStream>, start: Start) {
        let Start {
            sql,
            slot,
            sender_timeout,
            queue,
            mut reply,
        } = start;
        let started = tokio::select! {
            biased;
            started = session.start(&sql, &slot) => started,
            () = reply.closed() => return self.abandon(session).await,
        };
        if let Err(error) = started {
            let _ = reply.send(Err(error));
            return session.terminate().await;
        }
        let (socket, leftover) = session.into_parts();
        let stream = Stream {
            socket,
            framer: Framer::new(&leftover),
            feedback: Feedback::new(Instant::now(), sender_timeout),
            shared: Arc::clone(&self.shared),
            queue,
            budget: Arc::new(Semaphore::new(CAPTURE_QUEUE_BYTES_MAX)),
        };
        // If the caller is gone, so is the queue, and the stream ends by itself.
        let _ = reply.send(Ok(()));
        stream.run().await;
    }
}
