//! Prepared clusters: initdb takes a second or more, a copy of its result a few milliseconds.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::unistd::Uid;
use rand::Rng as _;
use tokio::sync::Mutex;

use super::binaries::Binaries;
use crate::error::LabError;
use crate::place::{Account, Place, copy_tree};

const PASSWORD_LENGTH: usize = 24;
const PASSWORD_FILE: &str = "password";

/// Within one process a template is built once; between processes the rename decides.
static BUILDING: Mutex<()> = Mutex::const_new(());

/// Puts a fresh cluster at `data` and returns its superuser's password.
pub(super) async fn provide(
    binaries: &Binaries,
    account: Option<Account>,
    data: &Path,
    own_identity: bool,
) -> Result<String, LabError> {
    if own_identity {
        return in_background(binaries, account, data, initdb).await;
    }
    let _building = BUILDING.lock().await;
    in_background(binaries, account, data, copied).await
}

type Make = fn(&Binaries, Option<Account>, &Path) -> Result<String, LabError>;

async fn in_background(
    binaries: &Binaries,
    account: Option<Account>,
    data: &Path,
    make: Make,
) -> Result<String, LabError> {
    let (binaries, data) = (binaries.clone(), data.to_path_buf());
    tokio::task::spawn_blocking(move || make(&binaries, account, &data))
        .await
        .map_err(|error| LabError::Unexpected(format!("preparing a cluster: {error}")))?
}

fn copied(binaries: &Binaries, account: Option<Account>, data: &Path) -> Result<String, LabError> {
    let template = cache_dir().join(name(binaries));
    if !template.is_dir() {
        build(binaries, account, &template)?;
    }
    copy_tree(&template.join("data"), data)?;
    fs::read_to_string(template.join(PASSWORD_FILE))
        .map_err(LabError::io("read the prepared cluster's password"))
}

fn build(binaries: &Binaries, account: Option<Account>, template: &Path) -> Result<(), LabError> {
    // initdb may run as another user, who cannot reach the cache: it works in a lab folder.
    let place = Place::new()?;
    let data = place.path().join("data");
    let password = initdb(binaries, account, &data)?;
    let parent = cache_dir();
    fs::create_dir_all(&parent).map_err(LabError::io(format!("make {}", parent.display())))?;
    let half = tempfile::Builder::new()
        .prefix("half-")
        .tempdir_in(&parent)
        .map_err(LabError::io(format!("write in {}", parent.display())))?;
    copy_tree(&data, &half.path().join("data"))?;
    fs::write(half.path().join(PASSWORD_FILE), password)
        .map_err(LabError::io("write the prepared cluster's password"))?;
    match fs::rename(half.path(), template) {
        Ok(()) => {
            // It has another name now: nothing is left to remove.
            let _ = half.keep();
            Ok(())
        }
        // Another process was faster; ours goes.
        Err(_) if template.is_dir() => Ok(()),
        Err(error) => Err(LabError::io(format!("make {}", template.display()))(error)),
    }
}

fn initdb(binaries: &Binaries, account: Option<Account>, data: &Path) -> Result<String, LabError> {
    let password: String = rand::rng()
        .sample_iter(rand::distr::Alphanumeric)
        .take(PASSWORD_LENGTH)
        .map(char::from)
        .collect();
    Account::make_dir(account, data)?;
    let secret = data.with_extension("password");
    fs::write(&secret, &password).map_err(LabError::io("write the password file"))?;
    if let Some(account) = account {
        chown(&secret, Some(account.uid), Some(account.gid))
            .map_err(LabError::io("hand over the password file"))?;
    }
    let mut command = Command::new(binaries.path("initdb"));
    command
        .args([
            "--username=postgres",
            "--auth=scram-sha-256",
            "--encoding=UTF8",
            "--locale=C",
        ])
        .arg("--no-sync")
        .arg(format!("--pwfile={}", secret.display()))
        .arg("-D")
        .arg(data)
        .env("LC_ALL", "C")
        .current_dir("/")
        .stdin(Stdio::null());
    if let Some(account) = account {
        command.uid(account.uid).gid(account.gid);
    }
    let output = command.output().map_err(LabError::io("run initdb"))?;
    let _ = fs::remove_file(&secret);
    if output.status.success() {
        return Ok(password);
    }
    Err(LabError::Process {
        what: "initdb".into(),
        output: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

/// One template for each server, and for each user: a cluster is readable by its owner alone.
fn name(binaries: &Binaries) -> String {
    let mut hasher = DefaultHasher::new();
    (binaries.version(), binaries.dir()).hash(&mut hasher);
    format!(
        "postgres-{}-uid{}-{:016x}",
        binaries.major(),
        Uid::effective(),
        hasher.finish()
    )
}

/// `target/lab-cache` of the workspace that built us; elsewhere the system's temporary folder.
fn cache_dir() -> PathBuf {
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target");
    let writable = tempfile::tempfile_in(&target).is_ok();
    let base = if writable {
        target
    } else {
        std::env::temp_dir()
    };
    base.join("lab-cache")
}
