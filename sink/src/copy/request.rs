//! How a sink asks for what it needs, and gives up what it asked for.

use millrace_config::{OnDelete, OnTruncate};
use millrace_event::work::{CopyRequest, TableRequest, Wanted};
use millrace_event::{BinaryType, subject};

use super::Copies;
use super::answer::Answer;
use super::bucket::{Stored, put, request_key, stored_request, withdraw};
use super::told::Telling;
use crate::asking;
use crate::copying::{Copying, Keeps};
use crate::error::Error;
use crate::life::Life;
use crate::progress::CopyState;

impl Copies {
    /// Gives up what was asked for.
    pub(super) async fn withdraw(&mut self, life: &Life<'_>) -> Result<(), Error> {
        self.answer = None;
        if !self.withdrawn {
            self.withdrawn = withdraw(life).await?;
        }
        Ok(())
    }

    /// Gives up what was asked for, because the copy stream lost some of it.
    pub(super) async fn give_up(&mut self, life: &Life<'_>) -> Result<(), Error> {
        self.clearing = true;
        self.withdraw(life).await
    }

    /// Asks for what is needed and not asked for, and for what the broker has lost on its way.
    pub(super) async fn ask(&mut self, life: &mut Life<'_>) -> Result<(), Error> {
        let wanted = asking::wanted(&life.progress, &self.debts);
        if wanted.is_empty() {
            return self.withdraw(life).await;
        }
        if self.is_lost(life).await? {
            tracing::warn!(sink = %life.settings.name, "copied rows are missing; asking for them again");
            return self.give_up(life).await;
        }
        // A reader takes a hole of an earlier request for one of its own.
        if self.clearing {
            return Ok(());
        }
        let goes_on = |asked: &CopyRequest| {
            asking::brings(&asked.tables, &wanted)
                || asking::must_stay(&asked.tables, &life.progress)
        };
        let answer = self.answer.as_ref();
        let answer = answer.filter(|answer| goes_on(answer.machine.request()));
        let asked = answer.map(|answer| answer.machine.request().clone());
        // Once capture answers, it has the request; until then the broker may have lost it.
        if answer.is_some_and(|answer| answer.status.is_some()) {
            return Ok(());
        }
        let stored = match stored_request(life).await? {
            Stored::Unread => return Ok(()),
            Stored::Request(request) => Some(request),
            Stored::Nothing => None,
        };
        if let Some(asked) = asked {
            if stored.is_none_or(|stored| stored.id != asked.id) {
                put(life, &request_key(life), &asked).await?;
            }
            return Ok(());
        }
        let stored = stored.filter(goes_on);
        self.begin_answer(life, stored, wanted).await
    }

    /// Goes on with a stored request that a crash left behind, or asks for what is wanted.
    async fn begin_answer(
        &mut self,
        life: &Life<'_>,
        stored: Option<CopyRequest>,
        wanted: Vec<TableRequest>,
    ) -> Result<(), Error> {
        let request = match stored {
            Some(stored) if self.answer.is_none() => stored,
            _ => {
                let request = CopyRequest {
                    id: format!("{:016x}", rand::random::<u64>()),
                    tables: wanted,
                    binary: BinaryType::TYPE_OIDS.to_vec(),
                };
                put(life, &request_key(life), &request).await?;
                let tables = request.tables.len();
                tracing::info!(sink = %life.settings.name, tables, "copy requested");
                request
            }
        };
        self.withdrawn = false;
        self.telling.iter().for_each(Telling::hurry);
        let keeps = life.tables.values().filter_map(|table| {
            let keeps = match (&table.on_delete, table.on_truncate) {
                (OnDelete::Ignore, _) => Keeps::Deleted,
                (_, OnTruncate::Ignore) => Keeps::Truncated,
                _ => return None,
            };
            Some((table.name.clone(), keeps))
        });
        let keeps = keeps.collect();
        let machine = Copying::new(request, life.limits, keeps, life.progress.clone());
        self.answer = Some(Answer {
            machine,
            reader: None,
            status: None,
            next: None,
            lost: false,
            taken_seq: 0,
            handed_seq: 0,
            applied_seq: 0,
            told_seq: 0,
        });
        Ok(())
    }

    /// Whether all of a table was put on the copy stream, and the stream is read to its end, and yet something of the
    /// table is missing: the broker lost the stream's end.
    async fn is_lost(&mut self, life: &Life<'_>) -> Result<bool, Error> {
        let Some(answer) = &self.answer else {
            return Ok(false);
        };
        let Some(status) = &answer.status else {
            return Ok(false);
        };
        if answer.next.is_some() || !answer.machine.is_at_rest() {
            return Ok(false);
        }
        let mut asked = answer.machine.request().tables.iter();
        // Rows of single keys are not awaited, nor is a copy that was given up.
        let is_left = asked.any(|asked| {
            let state = life.progress.tables.get(&asked.table);
            let awaited = state.and_then(CopyState::copy_began_us);
            !matches!(asked.rows, Wanted::Keys { .. })
                && status.copied.contains(&asked.table)
                && awaited == Some(asked.began_us)
        });
        if !is_left {
            return Ok(false);
        }
        let stream = subject::copy_stream_name(life.source, &life.settings.name);
        Ok(!life.stream_holds(&stream, answer.taken_seq + 1).await?)
    }
}
