//! `millrace drop`: removes what `run` created at the source and on the stream.

use std::io::{BufRead, IsTerminal};

use async_nats::jetstream::{self, ErrorCode};
use futures_util::TryStreamExt;
use millrace_cdc::{source, stream};
use millrace_config::{Code, Condition, Config, Exit};
use millrace_event::{quote_identifier, subject, work};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::status::{source_condition, stream_condition};
use crate::arguments::DropArguments;
use crate::connection::{self, Side, chain};

/// What the servers' monitoring shows.
const NAME: &str = "millrace drop";

/// Something that exists and is to be removed, in the order of removal.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Object {
    Slot { name: String, retained_bytes: u64 },
    Publication(String),
    Stream { name: String, messages: u64 },
    Bucket(String),
}

impl std::fmt::Display for Object {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Slot {
                name,
                retained_bytes,
            } => {
                write!(
                    f,
                    "slot {name} (keeps {})",
                    bytesize::ByteSize::b(*retained_bytes)
                )
            }
            Self::Publication(name) => write!(f, "publication {name}"),
            Self::Stream { name, messages } => write!(f, "stream {name} ({messages} messages)"),
            Self::Bucket(name) => write!(f, "bucket {name}"),
        }
    }
}

/// Lists what exists, asks, and removes it. What cannot be removed is reported, and the rest goes on.
pub(crate) async fn drop(config: &Config, arguments: DropArguments) -> Exit {
    let name = &config.source.name;
    // Without the source nobody knows whether a capture is at work, and then nothing is touched.
    let client = match connection::postgres(&config.source.url, Side::Source, NAME).await {
        Ok(client) => client,
        Err(condition) => return refuse(&condition),
    };
    let mut objects = match at_source(&client, name).await {
        Ok(objects) => objects,
        Err(condition) => return refuse(&condition),
    };
    let mut failed = false;
    let jetstream = match connection::nats(&config.stream, NAME).await {
        Ok(jetstream) => match on_stream(&jetstream, name).await {
            Ok(found) => {
                objects.extend(found);
                Some(jetstream)
            }
            Err(condition) => {
                failed = report(&condition);
                None
            }
        },
        Err(condition) => {
            failed = report(&condition);
            None
        }
    };
    if objects.is_empty() && !failed {
        super::answer("nothing to remove\n");
        return Exit::Ok;
    }
    if !objects.is_empty() && !arguments.yes {
        // Part of the question. What is done is told as it is done, and nothing twice.
        for object in &objects {
            super::say(&object.to_string());
        }
        match confirmed() {
            Some(true) => {}
            Some(false) => {
                super::say("nothing was removed");
                return Exit::Ok;
            }
            None => {
                return super::usage("there is no terminal to ask at: pass --yes to remove these");
            }
        }
    }
    for object in &objects {
        match remove(object, &client, jetstream.as_ref()).await {
            Ok(()) => super::answer(&format!("removed {object}\n")),
            // Somebody began to read since: what that capture needs stays.
            Err(condition) if condition.code == Code::SlotActive => return refuse(&condition),
            Err(condition) => failed = report(&condition),
        }
    }
    if failed {
        super::say("not everything was removed: run `millrace drop` again once that is resolved");
        return Exit::Environment;
    }
    super::answer(&by_hand(config));
    Exit::Ok
}

/// Says why nothing is done.
fn refuse(condition: &Condition) -> Exit {
    report(condition);
    Exit::Environment
}

/// Says what failed; always true, for the flag that remembers it.
fn report(condition: &Condition) -> bool {
    super::say(&format!("error: {condition}\n  do: {}", condition.remedy));
    true
}

/// Asks; `None` where nobody can answer.
fn confirmed() -> Option<bool> {
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        return None;
    }
    super::say("Remove all of this? The replicas then need a new copy of every table. Type yes:");
    let mut line = String::new();
    stdin.lock().read_line(&mut line).ok()?;
    Some(line.trim().eq_ignore_ascii_case("yes"))
}

async fn at_source(client: &Client, source: &str) -> Result<Vec<Object>, Condition> {
    let mut objects = Vec::new();
    let slot = source::slot_name(source);
    let found = source::find_slot(client, &slot)
        .await
        .map_err(|error| source_condition(&error))?;
    if let Some(found) = found {
        if let Some(pid) = found.active_pid {
            return Err(active(&slot, Some(pid)));
        }
        objects.push(Object::Slot {
            name: slot,
            retained_bytes: found.retained_bytes,
        });
    }
    let publication = source::publication_name(source);
    let found = client
        .query_opt(
            "SELECT FROM pg_publication WHERE pubname = $1",
            &[&publication],
        )
        .await
        .map_err(|error| postgres_condition(&error))?;
    objects.extend(found.map(|_| Object::Publication(publication)));
    Ok(objects)
}

fn active(slot: &str, pid: Option<i32>) -> Condition {
    let pid = pid
        .map(|pid| format!(" (process {pid} of the source)"))
        .unwrap_or_default();
    Condition::new(
        Code::SlotActive,
        format!("a capture is reading slot \"{slot}\"{pid}: nothing is removed under it"),
        "stop `millrace run` first",
    )
}

fn postgres_condition(error: &tokio_postgres::Error) -> Condition {
    let privilege = error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE);
    let (code, remedy) = if privilege {
        (
            Code::SourcePrivilege,
            "run it as the owner, or remove it by hand",
        )
    } else {
        (Code::SourceUnreachable, "look at the source's log")
    };
    // The server's own words where there are any; the client only wraps them.
    let message = error
        .as_db_error()
        .map(|server| server.message().to_owned());
    Condition::new(code, message.unwrap_or_else(|| chain(error)), remedy)
}

async fn on_stream(jetstream: &jetstream::Context, source: &str) -> Result<Vec<Object>, Condition> {
    let failed = |error: &dyn std::error::Error| {
        let remedy = "check that JetStream is on and that this user may list streams";
        Condition::new(Code::StreamUnreachable, chain(error), remedy)
    };
    let names: Vec<String> = jetstream
        .stream_names()
        .try_collect()
        .await
        .map_err(|error| failed(&error))?;
    let mut streams = Vec::new();
    let mut buckets = Vec::new();
    for name in names {
        if is_stream_of(source, &name) {
            let found = stream::find_stream(jetstream, &name).await;
            let found = found.map_err(|error| stream_condition(&error))?;
            streams.extend(found.map(|found| Object::Stream {
                name,
                messages: found.messages,
            }));
        } else if let Some(bucket) = bucket_of(source, &name) {
            buckets.push(Object::Bucket(bucket));
        }
    }
    streams.append(&mut buckets);
    Ok(streams)
}

/// Whether a stream is this source's, or one of its copy streams, of a sink that is not configured any more too.
fn is_stream_of(source: &str, name: &str) -> bool {
    if name == subject::stream_name(source) {
        return true;
    }
    // The hash at the end tells `shop` with sink `eu_a` from `shop_eu` with sink `a`.
    let rest = name
        .strip_prefix("COPY_")
        .and_then(|rest| rest.strip_prefix(source));
    let sink = rest
        .and_then(|rest| rest.strip_prefix('_'))
        .and_then(|rest| rest.rsplit_once('_'));
    sink.is_some_and(|(sink, _)| subject::copy_stream_name(source, sink) == name)
}

/// The bucket of this source that a stream holds.
fn bucket_of(source: &str, name: &str) -> Option<String> {
    let bucket = name.strip_prefix("KV_")?;
    let kinds = [work::SCHEMAS, work::SINKS, work::COPIES, work::STATE];
    kinds
        .map(|kind| subject::bucket_name(source, kind))
        .into_iter()
        .find(|name| name == bucket)
}

async fn remove(
    object: &Object,
    client: &Client,
    jetstream: Option<&jetstream::Context>,
) -> Result<(), Condition> {
    match object {
        Object::Slot { name, .. } => {
            // As one statement of our own: an error must tell whether somebody has begun to read.
            let sql = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = $1";
            match client.execute(sql, &[name]).await {
                Ok(_) => Ok(()),
                Err(error) if error.code() == Some(&SqlState::OBJECT_IN_USE) => {
                    Err(active(name, None))
                }
                Err(error) => Err(postgres_condition(&error)),
            }
        }
        Object::Publication(name) => {
            let sql = format!("DROP PUBLICATION IF EXISTS {}", quote_identifier(name));
            client.batch_execute(&sql).await.map_err(|error| {
                let condition = postgres_condition(&error);
                match condition.code {
                    Code::SourcePrivilege => Condition {
                        remedy: format!("as its owner: {sql}"),
                        ..condition
                    },
                    _ => condition,
                }
            })
        }
        Object::Stream { name, .. } => delete(jetstream, name).await,
        Object::Bucket(name) => delete(jetstream, &format!("KV_{name}")).await,
    }
}

async fn delete(jetstream: Option<&jetstream::Context>, name: &str) -> Result<(), Condition> {
    let Some(jetstream) = jetstream else {
        return Ok(());
    };
    match stream::delete_stream(jetstream, name).await {
        Err(stream::StreamError::Refused { source, .. })
            if source.error_code() == ErrorCode::STREAM_NOT_FOUND =>
        {
            Ok(())
        }
        deleted => deleted.map_err(|error| stream_condition(&error)),
    }
}

/// What stays, and how it is removed by whoever wants that.
fn by_hand(config: &Config) -> String {
    let mut text = String::new();
    for sink in &config.sinks {
        text.push_str(&format!(
            "\nThe target of sink {} keeps its rows; the next `millrace run` copies its tables again and makes \
             them exact.\nTo keep the tables without Millrace instead, in that database:\n  \
             DROP SCHEMA IF EXISTS millrace CASCADE;\n",
            sink.name
        ));
        for table in config.tables_of(&sink.name) {
            let table = table.target.quoted();
            text.push_str(&format!(
                "  ALTER TABLE {table} DROP COLUMN IF EXISTS \"_millrace_version\";\n"
            ));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_objects_of_this_source_are_found() {
        assert!(is_stream_of("shop", "CDC_shop"));
        assert!(!is_stream_of("shop", "CDC_shop_eu") && !is_stream_of("shop", "ORDERS"));
        let ours = subject::copy_stream_name("shop", "eu_a");
        let theirs = subject::copy_stream_name("shop_eu", "a");
        assert!(is_stream_of("shop", &ours) && !is_stream_of("shop", &theirs));
        assert!(is_stream_of("shop_eu", &theirs) && !is_stream_of("shop_eu", &ours));
        assert_eq!(
            bucket_of("shop", "KV_MILLRACE_shop_sinks").as_deref(),
            Some("MILLRACE_shop_sinks")
        );
        assert_eq!(bucket_of("shop", "KV_MILLRACE_shop_eu_sinks"), None);
        assert_eq!(bucket_of("shop", "KV_shop"), None);
    }
}
