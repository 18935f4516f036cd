//! On a real server.

use super::*;

#[tokio::test]
async fn data_outlives_a_kill_and_the_port_stays() {
    let mut cluster = Postgres::start(PostgresOptions::default()).await.unwrap();
    cluster.create_database("shop").await.unwrap();
    let port = cluster.port();
    let client = cluster.connect("shop").await.unwrap();
    client
        .batch_execute("CREATE TABLE t (a int); INSERT INTO t VALUES (7)")
        .await
        .unwrap();

    cluster.kill9();
    assert!(cluster.connect("shop").await.is_err());
    cluster.start_again().await.unwrap();
    cluster.stop_fast().await.unwrap();
    cluster.start_again().await.unwrap();

    assert_eq!(cluster.port(), port);
    let client = cluster.connect("shop").await.unwrap();
    let row = client
        .query_one("SELECT a, current_setting('wal_level') FROM t", &[])
        .await
        .unwrap();
    assert_eq!(
        (row.get::<_, i32>(0), row.get::<_, &str>(1)),
        (7, "logical")
    );

    cluster.set("wal_sender_timeout", "5s").await.unwrap();
    let dir = cluster.data_dir();
    drop(cluster);
    assert!(!dir.exists());
}

#[tokio::test]
async fn a_server_that_cannot_start_says_why() {
    let settings = vec![("shared_buffers".to_owned(), "a lot".to_owned())];
    let options = PostgresOptions {
        settings,
        ..PostgresOptions::default()
    };
    let error = Postgres::start(options).await.unwrap_err().to_string();
    assert!(error.contains("shared_buffers"), "{error}");
}

#[tokio::test]
async fn a_folder_without_binaries_is_refused_with_the_remedy() {
    let options = PostgresOptions {
        bin: Some("/nowhere".into()),
        ..PostgresOptions::default()
    };
    let error = Postgres::start(options).await.unwrap_err().to_string();
    assert!(
        error.contains("/nowhere") && error.contains("make setup"),
        "{error}"
    );
}

#[tokio::test]
async fn a_server_of_the_asked_major_version_is_started() {
    for major in [15, 18] {
        let options = PostgresOptions {
            major: Some(major),
            ..PostgresOptions::default()
        };
        let cluster = Postgres::start(options).await.unwrap();
        assert_eq!(cluster.major(), major);
        let client = cluster.connect("postgres").await.unwrap();
        let row = client.query_one("SHOW server_version", &[]).await.unwrap();
        assert!(row.get::<_, &str>(0).starts_with(&format!("{major}.")));
    }
}

#[tokio::test]
async fn a_major_version_that_is_not_installed_is_refused_with_the_remedy() {
    let options = PostgresOptions {
        major: Some(9),
        ..PostgresOptions::default()
    };
    let error = Postgres::start(options).await.unwrap_err().to_string();
    assert!(
        error.contains("Postgres 9") && error.contains("MILLRACE_PG9_BIN"),
        "{error}"
    );
}

#[tokio::test]
async fn binaries_in_a_folder_of_this_user_alone_are_run_from_a_copy() {
    use std::os::unix::fs::PermissionsExt as _;

    let installed = Binaries::find(None, Some(18)).unwrap();
    let hidden = Place::new().unwrap();
    let installation = installed.dir().parent().unwrap();
    crate::place::copy_tree(installation, &hidden.path().join("server")).unwrap();
    fs::set_permissions(hidden.path(), fs::Permissions::from_mode(0o700)).unwrap();
    let options = PostgresOptions {
        bin: Some(hidden.path().join("server/bin")),
        own_identity: true,
        ..PostgresOptions::default()
    };
    let cluster = Postgres::start(options).await.unwrap();
    assert_eq!(cluster.major(), 18);
}
