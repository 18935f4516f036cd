//! What is stored beside the stream, in KV buckets. A value that is there and is not understood is never taken for
//! none: what it said would be lost without a word.

use millrace_event::work;
use serde::de::DeserializeOwned;

use crate::{Code, Condition};

/// Reads the value of a key.
///
/// # Errors
/// It is not understood: the condition names the bucket and the key, and how an operator goes on.
pub fn understood<T: DeserializeOwned>(
    bucket: &str,
    key: &str,
    value: &[u8],
) -> Result<T, Condition> {
    serde_json::from_slice(value).map_err(|error| {
        Condition::new(
            Code::StoredUnreadable,
            format!("key {key} of bucket {bucket} is not understood: {error}"),
            format!(
                "look at it with `nats kv get {bucket} {key}`, and let the release read it that wrote it; or {}",
                without(bucket, key)
            ),
        )
    })
}

/// How an operator goes on without the value.
fn without(bucket: &str, key: &str) -> String {
    let remove = format!("remove it with `nats kv del {bucket} {key}`");
    let is_of = |kind: &str| bucket.ends_with(&format!("_{kind}"));
    if let Some(sink) = key.strip_prefix("orders.").filter(|_| is_of(work::COPIES)) {
        // Which tables it named is not known.
        return format!("{remove}, then run `millrace backfill start --all --sink {sink}`");
    }
    if is_of(work::STATE) {
        return "run `millrace drop`, then `millrace run`: the tables are copied again".to_owned();
    }
    format!("{remove}: it is written anew by itself")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_understood_is_named_with_its_remedy() {
        let refused = |kind: &str, key: &str| {
            let bucket = format!("MILLRACE_shop_{kind}");
            let found: Result<Vec<u32>, _> = understood(&bucket, key, b"[1, ");
            found.expect_err("cut off")
        };
        let condition = refused(work::COPIES, "orders.wh");
        assert_eq!(condition.code, Code::StoredUnreadable);
        let said = "key orders.wh of bucket MILLRACE_shop_copies is not understood: ";
        assert!(condition.message.starts_with(said), "{condition}");
        for (kind, key, remedy) in [
            (work::COPIES, "orders.wh", "start --all --sink wh`"),
            (
                work::COPIES,
                "status.wh",
                "nats kv del MILLRACE_shop_copies status.wh`: it is written",
            ),
            (
                work::SINKS,
                "wh",
                "nats kv del MILLRACE_shop_sinks wh`: it is written",
            ),
            (work::STATE, "published", "`millrace drop`"),
        ] {
            let said = refused(kind, key).remedy;
            assert!(said.contains(remedy), "{said}");
        }
        assert_eq!(understood("b", "k", b"[1]"), Ok(vec![1]));
    }
}
