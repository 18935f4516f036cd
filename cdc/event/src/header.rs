//! Names of the headers that a message may carry.

/// The position of a chunked message (32 hexadecimal digits): its payload alone does not tell.
pub const POSITION: &str = "Millrace-Position";

/// Which part of a chunked message this is: `<i>/<n>/<publisher>`, `i` from 1.
pub const CHUNK: &str = "Millrace-Chunk";

/// On the first message of a publisher that begins: a position (32 hexadecimal digits). Everything above it is written
/// from this message on, in order. Its `Nats-Expected-Last-Sequence` says that nothing came between.
pub const AFTER: &str = "Millrace-After";

/// On a copy stream: which request the rows belong to, `<request>/<attempt>`.
pub const COPY: &str = "Millrace-Copy";

/// On a copy stream: the message's number in its attempt, from 1 and without gaps.
pub const COPY_NUMBER: &str = "Millrace-Copy-Number";

/// On a copy stream, with rows of a chunk or of keys, and with the message that says that they are a whole: its sink
/// applies them once it has applied the stream up to this LSN (`X/X`), in the epoch of the rows' versions or of
/// `Copied`. By then the stream has told of all that the chunk's snapshot shows, also that there are no rows.
pub const COPY_REACH: &str = "Millrace-Copy-Reach";
