//! A build as its stream tells it: `running` at once, `running` once more when it becomes known where its log is, then its
//! end.

use std::sync::Arc;
use std::time::Duration;

use futures::stream;
use kiln_domain::id::BuildId;
use kiln_domain::record::{Record, State};
use kiln_proto::builder as api;
use tokio::sync::broadcast::error::RecvError;
use tonic::Status;

use crate::builds::{Answers, BuildsApi};
use crate::compat::info;
use crate::compat::log_info::LogInfos;
use crate::cut::until_cut;

/// A build that ended before anybody asked where its log is: so long its end waits for that.
const LAST_QUESTION: Duration = Duration::from_millis(500);

/// Where a stream is.
struct Following {
    builds: Arc<BuildsApi>,
    log_infos: LogInfos,
    id: BuildId,
    /// How often its start had been refused when the client came.
    refusals: u32,
    log: Log,
    over: bool,
}

enum Log {
    NotAsked,
    /// `None` where clients can't read it by themselves.
    Asked(Option<api::LogInfo>),
}

/// Whoever drops the stream ends nothing but the stream.
pub(crate) fn follow(
    builds: &Arc<BuildsApi>,
    log_infos: &LogInfos,
    record: &Record,
) -> Answers<api::BuildResponse> {
    let running = api::BuildResponse {
        status: api::BuildStatus::Running.into(),
        message: String::new(),
        ..info::response(record)
    };
    let following = Following {
        builds: builds.clone(),
        log_infos: log_infos.clone(),
        id: record.id.clone(),
        refusals: record.refused_starts,
        log: Log::NotAsked,
        over: false,
    };
    let later = stream::unfold(following, async |mut following| {
        if following.over {
            return None;
        }
        let next = following.next().await;
        following.over |= next.is_err();
        Some((next, following))
    });
    let all = futures::StreamExt::chain(stream::once(async { Ok(running) }), later);
    Box::pin(until_cut(all, builds.cuts.cut()))
}

impl Following {
    async fn next(&mut self) -> Result<api::BuildResponse, Status> {
        if matches!(self.log, Log::NotAsked) {
            let log = async {
                let record = self.reaches(|record| record.state != State::Queued).await?;
                Ok::<_, Status>((self.log_infos.of(&record.run()).await, record))
            };
            tokio::select! {
                log = log => {
                    let (log, record) = log?;
                    self.log = Log::Asked(log.clone());
                    if log.is_some() && !record.state.is_terminal() {
                        return Ok(shown(&record, log));
                    }
                }
                ended = self.ended() => drop(ended?),
            }
        }
        let record = self.ended().await?;
        self.over = true;
        let log = match &self.log {
            Log::Asked(log) => log.clone(),
            Log::NotAsked if record.started_at.is_some() => {
                let run = record.run();
                let asked = self.log_infos.of(&run);
                tokio::time::timeout(LAST_QUESTION, asked).await.ok().flatten()
            }
            Log::NotAsked => None,
        };
        Ok(shown(&record, log))
    }

    /// The record of the end. A build that can't be started stays queued and is tried on; its client is told, as mk3's is, so
    /// that it comes again, and joins.
    async fn ended(&self) -> Result<Record, Status> {
        let is_refused = |record: &Record| {
            let refusals = record.refused_starts;
            record.state == State::Queued && refusals > 0 && refusals != self.refusals
        };
        let record = self.reaches(|record| record.state.is_terminal() || is_refused(record)).await?;
        if is_refused(&record) {
            return Err(Status::unavailable(format!("cannot start build: {}", record.message)));
        }
        Ok(record)
    }

    /// The record once it is as wanted, waited for.
    async fn reaches(&self, wanted: impl Fn(&Record) -> bool) -> Result<Record, Status> {
        let (view, journal, id) = (&self.builds.view, &self.builds.journal, &self.id);
        let mut changes = view.changes();
        loop {
            match view.get(id) {
                Some(entry) if wanted(&entry.record) => return Ok(entry.record.clone()),
                Some(_) => {}
                // Not in the view yet, or not any more.
                None if view.is_caught_up() => match journal.last_of_build(id).await {
                    Ok(Some(entry)) if wanted(&entry.record) => return Ok(entry.record),
                    Ok(Some(_)) => {}
                    Ok(None) => return Err(Status::aborted("subscription canceled - please try again")),
                    Err(error) => tracing::debug!(build.id = %id, "the journal can't be asked now: {error}"),
                },
                None => {}
            }
            // A lag only makes us look again.
            if matches!(changes.recv().await, Err(RecvError::Closed)) {
                return Err(Status::unavailable("this gateway is shutting down; ask again"));
            }
        }
    }
}

fn shown(record: &Record, log: Option<api::LogInfo>) -> api::BuildResponse {
    let mut response = info::response(record);
    if let Some(info) = &mut response.info {
        info.log_info = log;
    }
    response
}
