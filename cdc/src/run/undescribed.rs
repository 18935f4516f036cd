//! Schemas that the stream names and that could not be described yet, such as while somebody holds their table. Pure.

use std::mem;
use std::sync::Arc;
use std::time::Duration;

use millrace_event::Relation;

/// How often they are tried again.
const INTERVAL: Duration = Duration::from_secs(5);

/// How many are remembered. A further one is met by the next life, as long as the slot has its changes.
const COUNT_MAX: usize = 1_000;

/// Those of one life.
#[derive(Debug, Default)]
pub(super) struct Undescribed {
    relations: Vec<Arc<Relation>>,
    /// When they were tried last, since the life began.
    tried: Duration,
}

impl Undescribed {
    pub(super) fn push(&mut self, relation: Arc<Relation>) {
        let id = |relation: &Relation| (relation.name().clone(), relation.version().to_owned());
        if self
            .relations
            .iter()
            .any(|known| id(known) == id(&relation))
        {
            return;
        }
        if self.relations.len() < COUNT_MAX {
            self.relations.push(relation);
            return;
        }
        tracing::warn!(
            table = %relation.name(), version = relation.version(),
            "too many schemas cannot be described: the next start looks for this one"
        );
    }

    /// Takes them where it is time to try them again, `now` since the life began.
    pub(super) fn due(&mut self, now: Duration) -> Vec<Arc<Relation>> {
        if self.relations.is_empty() || now.saturating_sub(self.tried) < INTERVAL {
            return Vec::new();
        }
        self.tried = now;
        mem::take(&mut self.relations)
    }
}
