//! How the tables' rows are laid out for the target as it is now. Everything that lays rows out asks here, and each
//! may have the target changed: what the others laid out before is fitted to it when it is applied.

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use millrace_config::{Code, Condition};
use millrace_event::{TableName, TableSchema, work};

use super::Life;
use crate::batch::Batch;
use crate::error::Error;
use crate::evolution::{self, Unfit};
use crate::row::{LayoutColumn, TableLayout};
use crate::sink::{Ensured, Sink};

/// How the target's tables were when they were last asked about.
#[derive(Default)]
pub(super) struct Layouts {
    fits: HashMap<TableName, Fit>,
    /// The tables that were found another way than before, since that was last asked for.
    changed: BTreeSet<TableName>,
}

/// A table of the target that takes a table's rows.
struct Fit {
    /// The newest schema, which the target was made to fit.
    latest: TableSchema,
    /// How its rows are laid out.
    layout: Arc<TableLayout>,
    /// The target's other columns.
    others: Vec<LayoutColumn>,
    /// How rows of other versions are laid out, by version, as far as it was asked for. They go when the table
    /// changes: there are as many as the stream holds versions of it, at most.
    versions: HashMap<String, Arc<TableLayout>>,
}

impl Fit {
    fn is_same(&self, other: &Self) -> bool {
        (&self.latest, &self.layout, &self.others) == (&other.latest, &other.layout, &other.others)
    }

    fn version(&self, version: &str) -> Option<&Arc<TableLayout>> {
        match version == self.latest.version {
            true => Some(&self.layout),
            false => self.versions.get(version),
        }
    }
}

impl Layouts {
    /// Takes note of a table as it is now.
    fn found(&mut self, table: &TableName, fit: Fit) {
        match self.fits.entry(table.clone()) {
            Entry::Occupied(known) if known.get().is_same(&fit) => {}
            Entry::Occupied(mut known) => {
                known.insert(fit);
                self.changed.insert(table.clone());
            }
            Entry::Vacant(entry) => {
                entry.insert(fit);
            }
        }
    }

    fn known(&self, table: &TableName, version: &str) -> Option<&Arc<TableLayout>> {
        self.fits.get(table)?.version(version)
    }
}

impl Life<'_> {
    /// The schema of a table: a version of it, or the latest.
    async fn schema(&self, table: &TableName, version: Option<&str>) -> Result<TableSchema, Error> {
        let key = match version {
            Some(version) => work::schema_version_key(table, version),
            None => work::schema_key(table),
        };
        let failed = |error| Error::retry("a table's schema cannot be read", error);
        let entry = self.schemas.get(&key).await.map_err(failed)?;
        let entry = entry.ok_or_else(|| Error::Waiting(format!("describe table {table}")))?;
        serde_json::from_slice(&entry)
            .map_err(|error| Error::retry("a table's schema cannot be understood", error))
    }

    /// Makes sure that the target can take a table's rows, and how those of a version, or the latest, are laid out.
    /// Nothing may be in flight.
    pub(crate) async fn layout(
        &mut self,
        table: &TableName,
        version: Option<&str>,
    ) -> Result<Arc<TableLayout>, Error> {
        // The target is made to fit the table as it is now: what an older version lacks, its rows lacked at the
        // source too, and names are those of now.
        let latest = self.schema(table, None).await?;
        let settings = self
            .tables
            .get(table)
            .copied()
            .expect("only this sink's tables are laid out");
        let before = match self.shapes.get(table).cloned() {
            Some(shape) if shape == latest.version => Some(latest.clone()),
            Some(shape) => self.known_schema(table, &shape).await?,
            None => None,
        };
        let Ensured {
            layout,
            warnings,
            created,
            others,
        } = self
            .sink()
            .ensure_table(&latest, before.as_ref(), settings)
            .await?;
        self.shapes.insert(table.clone(), latest.version.clone());
        for warning in &warnings {
            tracing::warn!(sink = %self.settings.name, %table, "{warning}");
        }
        if created {
            tracing::info!(sink = %self.settings.name, %table, target = %layout.target, "table created");
        }
        let wanted = version.unwrap_or(&latest.version).to_owned();
        let fit = Fit {
            latest,
            layout,
            others,
            versions: HashMap::new(),
        };
        self.layouts.found(table, fit);
        self.lay_out(table, &wanted).await
    }

    /// How rows of a version are laid out for a table of the target that was asked about.
    async fn lay_out(
        &mut self,
        table: &TableName,
        version: &str,
    ) -> Result<Arc<TableLayout>, Error> {
        if let Some(known) = self.layouts.known(table, version) {
            return Ok(Arc::clone(known));
        }
        let schema = self.schema(table, Some(version)).await?;
        let settings = self.tables.get(table).copied();
        let (Some(fit), Some(settings)) = (self.layouts.fits.get_mut(table), settings) else {
            unreachable!("the target was asked about table {table}")
        };
        let layout = &fit.layout;
        match evolution::lay_out(&schema, &fit.latest, layout, &fit.others, settings) {
            Ok(layout) => {
                let layout = Arc::new(layout);
                let known = Arc::clone(&layout);
                fit.versions.insert(version.to_owned(), known);
                Ok(layout)
            }
            Err(Unfit::TooNew) => Err(Error::Waiting(format!("describe table {table}"))),
            Err(Unfit::OtherKey) => Err(Error::Table {
                table: table.clone(),
                condition: Condition::new(
                    Code::KeyChanged,
                    format!(
                        "changes of table {table} from before its key was changed are left out"
                    ),
                    "nothing to do: the table is copied again by itself",
                ),
            }),
        }
    }

    /// A version that may not be known any more.
    async fn known_schema(
        &self,
        table: &TableName,
        version: &str,
    ) -> Result<Option<TableSchema>, Error> {
        match self.schema(table, Some(version)).await {
            Ok(schema) => Ok(Some(schema)),
            Err(Error::Waiting(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The layout of a version of a table, asked for once while the table stays as it is.
    pub(crate) async fn layout_of(
        &mut self,
        table: &TableName,
        version: &str,
    ) -> Result<Arc<TableLayout>, Error> {
        match self.layouts.known(table, version) {
            Some(known) => Ok(Arc::clone(known)),
            None => self.layout(table, Some(version)).await,
        }
    }

    /// Whether a layout is for the target's table as it is now.
    pub(crate) fn is_current(&self, layout: &Arc<TableLayout>) -> bool {
        let known = self.layouts.known(&layout.source, &layout.shape);
        known.is_some_and(|known| Arc::ptr_eq(known, layout))
    }

    /// The layout of the same version for the target's table as it is now.
    ///
    /// # Errors
    /// The table's key has changed; or the broker is away.
    pub(crate) async fn renewed(
        &mut self,
        layout: &Arc<TableLayout>,
    ) -> Result<Arc<TableLayout>, Error> {
        self.lay_out(&layout.source, &layout.shape).await
    }

    /// The tables of the target that were found another way than before, since this was last called.
    pub(crate) fn take_changed(&mut self) -> BTreeSet<TableName> {
        std::mem::take(&mut self.layouts.changed)
    }

    /// Has a batch's rows fit the target's tables as they are now. They were collected while something else may have
    /// asked for a newer version of their table.
    pub(super) async fn refit(&mut self, batch: &mut Batch) -> Result<(), Error> {
        while let Some(outdated) = batch.layout_that(|layout| !self.is_current(layout)) {
            let layout = self.renewed(&outdated).await?;
            batch
                .refit(&outdated, &layout)
                // Nothing of it is applied: the next life lays the changes out for the target as it is by then.
                .map_err(|error| Error::retry("collected changes do not fit the target", error))?;
        }
        Ok(())
    }
}
