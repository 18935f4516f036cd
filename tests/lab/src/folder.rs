//! Writes the product's configuration folders, as text.

use std::fs;
use std::path::Path;

use crate::error::LabError;
use crate::place::Place;

/// A configuration in the making. Pieces named `toml` are lines of the section they belong to.
#[derive(Clone, Debug)]
pub struct ConfigDir {
    source: String,
    stream: String,
    admin: String,
    log: String,
    sinks: String,
    rest: String,
    tables: Vec<(String, String)>,
}

impl ConfigDir {
    /// One source and one broker; the admin server takes a free port, the log is JSON.
    #[must_use]
    pub fn new(source_name: &str, source_url: &str, nats_url: &str) -> Self {
        Self {
            source: format!(
                "name = {}\nurl = {}\n",
                quoted(source_name),
                quoted(source_url)
            ),
            stream: format!("servers = [{}]\n", quoted(nats_url)),
            admin: "listen = \"127.0.0.1:0\"\n".into(),
            log: "format = \"json\"\n".into(),
            sinks: String::new(),
            rest: String::new(),
            tables: Vec::new(),
        }
    }

    /// Adds a Postgres sink.
    #[must_use]
    pub fn sink(self, name: &str, url: &str) -> Self {
        self.sink_with(name, url, "")
    }

    /// Adds a Postgres sink with further lines.
    #[must_use]
    pub fn sink_with(mut self, name: &str, url: &str, toml: &str) -> Self {
        let url = quoted(url);
        self.sinks.push_str(&format!(
            "\n[sinks.{name}]\ntype = \"postgres\"\nurl = {url}\n{toml}\n"
        ));
        self
    }

    /// Adds a table (`schema.table`) with the content of its file; empty is fine.
    #[must_use]
    pub fn table(mut self, name: &str, toml: &str) -> Self {
        self.tables.push((name.to_owned(), toml.to_owned()));
        self
    }

    /// Further lines of `[source]`.
    #[must_use]
    pub fn source(mut self, toml: &str) -> Self {
        self.source.push_str(&format!("{toml}\n"));
        self
    }

    /// Further lines of `[stream]`.
    #[must_use]
    pub fn stream(mut self, toml: &str) -> Self {
        self.stream.push_str(&format!("{toml}\n"));
        self
    }

    /// Further lines of `[log]`.
    #[must_use]
    pub fn log(mut self, toml: &str) -> Self {
        self.log.push_str(&format!("{toml}\n"));
        self
    }

    /// Another `admin.listen` than a free port.
    #[must_use]
    pub fn listen(mut self, address: &str) -> Self {
        self.admin = format!("listen = {}\n", quoted(address));
        self
    }

    /// Further sections: `[defaults]` and what else there is.
    #[must_use]
    pub fn section(mut self, toml: &str) -> Self {
        self.rest.push_str(&format!("\n{toml}\n"));
        self
    }

    /// The text of `millrace.toml`.
    #[must_use]
    pub fn text(&self) -> String {
        format!(
            "[source]\n{}\n[stream]\n{}\n[admin]\n{}\n[log]\n{}{}{}",
            self.source, self.stream, self.admin, self.log, self.sinks, self.rest
        )
    }

    /// Writes the folder to a place of its own.
    ///
    /// # Errors
    ///
    /// Fails when the temporary folder cannot be written.
    pub fn write(&self) -> Result<ConfigFolder, LabError> {
        let place = Place::new()?;
        self.write_to(place.path())?;
        Ok(ConfigFolder { place })
    }

    /// Writes or rewrites the files of an existing folder; tables not named any more are removed.
    ///
    /// # Errors
    ///
    /// Fails when the folder cannot be written.
    pub fn write_to(&self, dir: &Path) -> Result<(), LabError> {
        let what = || format!("write the configuration in {}", dir.display());
        let tables = dir.join("tables");
        if tables.is_dir() {
            fs::remove_dir_all(&tables).map_err(LabError::io(what()))?;
        }
        fs::create_dir_all(&tables).map_err(LabError::io(what()))?;
        fs::write(dir.join("millrace.toml"), self.text()).map_err(LabError::io(what()))?;
        for (name, toml) in &self.tables {
            fs::write(tables.join(format!("{name}.toml")), toml).map_err(LabError::io(what()))?;
        }
        Ok(())
    }
}

/// A written configuration; removed when it is dropped.
#[derive(Debug)]
pub struct ConfigFolder {
    place: Place,
}

impl ConfigFolder {
    /// What `-c` takes.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.place.path()
    }
}

/// A TOML basic string: JSON's escapes are a subset of TOML's.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_holds_what_was_said() {
        let config = ConfigDir::new("shop", "postgres://u:a\"b@h/db", "nats://n")
            .stream("confirm = \"acked\"")
            .sink_with("warehouse", "postgres://t/db", "required = false")
            .table("public.orders", "")
            .table("public.customers", "key = [\"id\"]");
        let folder = config.write().unwrap();
        let text = fs::read_to_string(folder.path().join("millrace.toml")).unwrap();
        assert!(
            text.contains("url = \"postgres://u:a\\\"b@h/db\""),
            "{text}"
        );
        assert!(
            text.contains("servers = [\"nats://n\"]\nconfirm = \"acked\"\n"),
            "{text}"
        );
        assert!(
            text.contains("[sinks.warehouse]\ntype = \"postgres\""),
            "{text}"
        );
        assert!(folder.path().join("tables/public.orders.toml").exists());

        ConfigDir::new("shop", "a", "b")
            .write_to(folder.path())
            .unwrap();
        assert!(!folder.path().join("tables/public.orders.toml").exists());
    }
}
