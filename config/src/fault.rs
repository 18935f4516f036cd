//! What a caller does about an error.

/// How an error is handled; every crate maps its errors to this in one `match`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fault {
    /// Try again, for ever, with [`crate::Backoff`]: the world is expected to recover by itself.
    Transient,
    /// Set the row aside (or park its table) and go on: trying again gives the same answer for this input only.
    Poison,
    /// Halt and tell the operator: going on could lose or rewrite data, or can never succeed.
    Fatal,
}
