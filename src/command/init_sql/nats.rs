//! The NATS permissions, as a block of the server's configuration.

use std::fmt::Write;

use millrace_config::Config;
use millrace_event::{subject, work};

use crate::connection::INBOX;

/// Where the replies to capture arrive.
const CAPTURE_INBOX: &str = "_INBOX_millrace_capture";
/// Where the replies to `run --once` arrive while it reads its goal.
const ONCE_INBOX: &str = "_INBOX_millrace_once";

/// What one user may do. Whoever may publish on a subject of the stream can forge changes: nobody else should.
#[derive(Debug, Default)]
struct Permissions {
    publish: Vec<String>,
    subscribe: Vec<String>,
}

impl Permissions {
    /// Both together.
    fn and(mut self, other: Self) -> Self {
        for (own, other) in [
            (&mut self.publish, other.publish),
            (&mut self.subscribe, other.subscribe),
        ] {
            for subject in other {
                if !own.contains(&subject) {
                    own.push(subject);
                }
            }
        }
        self
    }

    fn api(&mut self, requests: &[&str], stream: &str) {
        let subject = |request: &&str| format!("$JS.API.{}", request.replace("{}", stream));
        self.publish.extend(requests.iter().map(subject));
    }

    /// Reading a stream with a consumer of one's own. Nothing is acknowledged: positions live in the targets.
    fn consume(&mut self, stream: &str) {
        self.api(
            &[
                "STREAM.INFO.{}",
                "STREAM.MSG.GET.{}",
                "CONSUMER.CREATE.{}",
                "CONSUMER.CREATE.{}.>",
                "CONSUMER.INFO.{}.>",
                "CONSUMER.DELETE.{}.>",
                "CONSUMER.MSG.NEXT.{}.>",
            ],
            stream,
        );
    }

    /// Receiving replies; every user may read the goal of `--once`.
    fn replies(&mut self, inbox: &str) {
        self.subscribe
            .extend([inbox, ONCE_INBOX].map(|inbox| format!("{inbox}.>")));
    }

    /// Reading and watching a bucket.
    fn read_bucket(&mut self, bucket: &str) {
        let stream = format!("KV_{bucket}");
        self.api(
            &[
                "STREAM.INFO.{}",
                "STREAM.MSG.GET.{}",
                "DIRECT.GET.{}",
                "DIRECT.GET.{}.>",
                "CONSUMER.CREATE.{}",
                "CONSUMER.CREATE.{}.>",
                "CONSUMER.INFO.{}.>",
                "CONSUMER.DELETE.{}.>",
            ],
            &stream,
        );
        self.publish.push(format!("$JS.FC.{stream}.>"));
    }

    fn write(&self, text: &mut String, user: &str) {
        let _ = writeln!(
            text,
            "    {{ user: {user}, password: $MILLRACE_NATS_PASSWORD, permissions: {{"
        );
        for (name, subjects) in [("publish", &self.publish), ("subscribe", &self.subscribe)] {
            let _ = writeln!(text, "        {name}: {{ allow: [");
            for subject in subjects {
                let _ = writeln!(text, "          \"{subject}\"");
            }
            text.push_str("        ] }\n");
        }
        text.push_str("    } }\n");
    }
}

/// The users of each part, and one for a process that is all of them.
pub(super) fn permissions(config: &Config, as_comment: bool) -> String {
    let source = &config.source.name;
    let capture = capture(config);
    let mut all = operator(source).and(self::capture(config));
    let mut users = Vec::new();
    for sink in &config.sinks {
        all = all.and(self::sink(source, &sink.name));
        users.push((
            format!("millrace_{source}_sink_{}", sink.name),
            self::sink(source, &sink.name),
        ));
    }
    let mut text = String::from(
        "# NATS: merge this into the configuration of every server. The first user is for a process that is\n\
         # everything at once (`millrace run` without --only) and for `millrace status`, `millrace backfill`\n\
         # and `millrace drop`; the others are for --only capture and --only sink:NAME. Nkeys and credentials\n\
         # take the same permissions. With accounts, the users belong into one that has JetStream.\n\
         authorization {\n  users: [\n",
    );
    all.write(&mut text, &format!("millrace_{source}"));
    capture.write(&mut text, &format!("millrace_{source}_capture"));
    for (user, permissions) in users {
        permissions.write(&mut text, &user);
    }
    text.push_str("  ]\n}\n");
    if !as_comment {
        return text;
    }
    // Between SQL scripts it must not be taken for SQL.
    text.lines().map(|line| format!("-- {line}\n")).collect()
}

fn capture(config: &Config) -> Permissions {
    let source = &config.source.name;
    let mut permissions = Permissions::default();
    permissions.publish.push(subject::all(source));
    permissions.publish.push("$JS.API.INFO".to_owned());
    let stream = subject::stream_name(source);
    let requests = [
        "STREAM.INFO.{}",
        "STREAM.CREATE.{}",
        "STREAM.UPDATE.{}",
        "STREAM.PURGE.{}",
        "STREAM.MSG.GET.{}",
    ];
    permissions.api(&requests, &stream);
    for sink in &config.sinks {
        permissions
            .publish
            .push(subject::copy_all(source, &sink.name));
        let copy = subject::copy_stream_name(source, &sink.name);
        permissions.api(&requests, &copy);
        permissions.api(&["STREAM.DELETE.{}"], &copy);
    }
    for kind in [work::SCHEMAS, work::SINKS, work::COPIES, work::STATE] {
        let bucket = subject::bucket_name(source, kind);
        permissions.api(&["STREAM.CREATE.{}"], &format!("KV_{bucket}"));
        permissions.read_bucket(&bucket);
        permissions.publish.push(format!("$KV.{bucket}.>"));
    }
    permissions.replies(CAPTURE_INBOX);
    permissions
}

fn sink(source: &str, sink: &str) -> Permissions {
    let mut permissions = Permissions::default();
    permissions.publish.push("$JS.API.INFO".to_owned());
    permissions.consume(&subject::stream_name(source));
    permissions.consume(&subject::copy_stream_name(source, sink));
    for kind in [work::SCHEMAS, work::SINKS, work::COPIES] {
        permissions.read_bucket(&subject::bucket_name(source, kind));
    }
    let sinks = subject::bucket_name(source, work::SINKS);
    let copies = subject::bucket_name(source, work::COPIES);
    permissions.publish.push(format!("$KV.{sinks}.{sink}"));
    permissions.publish.push(format!("$KV.{copies}.*.{sink}"));
    permissions.replies(&format!("_INBOX_millrace_sink_{sink}"));
    permissions
}

/// What `drop` needs beyond what capture may do. `backfill` needs nothing more: capture may write the copies'
/// bucket.
fn operator(source: &str) -> Permissions {
    let mut permissions = Permissions::default();
    permissions.publish.push("$JS.API.STREAM.NAMES".to_owned());
    permissions.api(&["STREAM.DELETE.{}"], &subject::stream_name(source));
    for kind in [work::SCHEMAS, work::SINKS, work::COPIES, work::STATE] {
        let bucket = subject::bucket_name(source, kind);
        permissions.api(&["STREAM.DELETE.{}"], &format!("KV_{bucket}"));
    }
    permissions.subscribe.push(format!("{INBOX}.>"));
    permissions
}
