//! The SQL sessions that read tables.

use millrace_connect::postgres::Session;

/// Their settings.
const OPTIONS: [(&str, &str); 2] = [
    // Their commits are heartbeats, and marks that they wait for: no synchronous standby need have them.
    ("synchronous_commit", "local"),
    // Where a policy would hide rows, an error says so: they would be missing in the replica.
    ("row_security", "off"),
];

pub(super) fn session() -> Session {
    Session {
        application_name: "millrace copy".to_owned(),
        options: OPTIONS
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .to_vec(),
    }
}
