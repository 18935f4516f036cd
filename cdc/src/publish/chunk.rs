//! Messages that are larger than the server takes: split into chunks that follow one another. Pure.

use async_nats::HeaderMap;
use bytes::Bytes;
use millrace_config::limits::ROW_BYTES_MAX;
use millrace_event::{Position, header};

/// What a chunk leaves free below the server's `max_payload`: its headers count as payload there.
pub const CHUNK_OVERHEAD_BYTES: usize = 16 * 1024;

/// Why a payload cannot travel.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChunkError {
    /// The row is larger than [`ROW_BYTES_MAX`].
    #[error("a row's event of {size} bytes is larger than the limit of {ROW_BYTES_MAX}")]
    RowTooLarge {
        /// The event's size in bytes.
        size: usize,
    },
    /// The server's `max_payload` leaves no room for a chunk.
    #[error("the server's max_payload of {max_payload} bytes is too small")]
    PayloadTooSmall {
        /// The server's limit in bytes.
        max_payload: usize,
    },
}

/// Splits a payload so that each part fits below the server's `max_payload` bytes: one part without headers
/// where it fits as it is, else chunks that name their position, their place and their publisher. Parts
/// share the payload's memory.
///
/// # Errors
/// [`ChunkError`], before anything is sent.
pub fn chunks(
    payload: &Bytes,
    position: Position,
    publisher: &str,
    max_payload: usize,
) -> Result<Vec<(Bytes, Option<HeaderMap>)>, ChunkError> {
    let size = payload.len();
    if size > ROW_BYTES_MAX {
        return Err(ChunkError::RowTooLarge { size });
    }
    let room = max_payload.saturating_sub(CHUNK_OVERHEAD_BYTES);
    if room == 0 {
        return Err(ChunkError::PayloadTooSmall { max_payload });
    }
    if size <= room {
        return Ok(vec![(payload.clone(), None)]);
    }
    let count = size.div_ceil(room);
    let parts = (0..count).map(|index| {
        let part = payload.slice(index * room..size.min((index + 1) * room));
        let mut headers = HeaderMap::new();
        headers.insert(header::POSITION, position.to_string());
        headers.insert(header::CHUNK, format!("{}/{count}/{publisher}", index + 1));
        (part, Some(headers))
    });
    Ok(parts.collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use millrace_event::Lsn;
    use proptest::prelude::*;

    const AT: Position = Position::new(1, Lsn(2), 3);

    #[test]
    fn a_payload_that_fits_travels_without_headers() {
        let payload = Bytes::from_static(b"0123456789");
        let parts = chunks(&payload, AT, "p", CHUNK_OVERHEAD_BYTES + 10);
        assert_eq!(parts, Ok(vec![(payload, None)]));
    }

    #[test]
    fn a_row_beyond_the_limit_is_refused() {
        let payload = Bytes::from(vec![0; ROW_BYTES_MAX + 1]);
        let refused = ChunkError::RowTooLarge {
            size: ROW_BYTES_MAX + 1,
        };
        assert_eq!(chunks(&payload, AT, "p", 1 << 20), Err(refused));
        let payload = Bytes::from_static(b"0");
        let refused = ChunkError::PayloadTooSmall {
            max_payload: CHUNK_OVERHEAD_BYTES,
        };
        assert_eq!(
            chunks(&payload, AT, "p", CHUNK_OVERHEAD_BYTES),
            Err(refused)
        );
    }

    proptest! {
        #[test]
        fn parts_put_together_are_the_payload(size in 1_usize..5_000, room in 1_usize..700) {
            let bytes: Vec<u8> = (0..size).map(|index| (index % 251) as u8).collect();
            let payload = Bytes::from(bytes);
            let parts = chunks(&payload, AT, "p", CHUNK_OVERHEAD_BYTES + room)?;
            let whole: Vec<u8> = parts.iter().flat_map(|(part, _)| part.to_vec()).collect();
            prop_assert_eq!(&whole[..], &payload[..]);
            let count = parts.len();
            for (index, (part, headers)) in parts.iter().enumerate() {
                prop_assert!(!part.is_empty() && part.len() <= room);
                let chunk = headers.as_ref().and_then(|headers| headers.get(header::CHUNK));
                let named = format!("{}/{count}/p", index + 1);
                prop_assert_eq!(chunk.map(|value| value.as_str()), (count > 1).then_some(&named[..]));
            }
        }
    }
}
