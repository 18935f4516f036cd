//! Creates what a target lacks of a table: its types, its schema, and itself.

use millrace_config::{Code, Create};
use millrace_event::{TableName, TypeSchema, quote_identifier};

use super::{Ensuring, Keyed, Wanted};
use crate::postgres::{labels, types};
use crate::sink::SinkError;
use crate::sql;

impl Ensuring<'_> {
    /// Creates the enums and domains that the target lacks, and the labels that its enums lack.
    pub(super) async fn create_types(&self, warnings: &mut Vec<String>) -> Result<(), SinkError> {
        for definition in &self.schema.types {
            let (TypeSchema::Enum { name, .. } | TypeSchema::Domain { name, .. }) = definition;
            let exists = self
                .text("SELECT to_regtype($1)::text", &name.quoted())
                .await?
                .is_some();
            if exists {
                if let (true, TypeSchema::Enum { labels, .. }) = (self.labels, definition) {
                    self.complete_labels(name, labels, warnings).await?;
                }
                continue;
            }
            self.create_schema(name).await?;
            let created = types::create(self.client, definition).await;
            created.map_err(|error| self.failed(error))?;
        }
        Ok(())
    }

    async fn complete_labels(
        &self,
        name: &TableName,
        labels: &[String],
        warnings: &mut Vec<String>,
    ) -> Result<(), SinkError> {
        let refused = labels::complete(self.client, name, labels).await;
        if let Some(reason) = refused.map_err(|error| self.failed(error))? {
            warnings.push(format!(
                "type {name} of table {} lacks labels in the target, where they cannot be added ({reason}): rows \
                 with them will be refused",
                self.schema.name
            ));
        }
        Ok(())
    }

    async fn create_schema(&self, of: &TableName) -> Result<(), SinkError> {
        let schema = quote_identifier(&of.schema);
        if self
            .text("SELECT to_regnamespace($1)::text", &schema)
            .await?
            .is_none()
        {
            let created = self
                .client
                .batch_execute(&format!("CREATE SCHEMA {schema}"))
                .await;
            created.map_err(|error| self.failed(error))?;
        }
        Ok(())
    }

    pub(super) async fn create_table(
        &self,
        wanted: &[Wanted],
        key: &[String],
    ) -> Result<(), SinkError> {
        let target = &self.settings.target;
        let columns: Vec<_> = wanted
            .iter()
            .map(|column| {
                (
                    column.target.clone(),
                    column.type_name.clone(),
                    column.not_null || key.contains(&column.target),
                )
            })
            .collect();
        let sql = sql::create_table(target, &columns, key);
        if self.holds {
            return Err(self.refuse(
                Code::TargetLost,
                format!("target table {target} is gone, and its rows with it"),
                match self.create {
                    Create::Auto => {
                        "nothing to do: it is made, and its rows are read again".to_owned()
                    }
                    Create::Never => format!("{sql};"),
                },
            ));
        }
        if self.create == Create::Never {
            return Err(self.refuse(
                Code::TargetTableMissing,
                format!("target table {target} does not exist, and `create` is \"never\""),
                format!("{sql};"),
            ));
        }
        self.create_schema(target).await?;
        let sql = match self.keyed {
            Keyed::Already | Keyed::Now => sql,
            Keyed::Later => sql::create_table(target, &columns, &[]),
        };
        self.client
            .batch_execute(&sql)
            .await
            .map_err(|error| self.failed(error))
    }
}
