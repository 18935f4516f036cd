//! Where Postgres' binaries are.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use crate::error::LabError;
use crate::place::{Account, Place, copy_tree};

const PACKAGES: &str = "/usr/lib/postgresql";
const REMEDY: &str = "run `make setup`, or `apt-get install postgresql`, or set MILLRACE_PG_BIN \
                      to the folder that holds initdb and postgres";

/// Servers that lie where only this user can go, as another user can run them. Removed like every place.
static LENT: Mutex<BTreeMap<PathBuf, Place>> = Mutex::new(BTreeMap::new());

/// One installed server.
#[derive(Clone, Debug)]
pub(crate) struct Binaries {
    /// Where it was found.
    dir: PathBuf,
    /// Where it runs from: the same, or a copy that the servers' account can reach.
    run_dir: PathBuf,
    version: String,
}

impl Binaries {
    /// The server in this folder, or of this major version, or the one that is used where nobody asks.
    pub(crate) fn find(chosen: Option<&Path>, major: Option<u32>) -> Result<Self, LabError> {
        match (chosen, major) {
            (None, Some(major)) => Self::of_major(major),
            _ => Self::in_use(chosen),
        }
    }

    fn in_use(chosen: Option<&Path>) -> Result<Self, LabError> {
        let named = chosen
            .map(Path::to_path_buf)
            .or_else(|| std::env::var_os("MILLRACE_PG_BIN").map(PathBuf::from));
        let dir = match named {
            Some(dir) if complete(&dir) => dir,
            Some(dir) => {
                return Err(LabError::Missing {
                    what: format!("{} holds no initdb and postgres", dir.display()),
                    remedy: REMEDY.into(),
                });
            }
            None => newest_package()
                .or_else(on_path)
                .ok_or_else(|| LabError::Missing {
                    what: "postgres is not installed".into(),
                    remedy: REMEDY.into(),
                })?,
        };
        Self::at(dir)
    }

    /// Looked for where `setup.sh` looks, in its order.
    fn of_major(major: u32) -> Result<Self, LabError> {
        let variable = format!("MILLRACE_PG{major}_BIN");
        let missing = |what: String| LabError::Missing {
            what,
            remedy: format!(
                "run `make setup-tests`, or set {variable} to the folder that holds its initdb and postgres"
            ),
        };
        if let Some(dir) = std::env::var_os(&variable).map(PathBuf::from) {
            return Some(&dir)
                .filter(|dir| complete(dir))
                .and_then(|dir| Self::at(dir.clone()).ok())
                .filter(|binaries| binaries.major() == major)
                .ok_or_else(|| missing(format!("{} holds no Postgres {major}", dir.display())));
        }
        let named = std::env::var_os("MILLRACE_PG_BIN").map(PathBuf::from);
        let package = Path::new(PACKAGES).join(major.to_string()).join("bin");
        let fetched = crate::place::tools(&format!("postgres-{major}/bin"));
        [named, Some(package), fetched]
            .into_iter()
            .flatten()
            .filter(|dir| complete(dir))
            .filter_map(|dir| Self::at(dir).ok())
            .find(|binaries| binaries.major() == major)
            .ok_or_else(|| missing(format!("Postgres {major} is not installed")))
    }

    fn at(dir: PathBuf) -> Result<Self, LabError> {
        let output = Command::new(dir.join("postgres"))
            .arg("--version")
            .output()
            .map_err(LabError::io(format!("run {}/postgres", dir.display())))?;
        let version = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        Ok(Self {
            run_dir: dir.clone(),
            dir,
            version,
        })
    }

    /// The same server where the account that runs it can reach it: a checkout may lie in a folder of this
    /// user's alone.
    pub(crate) fn within_reach_of(mut self, account: Option<Account>) -> Result<Self, LabError> {
        if account.is_none() || open_to_all(&self.dir) {
            return Ok(self);
        }
        // `bin`, `lib` and `share` belong together.
        let Some(installation) = self.dir.parent() else {
            return Ok(self);
        };
        let mut lent = LENT.lock().unwrap_or_else(PoisonError::into_inner);
        if !lent.contains_key(&self.dir) {
            let place = Place::new()?;
            copy_tree(installation, &place.path().join("postgres"))?;
            lent.insert(self.dir.clone(), place);
        }
        self.run_dir = lent[&self.dir].path().join("postgres/bin");
        Ok(self)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.run_dir.join(name)
    }

    /// The whole line of `postgres --version`.
    pub(crate) fn version(&self) -> &str {
        &self.version
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(crate) fn major(&self) -> u32 {
        self.version
            .split_whitespace()
            .nth(2)
            .map(|number| {
                number
                    .chars()
                    .take_while(char::is_ascii_digit)
                    .collect::<String>()
            })
            .and_then(|digits| digits.parse().ok())
            .unwrap_or(0)
    }
}

fn complete(dir: &Path) -> bool {
    dir.join("initdb").is_file() && dir.join("postgres").is_file()
}

/// Whether any user can go there.
fn open_to_all(dir: &Path) -> bool {
    let open = |dir: &Path| {
        std::fs::metadata(dir).is_ok_and(|meta| meta.permissions().mode() & 0o001 != 0)
    };
    std::fs::canonicalize(dir).is_ok_and(|dir| dir.ancestors().all(open))
}

fn newest_package() -> Option<PathBuf> {
    std::fs::read_dir(PACKAGES)
        .ok()?
        .flatten()
        .filter_map(|entry| {
            let major: u32 = entry.file_name().to_str()?.parse().ok()?;
            let dir = entry.path().join("bin");
            complete(&dir).then_some((major, dir))
        })
        .max()
        .map(|(_, dir)| dir)
}

fn on_path() -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).find(|dir| complete(dir))
}
