//! Where Postgres' binaries are.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::LabError;

const PACKAGES: &str = "/usr/lib/postgresql";
const REMEDY: &str = "run `make setup`, or `apt-get install postgresql`, or set MILLRACE_PG_BIN \
                      to the folder that holds initdb and postgres";

/// One installed server.
#[derive(Clone, Debug)]
pub(crate) struct Binaries {
    dir: PathBuf,
    version: String,
}

impl Binaries {
    pub(crate) fn find(chosen: Option<&Path>) -> Result<Self, LabError> {
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
        let output = Command::new(dir.join("postgres"))
            .arg("--version")
            .output()
            .map_err(LabError::io(format!("run {}/postgres", dir.display())))?;
        let version = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        Ok(Self { dir, version })
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
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
