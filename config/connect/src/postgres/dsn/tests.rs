use proptest::prelude::*;

use super::*;

fn parse(url: &str) -> Dsn {
    Dsn::parse(url).expect(url)
}

fn refused(url: &str) -> String {
    Dsn::parse(url).expect_err(url).to_string()
}

#[test]
fn a_url_and_pairs_say_the_same() {
    let options = "application_name=a%20b&connect_timeout=3&sslmode=require";
    let url = parse(&format!("postgres://u:p%40ss@h:5433/db?{options}"));
    let pairs = "user=u password='p@ss' host = h port=5433 dbname=db application_name='a b' \
                 connect_timeout=3 sslmode=require";
    for dsn in [url, parse(pairs)] {
        assert_eq!(dsn.address(), "h:5433/db");
        assert_eq!(dsn.config().get_user(), Some("u"));
        assert_eq!(dsn.config().get_password(), Some(b"p@ss".as_slice()));
        assert_eq!(dsn.config().get_application_name(), Some("a b"));
        assert_eq!(dsn.connect_timeout(), Duration::from_secs(3));
        assert_eq!(dsn.ssl_mode(), SslMode::Require);
    }
}

#[test]
fn defaults_are_filled_in() {
    let dsn = parse("postgresql://u@h");
    assert_eq!(dsn.address(), "h:5432/u");
    assert_eq!(dsn.ssl_mode(), SslMode::Prefer);
    assert_eq!(dsn.connect_timeout(), limits::POSTGRES_CONNECT_TIMEOUT);
    assert_eq!(
        dsn.config().get_tcp_user_timeout(),
        Some(&limits::TCP_USER_TIMEOUT)
    );
}

#[test]
fn hosts_ports_and_sockets() {
    assert_eq!(parse("postgres://u@a:1,b:2/d").address(), "a:1,b:2/d");
    assert_eq!(parse("postgres://u@a,b/d").address(), "a:5432,b:5432/d");
    assert_eq!(parse("postgres://u@[::1]:6/d").address(), "[::1]:6/d");
    assert_eq!(
        parse("postgres://u@%2Frun%2Fpg:7/d").address(),
        "/run/pg/.s.PGSQL.7/d"
    );
    assert_eq!(
        parse("postgres:///d?host=/run/pg&user=u").address(),
        "/run/pg/.s.PGSQL.5432/d"
    );
    assert_eq!(parse("hostaddr=::1 user=u").address(), "[::1]:5432/u");
    assert!(refused("host=a,b hostaddr=1.2.3.4 user=u").contains("hostaddr"));
    assert!(refused("host=a,b,c port=1,2 user=u").contains("port"));
    assert!(refused("user=u").contains("\"host\""));
    assert!(refused("host=h").contains("\"user\""));
}

#[test]
fn the_six_modes_check_what_libpq_checks() {
    use Attempt::{Plain, Tls, TlsIfOffered};
    let root = "&sslrootcert=/r.pem";
    let (nothing, chain, full) = (Verify::Nothing, Verify::Chain, Verify::Full);
    for (mode, with_root, verify, attempts) in [
        ("disable", false, nothing, &[Plain][..]),
        ("allow", false, nothing, &[Plain, Tls]),
        ("prefer", false, nothing, &[TlsIfOffered, Plain]),
        ("require", false, nothing, &[Tls]),
        ("require", true, chain, &[Tls]),
        ("verify-ca", true, chain, &[Tls]),
        ("verify-full", true, full, &[Tls]),
        ("verify-full", false, full, &[Tls]),
    ] {
        let suffix = if with_root { root } else { "" };
        let dsn = parse(&format!("postgres://u@h/d?sslmode={mode}{suffix}"));
        assert_eq!(dsn.tls().verify, verify, "{mode}");
        assert_eq!(dsn.attempts(), attempts, "{mode}");
        let roots = if with_root {
            Roots::File("/r.pem".into())
        } else {
            Roots::System
        };
        assert_eq!(dsn.tls().roots, roots);
    }
    assert_eq!(
        parse("postgres://u@h?sslrootcert=system").ssl_mode(),
        SslMode::VerifyFull
    );
    assert!(refused("postgres://u@h?sslrootcert=system&sslmode=require").contains("verify-full"));
    assert!(refused("postgres://u@h?sslmode=verify-ca").contains("sslrootcert"));
    assert!(refused("postgres://u@h?sslmode=maybe").contains("sslmode"));
    assert!(refused("postgres://u@h?sslnegotiation=direct").contains("sslnegotiation"));
    assert!(refused("postgres://u@h?sslcert=a").contains("sslkey"));
    let dsn = parse("postgres://u@h?sslcert=a&sslkey=b&sslnegotiation=direct&sslmode=require");
    assert_eq!(dsn.tls().identity, Some(("a".into(), "b".into())));
}

#[test]
fn what_is_wrong_is_named_and_no_password_is_shown() {
    assert_eq!(
        refused("postgres://u:hunter2@h/d?sslmod=require"),
        "unknown parameter \"sslmod\" in the Postgres URL"
    );
    assert_eq!(
        refused("postgres://u:hunter2@h/d?connect_timeout=5s"),
        "parameter \"connect_timeout\" of the Postgres URL is not valid"
    );
    for url in [
        "",
        "hunter2",
        "mysql://u:hunter2@h/d",
        "postgres://u:hunter2@h:x/d",
        "a b=hunter2",
    ] {
        assert!(!refused(url).contains("hunter2"), "{url}");
    }
    for url in [
        "postgres://u@h?x",
        "postgres://u@h?a=%2",
        "host=h user='u",
        "postgres://u@h?a=%ff",
    ] {
        assert_eq!(Dsn::parse(url).expect_err(url), DsnError::Syntax);
    }
    let dsn = parse("postgres://u:hunter2@h:1/d?sslmode=disable");
    assert_eq!(format!("{dsn} {dsn:?}"), "h:1/d Dsn(h:1/d)");
}

#[test]
fn a_password_may_hold_a_question_mark() {
    let dsn = parse("postgres://u:a?b=c@h/d?sslmode=disable");
    assert_eq!(dsn.config().get_password(), Some(b"a?b=c".as_slice()));
    assert_eq!(dsn.ssl_mode(), SslMode::Disable);
}

proptest! {
    #[test]
    fn any_value_survives_both_forms(value in "[^\\x00]{1,20}") {
        let quoted = value.replace('\\', "\\\\").replace('\'', "\\'");
        let dsn = parse(&format!("host=h user='{quoted}' sslmode='require'"));
        prop_assert_eq!(dsn.config().get_user(), Some(value.as_str()));
        let encoded: String = value.bytes().map(|byte| format!("%{byte:02x}")).collect();
        let dsn = parse(&format!("postgres://h/d?user={encoded}&sslmode=require"));
        prop_assert_eq!(dsn.config().get_user(), Some(value.as_str()));
    }

    #[test]
    fn nothing_panics(text in "(postgres://)?[-a-z0-9=&?@:/'%\\\\ ]{0,40}") {
        let _ = Dsn::parse(&text);
    }
}
