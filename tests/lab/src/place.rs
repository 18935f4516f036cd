//! Folders of the laboratory: each belongs to one process and is swept once that process is gone.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Once;

use nix::unistd::{Uid, User};
use tempfile::TempDir;

use crate::error::LabError;
use crate::process;

const PREFIX: &str = "millrace-lab-";
const OWNER_FILE: &str = "owner";
/// A unix socket's path has 107 bytes: past this a folder cannot hold one.
const BASE_LENGTH_MAX: usize = 60;

static SWEEP: Once = Once::new();

/// A temporary folder, removed when it is dropped; what a killed run left is removed by the next.
#[derive(Debug)]
pub struct Place {
    dir: TempDir,
}

impl Place {
    /// Makes an empty folder, after removing those whose owner is dead.
    ///
    /// # Errors
    ///
    /// Fails when the system's temporary folder cannot be written.
    pub fn new() -> Result<Self, LabError> {
        let base = base();
        SWEEP.call_once(|| sweep(&base));
        let dir = tempfile::Builder::new()
            .prefix(PREFIX)
            .tempdir_in(&base)
            .map_err(LabError::io(format!("make a folder in {}", base.display())))?;
        // A server that runs as another user must be able to pass through.
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755))
            .map_err(LabError::io("open the lab folder to its servers"))?;
        fs::write(
            dir.path().join(OWNER_FILE),
            process::identity(std::process::id()),
        )
        .map_err(LabError::io("write the lab folder's owner"))?;
        Ok(Self { dir })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

/// What `.tools` of the nearest folder that has it holds under this name.
pub(crate) fn tools(name: &str) -> Option<PathBuf> {
    let here = std::env::current_dir().unwrap_or_default();
    here.ancestors()
        .chain(Path::new(env!("CARGO_MANIFEST_DIR")).ancestors())
        .map(|dir| dir.join(".tools").join(name))
        .find(|path| path.exists())
}

/// The account that runs Postgres, which refuses to run as root.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Account {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

impl Account {
    /// `None` when this process is not root: then servers run as its own user.
    pub(crate) fn for_servers() -> Result<Option<Self>, LabError> {
        if !Uid::effective().is_root() {
            return Ok(None);
        }
        for name in ["postgres", "nobody"] {
            if let Ok(Some(user)) = User::from_name(name) {
                return Ok(Some(Self {
                    uid: user.uid.as_raw(),
                    gid: user.gid.as_raw(),
                }));
            }
        }
        Err(LabError::Missing {
            what: "postgres refuses to run as root and there is no user postgres or nobody".into(),
            remedy: "run as an ordinary user".into(),
        })
    }

    /// Makes a folder that belongs to the account (to this process where it is `None`).
    pub(crate) fn make_dir(account: Option<Self>, path: &Path) -> Result<(), LabError> {
        let what = || format!("make {}", path.display());
        fs::create_dir(path).map_err(LabError::io(what()))?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o700))
            .map_err(LabError::io(what()))?;
        if let Some(account) = account {
            chown(path, Some(account.uid), Some(account.gid)).map_err(LabError::io(what()))?;
        }
        Ok(())
    }
}

/// Copies a folder with owners and modes, sharing blocks where the file system can.
pub(crate) fn copy_tree(from: &Path, to: &Path) -> Result<(), LabError> {
    let reflink = Command::new("cp")
        .args(["-a", "--reflink=auto"])
        .arg(from)
        .arg(to)
        .output();
    if reflink.is_ok_and(|output| output.status.success()) {
        return Ok(());
    }
    let _ = fs::remove_dir_all(to);
    let output = Command::new("cp")
        .arg("-pR")
        .arg(from)
        .arg(to)
        .output()
        .map_err(LabError::io("run cp"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(LabError::Process {
        what: format!("cp {} {}", from.display(), to.display()),
        output: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

/// The last `lines` lines of a text file; empty when there is none.
pub(crate) fn tail(path: &Path, lines: usize) -> String {
    let text = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

fn base() -> PathBuf {
    let base = std::env::temp_dir();
    if base.as_os_str().len() > BASE_LENGTH_MAX {
        PathBuf::from("/tmp")
    } else {
        base
    }
}

/// Ends the servers and removes the folders of runs that are gone. Best effort: another user's
/// folders stay.
fn sweep(base: &Path) {
    let Ok(entries) = fs::read_dir(base) else {
        return;
    };
    for entry in entries.flatten() {
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        // A folder without an owner file is just being made.
        let Ok(owner) = fs::read_to_string(entry.path().join(OWNER_FILE)) else {
            continue;
        };
        if process::running(&owner).is_some() {
            continue;
        }
        for file in fs::read_dir(entry.path()).into_iter().flatten().flatten() {
            if file.path().extension().is_some_and(|ext| ext == "pid")
                && let Ok(identity) = fs::read_to_string(file.path())
            {
                process::kill_stale(&identity);
            }
        }
        let _ = fs::remove_dir_all(entry.path());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_owners_folder_and_server_are_swept() {
        let base = tempfile::tempdir().unwrap();
        let stale = base.path().join("millrace-lab-stale");
        fs::create_dir(&stale).unwrap();
        fs::write(stale.join(OWNER_FILE), "1 not-its-start-time").unwrap();
        let mut server = Command::new("sleep").arg("60").spawn().unwrap();
        fs::write(stale.join("server.1.pid"), process::identity(server.id())).unwrap();
        let live = base.path().join("millrace-lab-live");
        fs::create_dir(&live).unwrap();
        fs::write(live.join(OWNER_FILE), process::identity(std::process::id())).unwrap();

        sweep(base.path());

        assert!(!stale.exists());
        assert!(live.exists());
        assert!(
            !server.wait().unwrap().success(),
            "the stale server was killed"
        );
    }
}
