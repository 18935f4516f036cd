//! Who may ask the process to change something.
//!
//! The endpoint has no login, so the rule is about where a request comes from: this machine, and no web page. A page
//! that a browser on this machine shows can send a `POST` to any address. It cannot hide that it is a page: a browser
//! adds `Origin` or `Sec-Fetch-Site`, and a page that reached us by a name of its own that it made lead here (DNS
//! rebinding) has that name in `Host`. What only reads is open to all who reach the address.

use std::net::{IpAddr, SocketAddr};

use axum::extract::connect_info::Connected;
use axum::http::{HeaderMap, header};
use axum::serve::IncomingStream;
use tokio::net::TcpListener;

/// Both ends of a connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ends {
    /// Who called.
    pub(super) peer: IpAddr,
    /// At which of our addresses.
    pub(super) here: Option<IpAddr>,
}

impl Connected<IncomingStream<'_, TcpListener>> for Ends {
    fn connect_info(stream: IncomingStream<'_, TcpListener>) -> Self {
        let here = stream.io().local_addr().ok();
        Self {
            peer: stream.remote_addr().ip(),
            here: here.map(|here| here.ip()),
        }
    }
}

impl Ends {
    /// Whether both are this machine: one that listens at an address of its own is called from that address.
    fn are_one_machine(self) -> bool {
        self.peer.to_canonical().is_loopback() || self.here == Some(self.peer)
    }
}

/// Why a request may not change anything; `None`: it may.
pub(super) fn refusal(ends: Ends, headers: &HeaderMap) -> Option<&'static str> {
    if !ends.are_one_machine() {
        return Some(
            "it comes from another machine: run `millrace reload` on this one, or send SIGHUP",
        );
    }
    if headers.contains_key(header::ORIGIN) || headers.contains_key("sec-fetch-site") {
        return Some("it comes from a web page (it has an Origin or a Sec-Fetch-Site header)");
    }
    let named = headers.get_all(header::HOST).iter();
    let named = named.map(|host| host.to_str().unwrap_or_default());
    let mut others = named.filter(|host| !is_address(host));
    others
        .next()
        .map(|_| "its Host header is neither an IP address nor localhost")
}

/// Whether a host, with or without its port, is given by its address.
fn is_address(host: &str) -> bool {
    if host.parse::<SocketAddr>().is_ok() {
        return true;
    }
    let bare = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'));
    if bare.unwrap_or(host).parse::<IpAddr>().is_ok() {
        return true;
    }
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.parse::<u16>().is_ok() => name,
        _ => host,
    };
    name.eq_ignore_ascii_case("localhost")
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderName;

    use super::*;

    fn ends(peer: &str, here: &str) -> Ends {
        Ends {
            peer: peer.parse().expect("an address"),
            here: Some(here.parse().expect("an address")),
        }
    }

    fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            let name: HeaderName = name.parse().expect("a name");
            map.append(name, value.parse().expect("a value"));
        }
        map
    }

    #[test]
    fn only_this_machine_may_ask() {
        let none = HeaderMap::new();
        for (peer, here, may) in [
            ("127.0.0.1", "127.0.0.1", true),
            ("127.8.0.1", "127.0.0.1", true),
            ("::1", "::1", true),
            ("::ffff:127.0.0.1", "::ffff:127.0.0.1", true),
            ("10.0.0.7", "10.0.0.7", true),
            ("10.0.0.8", "10.0.0.7", false),
            ("172.17.0.1", "172.17.0.2", false),
            ("fe80::1", "::1", false),
        ] {
            assert_eq!(refusal(ends(peer, here), &none).is_none(), may, "{peer}");
        }
    }

    #[test]
    fn no_web_page_may_ask() {
        let local = ends("127.0.0.1", "127.0.0.1");
        for (pairs, may) in [
            (&[("Host", "127.0.0.1:9400")][..], true),
            (&[("host", "[::1]:9400")], true),
            (&[("host", "[::1]")], true),
            (&[("host", "10.0.0.7")], true),
            (&[("host", "LocalHost:9400")], true),
            (&[("host", "localhost")], true),
            (&[("host", "localhost.example:9400")], false),
            (&[("host", "127.0.0.1.example")], false),
            (&[("host", "rebound.example:9400")], false),
            (&[("host", "127.0.0.1"), ("host", "rebound.example")], false),
            (&[("host", "")], false),
            (
                &[("host", "127.0.0.1"), ("origin", "http://127.0.0.1")],
                false,
            ),
            (&[("host", "127.0.0.1"), ("origin", "null")], false),
            (&[("host", "127.0.0.1"), ("sec-fetch-site", "none")], false),
        ] {
            let map = headers(pairs);
            assert_eq!(refusal(local, &map).is_none(), may, "{pairs:?}");
        }
    }
}
