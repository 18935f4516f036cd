//! A cluster's files as a backup has them.

use crate::error::LabError;
use crate::place::{Account, Place, copy_tree};

use super::Postgres;

impl Postgres {
    /// A stopped copy of this stopped cluster, its slots included, for another port: what a backup of the
    /// machine brings back. [`Postgres::start_again`] starts it.
    ///
    /// # Errors
    ///
    /// Fails when this cluster runs or its files cannot be copied.
    pub fn back_up(&self) -> Result<Self, LabError> {
        if self.process.is_some() {
            return Err(LabError::Unexpected(
                "a running cluster cannot be copied".into(),
            ));
        }
        let place = Place::new()?;
        copy_tree(&self.data_dir(), &place.path().join("data"))?;
        Account::make_dir(self.account, &place.path().join("socket"))?;
        Ok(Self {
            process: None,
            binaries: self.binaries.clone(),
            account: self.account,
            port: super::free_port()?,
            password: self.password.clone(),
            place,
        })
    }
}
