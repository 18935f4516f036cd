//! Reads a source's stream: every change once, in order, and never silently over a gap.
//!
//! A [`Reader`] follows the stream of one source from where it is told to start. It drops what it has seen (a
//! publisher that takes over sends the newest messages again), puts large messages together, survives lost
//! connections and brokers that lost the end of the stream, and stops with [`ReadError::Gap`] where what it needs is
//! gone. A service that stores [`Delivery::token`] together with its own data, in one transaction, applies every
//! change exactly once; one that cannot drops duplicates by the rows' versions. `examples/follow.rs` does.

mod chunks;
mod coverage;
mod delivery;
mod gate;
mod hole;
mod holes;
mod link;
mod position;
mod progress;
mod reader;
mod resume;
mod stored;

pub use delivery::{Body, Delivery, Token};
pub use reader::{Ordering, ReadError, Reader, ReaderOptions, Start};
