//! A custom service: follows one table and drops what it has applied already, by the rows' versions.
//!
//! `cargo run -p millrace-consumer --example follow -- nats://127.0.0.1:4222 shop public.orders`

use std::collections::HashMap;
use std::error::Error;

use millrace_consumer::{Reader, ReaderOptions, Start};
use millrace_event::{TableName, Version};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [url, source, table] = &arguments[..] else {
        return Err("usage: follow NATS_URL SOURCE SCHEMA.TABLE".into());
    };
    let (schema, name) = table.split_once('.').ok_or("the table needs its schema")?;
    let jetstream = async_nats::jetstream::new(async_nats::connect(url).await?);

    let mut options = ReaderOptions::new(jetstream, source, Start::Beginning);
    options.tables = Some(vec![TableName::new(schema, name)]);
    let mut reader = Reader::open(options);

    // The newest version applied of every row. A service with a database keeps it beside the row instead.
    let mut applied: HashMap<String, Version> = HashMap::new();
    loop {
        for event in reader.next().await?.changes() {
            let event = event?;
            let Some(key) = &event.key else {
                println!("{:?} of the whole table", event.op);
                continue;
            };
            let newest = applied.entry(format!("{key:?}")).or_insert(Version::ZERO);
            if event.source.version > *newest {
                *newest = event.source.version;
                println!("{:?} {key:?} -> {:?}", event.op, event.after);
            }
        }
    }
}
