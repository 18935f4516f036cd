//! The HTTP endpoint of a running process: health, metrics, and what it knows of itself.

mod board;
mod caller;
mod http;
mod live;
mod metrics;

pub(crate) use board::Board;
pub(crate) use http::{Asked, Reloaded, bind, serve};
pub(crate) use live::{Live, LivePart, lag_seconds};
pub(crate) use metrics::{forget_lag, install, upkeep};
