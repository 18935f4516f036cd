//! Channel binding of type `tls-server-end-point` (RFC 5929): a hash of the server's certificate.

use ring::digest::{self, Algorithm, SHA256, SHA384, SHA512};

const SEQUENCE: u8 = 0x30;
const OBJECT_IDENTIFIER: u8 = 0x06;

/// 1.2.840.113549.1.1, RSA signatures, without its last arc.
const RSA: &[u8] = &[0x2A, 0x86, 0x48, 0x86, 0xF7, 0x0D, 0x01, 0x01];
/// 1.2.840.10045.4, ECDSA signatures, without its last arcs.
const ECDSA: &[u8] = &[0x2A, 0x86, 0x48, 0xCE, 0x3D, 0x04];
/// 2.16.840.1.101.3.4.2, the SHA-2 hashes, without its last arc.
const SHA2: &[u8] = &[0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02];

/// The hash of a DER certificate by the hash of its own signature, SHA-256 in place of MD5 and SHA-1. None if the
/// certificate cannot be read or its signature has no such hash (Ed25519): then there is no channel binding.
#[must_use]
pub fn server_end_point(certificate: &[u8]) -> Option<Vec<u8>> {
    let algorithm = signature_hash(certificate)?;
    Some(digest::digest(algorithm, certificate).as_ref().to_vec())
}

/// `Certificate ::= SEQUENCE { tbsCertificate SEQUENCE, signatureAlgorithm SEQUENCE { OID, parameters }, .. }`
fn signature_hash(certificate: &[u8]) -> Option<&'static Algorithm> {
    let (body, _) = element(certificate, SEQUENCE)?;
    let (_, after) = element(body, SEQUENCE)?;
    let (algorithm, _) = element(after, SEQUENCE)?;
    let (identifier, parameters) = element(algorithm, OBJECT_IDENTIFIER)?;
    if let Some(last) = identifier.strip_prefix(RSA) {
        return match last {
            // MD5 and SHA-1, RSASSA-PSS, and the SHA-2 family.
            [4 | 5] | [11] => Some(&SHA256),
            [10] => pss_hash(parameters),
            [12] => Some(&SHA384),
            [13] => Some(&SHA512),
            _ => None,
        };
    }
    match identifier.strip_prefix(ECDSA)? {
        // SHA-1, and the SHA-2 family.
        [1] | [3, 2] => Some(&SHA256),
        [3, 3] => Some(&SHA384),
        [3, 4] => Some(&SHA512),
        _ => None,
    }
}

/// The hash in the parameters of RSASSA-PSS comes first in them; none means SHA-1.
fn pss_hash(parameters: &[u8]) -> Option<&'static Algorithm> {
    let at = parameters
        .windows(SHA2.len())
        .position(|window| window == SHA2);
    match at.map(|at| parameters.get(at + SHA2.len())) {
        None | Some(Some(1)) => Some(&SHA256),
        Some(Some(2)) => Some(&SHA384),
        Some(Some(3)) => Some(&SHA512),
        Some(_) => None,
    }
}

/// The content of a DER element of that tag, and what follows it.
fn element(bytes: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (&found, rest) = bytes.split_first()?;
    let (&first, mut rest) = rest.split_first()?;
    let length = match first {
        short @ 0..=0x7F => usize::from(short),
        // The long form: this many bytes of length, big-endian.
        long => {
            let count = usize::from(long & 0x7F);
            let (digits, after) = rest.split_at_checked(count)?;
            rest = after;
            (1..=4).contains(&count).then_some(())?;
            digits
                .iter()
                .fold(0, |length, digit| length << 8 | usize::from(*digit))
        }
    };
    (found == tag).then(|| rest.split_at_checked(length))?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn der(tag: u8, content: &[u8]) -> Vec<u8> {
        let length = u16::try_from(content.len()).expect("short").to_be_bytes();
        [&[tag, 0x82], &length[..], content].concat()
    }

    fn certificate(prefix: &[u8], last: &[u8], parameters: &[u8]) -> Vec<u8> {
        let identifier = der(OBJECT_IDENTIFIER, &[prefix, last].concat());
        let algorithm = der(SEQUENCE, &[identifier, parameters.to_vec()].concat());
        let body = [der(SEQUENCE, &[7; 300]), algorithm, der(3, &[0; 64])].concat();
        der(SEQUENCE, &body)
    }

    #[test]
    fn the_hash_is_that_of_the_signature_and_never_a_weak_one() {
        let pss = |hash: u8| der(SEQUENCE, &[SHA2, &[hash]].concat());
        for (prefix, last, parameters, bytes) in [
            (RSA, &[4][..], vec![5, 0], 32),
            (RSA, &[5], vec![5, 0], 32),
            (RSA, &[11], vec![5, 0], 32),
            (RSA, &[12], vec![5, 0], 48),
            (RSA, &[13], vec![5, 0], 64),
            (RSA, &[10], der(SEQUENCE, &[]), 32),
            (RSA, &[10], pss(2), 48),
            (RSA, &[10], pss(3), 64),
            (ECDSA, &[1], vec![], 32),
            (ECDSA, &[3, 2], vec![], 32),
            (ECDSA, &[3, 3], vec![], 48),
            (ECDSA, &[3, 4], vec![], 64),
        ] {
            let certificate = certificate(prefix, last, &parameters);
            let hash = server_end_point(&certificate).expect("a hash");
            assert_eq!(hash.len(), bytes, "{last:?}");
        }
        // Ed25519 is 1.3.101.112.
        assert_eq!(
            server_end_point(&certificate(&[0x2B, 0x65], &[0x70], &[])),
            None
        );
    }

    #[test]
    fn what_is_cut_short_is_no_certificate() {
        let whole = certificate(RSA, &[11], &[5, 0]);
        for end in 0..310 {
            assert_eq!(server_end_point(&whole[..end]), None);
        }
        assert_eq!(server_end_point(&[SEQUENCE, 0x85, 1, 1, 1, 1, 1]), None);
        assert_eq!(server_end_point(&[SEQUENCE, 0xFF]), None);
    }
}
