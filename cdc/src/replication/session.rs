//! The messages of one session up to the start of replication.

use std::collections::HashMap;
use std::io;

use bytes::{Buf, BytesMut};
use fallible_iterator::FallibleIterator;
use postgres_protocol::message::backend::{DataRowBody, Header, Message};
use postgres_protocol::message::frontend;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::auth::{self, Credentials};
use super::command::Row;
use super::error::{ServerError, WalError};

/// A message's tag and length.
const HEADER_BYTES: usize = 5;

/// The largest message outside of replication: a timeline history of thousands of switches fits easily.
const MESSAGE_BYTES_MAX: usize = 16 << 20;

/// A logged-in session over any byte stream.
pub(super) struct Session<S> {
    stream: S,
    buffer: BytesMut,
    parameters: HashMap<String, String>,
    cancel_key: Option<(i32, i32)>,
}

/// What the session needs to know to log in.
pub(super) struct Login<'a> {
    pub(super) credentials: Credentials<'a>,
    pub(super) database: &'a str,
    pub(super) application_name: &'a str,
    /// Startup options that pin the session's settings.
    pub(super) options: &'a str,
}

/// Something other than an error, a notice or a parameter, which [`Session::read`] takes in itself.
pub(super) enum Answer {
    Message(Message),
    CopyBoth,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Session<S> {
    /// Logs in on a fresh connection.
    pub(super) async fn open(stream: S, login: &Login<'_>) -> Result<Self, WalError> {
        let buffer = BytesMut::with_capacity(8 << 10);
        let mut session = Self {
            stream,
            buffer,
            parameters: HashMap::new(),
            cancel_key: None,
        };
        let parameters = [
            ("user", login.credentials.user),
            ("database", login.database),
            ("replication", "database"),
            ("application_name", login.application_name),
            ("client_encoding", "UTF8"),
            ("options", login.options),
        ];
        session
            .send(|out| frontend::startup_message(parameters, out))
            .await?;
        auth::authenticate(&mut session, &login.credentials).await?;
        loop {
            match session.read().await? {
                Answer::Message(Message::BackendKeyData(body)) => {
                    session.cancel_key = Some((body.process_id(), body.secret_key()));
                }
                Answer::Message(Message::ReadyForQuery(_)) => return Ok(session),
                answer => return Err(unexpected("the login", &answer)),
            }
        }
    }

    /// A setting that the server reported, like `server_version`.
    pub(super) fn parameters(&self) -> &HashMap<String, String> {
        &self.parameters
    }

    /// The process id and key for a CancelRequest.
    pub(super) fn cancel_key(&self) -> Option<(i32, i32)> {
        self.cancel_key
    }

    /// Sends one message.
    pub(super) async fn send(
        &mut self,
        write: impl FnOnce(&mut BytesMut) -> io::Result<()>,
    ) -> Result<(), WalError> {
        let failed = |source| WalError::Io {
            doing: "sending a command",
            source,
        };
        let mut out = BytesMut::new();
        write(&mut out).map_err(failed)?;
        self.stream.write_all(&out).await.map_err(failed)?;
        self.stream.flush().await.map_err(failed)
    }

    /// The next message. An ErrorResponse is an error.
    pub(super) async fn read(&mut self) -> Result<Answer, WalError> {
        let failed = |source| WalError::Io {
            doing: "reading an answer",
            source,
        };
        loop {
            let header = self.fill().await?;
            let length = header.len() as usize + 1;
            match header.tag() {
                b'E' => {
                    let message = self.buffer.split_to(length);
                    let body = message.get(HEADER_BYTES..).unwrap_or_default();
                    return Err(WalError::server(ServerError::from_body(body)));
                }
                b'W' => {
                    self.buffer.advance(length);
                    return Ok(Answer::CopyBoth);
                }
                // NegotiateProtocolVersion: nothing that we send can be negotiated away.
                b'v' => {
                    self.buffer.advance(length);
                    continue;
                }
                _ => {}
            }
            let message = Message::parse(&mut self.buffer).map_err(failed)?;
            match message {
                Some(Message::NoticeResponse(_) | Message::NotificationResponse(_)) => {}
                Some(Message::ParameterStatus(body)) => {
                    let name = body.name().map_err(failed)?.to_owned();
                    self.parameters
                        .insert(name, body.value().map_err(failed)?.to_owned());
                }
                Some(message) => return Ok(Answer::Message(message)),
                None => return Err(WalError::Closed),
            }
        }
    }

    /// Reads until the buffer holds a whole message.
    async fn fill(&mut self) -> Result<Header, WalError> {
        let failed = |source| WalError::Io {
            doing: "reading an answer",
            source,
        };
        loop {
            if let Some(header) = Header::parse(&self.buffer).map_err(failed)? {
                let length = usize::try_from(header.len()).unwrap_or(usize::MAX);
                if length > MESSAGE_BYTES_MAX {
                    let text = format!("message {} of {length} bytes", header.tag());
                    return Err(failed(io::Error::other(text)));
                }
                if self.buffer.len() > length {
                    return Ok(header);
                }
            }
            match self
                .stream
                .read_buf(&mut self.buffer)
                .await
                .map_err(failed)?
            {
                0 => return Err(WalError::Closed),
                _ => continue,
            }
        }
    }

    /// Runs one statement in the simple protocol. After a [`WalError::Server`] the session goes on.
    pub(super) async fn query(&mut self, sql: &str) -> Result<Vec<Row>, WalError> {
        self.send(|out| frontend::query(sql, out)).await?;
        let mut rows = Vec::new();
        loop {
            match self.read().await {
                Ok(Answer::Message(message)) => match message {
                    Message::DataRow(body) => rows.push(text_row(&body)?),
                    Message::RowDescription(_)
                    | Message::CommandComplete(_)
                    | Message::EmptyQueryResponse => {}
                    Message::ReadyForQuery(_) => return Ok(rows),
                    message => return Err(unexpected("a query", &Answer::Message(message))),
                },
                Ok(answer) => return Err(unexpected("a query", &answer)),
                Err(WalError::Server(error)) => {
                    self.ready().await?;
                    return Err(WalError::Server(error));
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Sends START_REPLICATION and waits until the stream is open.
    pub(super) async fn start(&mut self, sql: &str, slot: &str) -> Result<(), WalError> {
        self.send(|out| frontend::query(sql, out)).await?;
        match self.read().await {
            Ok(Answer::CopyBoth) => Ok(()),
            Ok(answer) => Err(unexpected("START_REPLICATION", &answer)),
            Err(WalError::Server(error)) => {
                self.ready().await?;
                Err(WalError::start(error, slot))
            }
            Err(error) => Err(error),
        }
    }

    /// Waits for the end of a command that failed.
    async fn ready(&mut self) -> Result<(), WalError> {
        loop {
            if let Answer::Message(Message::ReadyForQuery(_)) = self.read().await? {
                return Ok(());
            }
        }
    }

    /// Ends the session. The server may be gone already, so failing to say so is no error.
    pub(super) async fn terminate(mut self) {
        let said = self.send(|out| {
            frontend::terminate(out);
            Ok(())
        });
        if said.await.is_ok() {
            let _ = self.stream.shutdown().await;
        }
    }

    /// The stream, and what was read from it behind the last message.
    pub(super) fn into_parts(self) -> (S, BytesMut) {
        (self.stream, self.buffer)
    }
}

/// The columns of a row. What is not UTF-8 (only a timeline's reason can be) is replaced.
fn text_row(body: &DataRowBody) -> Result<Row, WalError> {
    let text = |range| {
        let bytes = body.buffer().get(range).unwrap_or_default();
        String::from_utf8_lossy(bytes).into_owned()
    };
    let row = body.ranges().map(|range| Ok(range.map(text))).collect();
    row.map_err(|source| WalError::Io {
        doing: "reading a row",
        source,
    })
}

/// Something that does not answer `command`. Only its kind is named: it may hold a secret.
pub(super) fn unexpected(command: &'static str, answer: &Answer) -> WalError {
    let found = match answer {
        Answer::CopyBoth => "CopyBothResponse",
        Answer::Message(Message::ReadyForQuery(_)) => "ReadyForQuery",
        Answer::Message(Message::CommandComplete(_)) => "CommandComplete",
        Answer::Message(Message::CopyInResponse(_) | Message::CopyOutResponse(_)) => "COPY",
        Answer::Message(Message::CopyDone) => "CopyDone",
        Answer::Message(_) => "another message",
    };
    WalError::Unexpected {
        command,
        found: found.to_owned(),
    }
}
