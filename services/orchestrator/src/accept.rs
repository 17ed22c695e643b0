//! Accepting a build: one build of an image at a time, whoever asks and wherever.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use kiln_bus::BusError;
use kiln_bus::journal::{AppendError, Entry};
use kiln_bus::seal::SealError;
use kiln_contract::error::{Code, Refusal};
use kiln_contract::secrets::Secrets;
use kiln_domain::id::{BuildId, ImageKey, InstanceId};
use kiln_domain::record::Record;
use kiln_domain::reference::Digest;
use kiln_domain::source::Source;
use kiln_domain::transition::{Change, Illegal};

use crate::Shared;
use crate::identity::Identity;

/// A request to build, as a gateway sends it.
pub(crate) struct Request {
    /// Met again, it gets the same build.
    pub(crate) id: String,
    pub(crate) source: Source,
    pub(crate) sealed: Bytes,
    pub(crate) force: bool,
    pub(crate) owner: String,
    /// 0 for the default.
    pub(crate) timeout_ms: u64,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) no_cache: bool,
    /// See [`kiln_contract::orchestrator::WorkspaceImage::clone_target`].
    pub(crate) clone_target: Option<String>,
    /// Why no builder of ours can fetch the context; empty if it can.
    pub(crate) unfetchable: String,
}

pub(crate) enum Accepted {
    Build { entry: Entry, joined: bool },
    AlreadyBuilt { target_ref: String, base_ref: String, digest: Digest },
}

/// How long a request for an image whose build is being cancelled waits for its end.
const CANCEL_PATIENCE: Duration = Duration::from_secs(20);

impl Shared {
    /// Finds the image's active build and joins it, or says that the image is there, or begins a build.
    pub(crate) async fn accept(&self, mut request: Request) -> Result<Accepted, Refusal> {
        let timeout_ms = self.timeout_ms(&request)?;
        // Who sends what can't be opened hears of it now, not from a failed build.
        kiln_bus::secrets::open(&self.open_key, &request.sealed).map_err(|error| unopenable(&error))?;
        let image = self.identify(&request.source, request.clone_target.as_deref(), &request.sealed).await?;
        let key = ImageKey::of(&image.target_ref.to_string());
        loop {
            // The tail is read before anything is asked of the registry: an append on it then proves that nothing
            // was begun meanwhile.
            let tail = self.journal.last_of_image(&key).await?;
            if let Some(entry) = tail.clone().filter(|entry| entry.record.requests.contains(&request.id)) {
                // Asked again, because an answer was late or lost: the same answer.
                let joined = entry.record.requests.first() != Some(&request.id);
                return Ok(Accepted::Build { entry, joined });
            }
            // The registry's own word, asked after the tail was read. An image that is there is there, whatever is built.
            let found = self.resolver.find(&image.target_ref).await??;
            if let (Some(digest), false) = (&found, request.force) {
                return Ok(Accepted::AlreadyBuilt {
                    target_ref: image.target_ref.to_string(),
                    base_ref: image.base_ref.to_string(),
                    digest: digest.clone(),
                });
            }
            let appended = match &tail {
                Some(active) if active.record.cancel.is_some() && !active.record.state.is_terminal() => {
                    self.wait_for_end(active).await?;
                    continue;
                }
                Some(active) if !active.record.state.is_terminal() => {
                    let change = Change::Joined { owner: request.owner.clone(), request: request.id.clone() };
                    let joined = self.journal.append(Some(active), &change, &self.appender()?).await;
                    joined.map(|entry| Accepted::Build { entry, joined: true })
                }
                _ => {
                    let record = self.new_record(&mut request, &image, &key, found, timeout_ms).await?;
                    self.begin(tail.as_ref(), record, &request.sealed).await
                }
            };
            match appended {
                Ok(accepted) => return Ok(accepted),
                // Somebody was first: mostly there is a build to join now. Or the stream was emptied under us.
                Err(AppendError::Lost | AppendError::Gone) => {}
                Err(AppendError::Illegal(error @ Illegal::NewerState { .. })) => {
                    return Err(Refusal::new(Code::Unavailable, format!("{error}; ask again")));
                }
                Err(AppendError::Illegal(error)) => {
                    return Err(Refusal::new(Code::Internal, error.to_string()));
                }
                Err(AppendError::Bus(error)) => return Err(error.into()),
            }
        }
    }

    fn timeout_ms(&self, request: &Request) -> Result<u64, Refusal> {
        let longest = self.config.max_timeout_seconds.saturating_mul(1000);
        match request.timeout_ms {
            0 => Ok(self.config.default_timeout_seconds.saturating_mul(1000)),
            asked if asked <= longest => Ok(asked),
            _ => Err(Refusal::new(
                Code::InvalidArgument,
                format!("timeout: is longer than the {} s allowed", self.config.max_timeout_seconds),
            )),
        }
    }

    async fn new_record(
        &self,
        request: &mut Request,
        image: &Identity,
        key: &ImageKey,
        digest_before: Option<Digest>,
        timeout_ms: u64,
    ) -> Result<Record, Refusal> {
        let active = self.view.active();
        if let Some(full) = self.journal.refuses(active.len()).await? {
            return Err(Refusal::new(Code::Unavailable, full));
        }
        let queued = active.iter().filter(|entry| entry.record.waits()).count();
        if queued >= self.config.max_queued {
            return Err(Refusal::new(
                Code::ResourceExhausted,
                format!("the queue is full: {queued} builds wait"),
            ));
        }
        // A base that is there need not be built again, unless that is what was asked for.
        let base_exists = match request.source {
            Source::Image(_) | Source::Unknown(_) => true,
            Source::Dockerfile(_) if request.force || request.no_cache => false,
            Source::Dockerfile(_) => self.resolver.find(&image.base_ref).await??.is_some(),
        };
        let commit = match (&request.source, &image.commit) {
            // An image that is not named by its commit is built from what the revision is now.
            (Source::Dockerfile(dockerfile), None) if !base_exists && !self.engine.fetches_contexts() => {
                if !request.unfetchable.is_empty() {
                    return Err(Refusal::new(Code::InvalidArgument, request.unfetchable.clone()));
                }
                dockerfile.check(self.config.file_remotes)?;
                // Kept: what gives them gives them once, and this may be done again.
                request.sealed = self.with_credentials(&request.sealed).await?;
                Some(self.commit(dockerfile, &request.sealed).await?)
            }
            (Source::Dockerfile(dockerfile), None) => {
                dockerfile.check(self.config.file_remotes)?;
                None
            }
            _ => image.commit.clone(),
        };
        Ok(Record {
            commit,
            base_exists,
            digest_before,
            requests: vec![request.id.clone()],
            labels: request.labels.clone(),
            no_cache: request.no_cache,
            timeout_ms,
            queue_limit_ms: self.config.queue_limit_seconds.saturating_mul(1000),
            traceparent: kiln_bus::trace::current_traceparent(),
            ..Record::accepted(
                BuildId::new(key, rand::random()),
                image.target_ref.to_string(),
                image.base_ref.to_string(),
                request.source.clone(),
                request.owner.clone(),
            )
        })
    }

    /// Keeps the secrets, then appends `queued`: a build is never without its entry in the list of what to clean up.
    async fn begin(
        &self,
        tail: Option<&Entry>,
        record: Record,
        sealed: &Bytes,
    ) -> Result<Accepted, AppendError> {
        let id = record.id.clone();
        let sealed = if sealed.is_empty() { self.sealed_nothing()? } else { sealed.clone() };
        self.secrets.put(&id, sealed).await?;
        let by = self.appender()?;
        let appended = self.journal.append(tail, &Change::Queued(Box::new(record)), &by).await;
        if matches!(appended, Err(AppendError::Lost | AppendError::Gone | AppendError::Illegal(_)))
            && let Err(error) = self.secrets.remove(&id).await
        {
            tracing::warn!(build.id = %id, "the secrets of a build that was not begun stay until they are swept: {error}");
        }
        let entry = appended?;
        self.metrics.accepted();
        Ok(Accepted::Build { entry, joined: false })
    }

    fn sealed_nothing(&self) -> Result<Bytes, BusError> {
        kiln_bus::secrets::seal(&self.open_key.seal_key(), &Secrets::default())
            .map_err(|error| BusError::Refused { operation: "seal", detail: error.to_string() })
    }

    /// Who an append is by. Accepting needs no claim, but a process whose lease is in doubt has lost its bus.
    pub(crate) fn appender(&self) -> Result<InstanceId, BusError> {
        self.holders.me().ok_or_else(|| BusError::Unavailable {
            operation: "append to the journal",
            detail: "this orchestrator's lease could not be renewed".into(),
        })
    }

    async fn wait_for_end(&self, active: &Entry) -> Result<(), Refusal> {
        let mut changes = self.view.changes();
        let ended = async {
            loop {
                match self.view.get(&active.record.id) {
                    Some(seen) if seen.record.state.is_terminal() => return,
                    _ => {
                        // A lag or an end of the channel only makes us look again.
                        let _ = changes.recv().await;
                    }
                }
            }
        };
        tokio::time::timeout(CANCEL_PATIENCE, ended).await.map_err(|_| {
            Refusal::new(
                Code::Unavailable,
                format!("the build {} of this image is being cancelled; try again", active.record.id),
            )
        })
    }
}

pub(crate) fn unopenable(error: &SealError) -> Refusal {
    Refusal::new(Code::Internal, error.to_string())
}
