//! A broker's operator mode: an operator, its accounts, and users who log in with a credentials file.

use std::time::{SystemTime, UNIX_EPOCH};

use data_encoding::BASE64URL_NOPAD;
use nkeys::KeyPair;
use serde_json::{Value, json};

/// The header of every token of NATS.
const HEADER: &str = r#"{"typ":"JWT","alg":"ed25519-nkey"}"#;

/// An operator with one account that has JetStream, and the system account that the broker asks for.
pub struct Operator {
    operator: KeyPair,
    account: KeyPair,
    system: KeyPair,
}

impl Default for Operator {
    fn default() -> Self {
        Self {
            operator: KeyPair::new_operator(),
            account: KeyPair::new_account(),
            system: KeyPair::new_account(),
        }
    }
}

impl Operator {
    /// The lines of the broker's configuration; without a user's credentials nobody gets in.
    #[must_use]
    pub fn config(&self) -> String {
        let operator = token(
            &self.operator,
            &self.operator,
            "lab operator",
            json!({ "type": "operator", "version": 2, "system_account": self.system.public_key() }),
        );
        let (account, system) = (
            self.account(&self.account, true),
            self.account(&self.system, false),
        );
        format!(
            "operator: {operator}\nsystem_account: {system_key}\nresolver: MEMORY\n\
             resolver_preload: {{\n  {account_key}: {account}\n  {system_key}: {system}\n}}\n",
            account_key = self.account.public_key(),
            system_key = self.system.public_key(),
        )
    }

    /// The content of a new user's credentials file: a token and the seed that proves it.
    #[must_use]
    pub fn credentials(&self, name: &str) -> String {
        let user = KeyPair::new_user();
        let claims = json!({
            "type": "user", "version": 2, "pub": {}, "sub": {}, "subs": -1, "data": -1, "payload": -1
        });
        let token = token(&self.account, &user, name, claims);
        let seed = user.seed().expect("made with its seed");
        format!(
            "-----BEGIN NATS USER JWT-----\n{token}\n------END NATS USER JWT------\n\n\
             -----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
        )
    }

    fn account(&self, account: &KeyPair, jetstream: bool) -> String {
        let storage = if jetstream { -1 } else { 0 };
        let claims = json!({
            "type": "account", "version": 2,
            "limits": {
                "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": true,
                "conn": -1, "leaf": -1, "mem_storage": storage, "disk_storage": storage,
                "streams": storage, "consumer": storage
            }
        });
        token(&self.operator, account, "lab account", claims)
    }
}

/// What `subject` is, in the issuer's word.
fn token(issuer: &KeyPair, subject: &KeyPair, name: &str, claims: Value) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let claims = json!({
        "jti": subject.public_key(), "iat": now.map_or(0, |since| since.as_secs()),
        "iss": issuer.public_key(), "sub": subject.public_key(), "name": name, "nats": claims
    });
    let encode = |bytes: &[u8]| BASE64URL_NOPAD.encode(bytes);
    let signed = format!(
        "{}.{}",
        encode(HEADER.as_bytes()),
        encode(claims.to_string().as_bytes())
    );
    let signature = issuer.sign(signed.as_bytes()).expect("made with its seed");
    format!("{signed}.{}", encode(&signature))
}
