//! Moving a blob from one repository to another: streamed, checked, in bounded memory.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use http::{HeaderValue, Method, StatusCode, header};
use kiln_domain::reference::Digest;
use reqwest::{Body, Request, Response};
use sha2::{Digest as _, Sha256};
use tokio::time::{sleep, timeout};
use url::Url;

use crate::error::{Error, Problem};
use crate::http::{same_security, successful};
use crate::repository::{Repository, authorized};
use crate::retry::Retry;

/// A blob as a manifest describes it.
#[derive(Clone, Debug)]
pub(crate) struct Blob {
    pub(crate) digest: Digest,
    pub(crate) size: u64,
}

/// Where an upload goes on.
enum Upload {
    /// It is over: the registry has linked the blob from the other repository.
    Mounted,
    At(Url),
}

/// Makes `blob` of `from` one of `to`, unless it is there.
pub(crate) async fn copy(from: &Repository<'_>, to: &Repository<'_>, blob: &Blob) -> Result<(), Error> {
    let mut retry = Retry::of_transfer(to.access);
    let mut session = None;
    if from.registry == to.registry {
        if from.name == to.name {
            return Ok(());
        }
        match mount(from, to, blob).await? {
            Some(Upload::Mounted) => return Ok(()),
            Some(Upload::At(url)) => session = Some(url),
            None => {}
        }
    }
    if has(to, blob).await? {
        if let Some(url) = session {
            abandon(to, url).await;
        }
        return Ok(());
    }
    loop {
        let url = match session.take() {
            Some(url) => url,
            None => match start(to, None).await? {
                Upload::Mounted => return Ok(()),
                Upload::At(url) => url,
            },
        };
        // Last, as a source that waits is a source that hangs up.
        let source = open(from, blob).await?;
        match put(from, to, blob, source, url).await {
            Ok(()) => return Ok(()),
            Err(failure) => retry.wait(failure).await?,
        }
    }
}

/// Whether something may be uploaded to a repository: begins an upload of nothing, and gives it up.
pub(crate) async fn may_upload(to: &Repository<'_>) -> Result<(), Error> {
    if let Upload::At(url) = start(to, None).await? {
        abandon(to, url).await;
    }
    Ok(())
}

/// Ends an upload that was opened in vain; if it can't, the upload ends by itself.
async fn abandon(to: &Repository<'_>, url: Url) {
    let reference = format!("{}/{}", to.registry, to.name);
    let cancelled = to.send(Request::new(Method::DELETE, url), &reference);
    let _ = timeout(to.http.config.request_timeout, cancelled).await;
}

/// Asks for a mount; `None` where the registry doesn't want to hear of it.
async fn mount(from: &Repository<'_>, to: &Repository<'_>, blob: &Blob) -> Result<Option<Upload>, Error> {
    match start(to, Some((blob, from.name))).await {
        Ok(upload) => Ok(Some(upload)),
        Err(failure @ (Error::Unavailable { .. } | Error::Limited { .. } | Error::UnknownHost { .. })) => {
            Err(failure)
        }
        Err(_) => Ok(None),
    }
}

/// Whether the blob is there. A registry that doesn't tell is given it.
async fn has(to: &Repository<'_>, blob: &Blob) -> Result<bool, Error> {
    let reference = to.at(&blob.digest);
    let asked = to.again(async || {
        let request = to.request(Method::HEAD, &format!("blobs/{}", blob.digest), &reference)?;
        successful(to.send(request, &reference).await?, &reference, to.registry).await
    });
    match asked.await {
        Ok(_) => Ok(true),
        Err(failure @ (Error::Unavailable { .. } | Error::Limited { .. } | Error::UnknownHost { .. })) => {
            Err(failure)
        }
        Err(_) => Ok(false),
    }
}

/// Begins an upload, and asks for a mount of a blob from another repository if one is named.
async fn start(to: &Repository<'_>, mount: Option<(&Blob, &str)>) -> Result<Upload, Error> {
    // Named as the repository: it is that which is not there, or not to be written to.
    let reference = format!("{}/{}", to.registry, to.name);
    to.again(async || {
        let mut request = to.request(Method::POST, "blobs/uploads/", &reference)?;
        if let Some((blob, from)) = mount {
            let mut query = request.url_mut().query_pairs_mut();
            query.append_pair("mount", blob.digest.as_str()).append_pair("from", from);
        }
        // Some registries insist on it.
        request.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from_static("0"));
        let answer = successful(to.send(request, &reference).await?, &reference, to.registry).await?;
        if answer.status() == StatusCode::CREATED {
            return Ok(Upload::Mounted);
        }
        let location = answer.headers().get(header::LOCATION).and_then(|value| value.to_str().ok());
        let url = location.and_then(|location| answer.url().join(location).ok());
        let url =
            url.ok_or_else(|| Error::broken(&reference, "the registry names no place for an upload"))?;
        same_security(answer.url(), &url).map_err(|problem| {
            Error::broken(&reference, format!("the registry sends an upload to {problem}"))
        })?;
        Ok(Upload::At(url))
    })
    .await
}

/// Opens a blob to be read.
async fn open(from: &Repository<'_>, blob: &Blob) -> Result<Response, Error> {
    let reference = from.at(&blob.digest);
    from.again(async || {
        let request = from.request(Method::GET, &format!("blobs/{}", blob.digest), &reference)?;
        let answer = from.send(request, &reference).await?;
        successful(answer, &reference, from.registry).await
    })
    .await
}

/// Sends the source's body in one PUT, which ends the upload.
async fn put(
    from: &Repository<'_>,
    to: &Repository<'_>,
    blob: &Blob,
    source: Response,
    mut url: Url,
) -> Result<(), Error> {
    let reference = to.at(&blob.digest);
    let shown = to.authorization(&url).await?;
    url.query_pairs_mut().append_pair("digest", blob.digest.as_str());
    let stall = to.http.config.stall_timeout;
    let watch = Arc::new(Watch::default());
    let mut request = Request::new(Method::PUT, url);
    request.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    request.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(blob.size));
    *request.body_mut() = Some(Body::wrap_stream(
        Download {
            reference: from.at(&blob.digest),
            registry: from.registry.to_owned(),
            blob: blob.clone(),
            source: Box::pin(source.bytes_stream()),
            hasher: Sha256::new(),
            seen: 0,
            held: None,
            stall,
            watch: watch.clone(),
        }
        .into_stream(),
    ));
    let sent = to.http.execute(authorized(request, shown), to.registry);
    let done = tokio::select! {
        sent = sent => sent,
        () = watch.stalled(stall) => Err(Error::unavailable(to.registry, Problem::Timeout)),
    };
    // What is wrong with the source is the cause of whatever else is wrong.
    if let Some(failure) = watch.failure() {
        return Err(failure);
    }
    let said = timeout(to.http.config.request_timeout, successful(done?, &reference, to.registry)).await;
    said.map_err(|_| Error::unavailable(to.registry, Problem::Timeout))??;
    Ok(())
}

/// What the two ends of a transfer know of each other.
#[derive(Default)]
struct Watch {
    failure: Mutex<Option<Error>>,
    moved: AtomicU64,
}

impl Watch {
    fn failure(&self) -> Option<Error> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn fail(&self, failure: Error) {
        *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(failure);
    }

    /// Returns when nothing has moved for the time given.
    async fn stalled(&self, time: Duration) {
        let mut before = None;
        loop {
            let now = self.moved.load(Ordering::Relaxed);
            if before == Some(now) {
                return;
            }
            before = Some(now);
            sleep(time).await;
        }
    }
}

/// A blob on its way. Its last piece is let go only once the whole is known to be what it should be, so that a wrong
/// blob is never a complete upload.
struct Download {
    reference: String,
    registry: String,
    blob: Blob,
    source: Pin<Box<dyn Stream<Item = reqwest::Result<Bytes>> + Send>>,
    hasher: Sha256,
    seen: u64,
    held: Option<Bytes>,
    stall: Duration,
    watch: Arc<Watch>,
}

impl Download {
    fn into_stream(self) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static {
        futures::stream::unfold(Some(self), |download| async {
            let mut download = download?;
            match download.next().await {
                Ok(Some((piece, last))) => Some((Ok(piece), (!last).then_some(download))),
                Ok(None) => None,
                Err(failure) => {
                    download.watch.fail(failure);
                    Some((Err(io::Error::other("the source of the copy failed")), None))
                }
            }
        })
    }

    /// The next piece, and whether it is the last one.
    async fn next(&mut self) -> Result<Option<(Bytes, bool)>, Error> {
        loop {
            let piece = timeout(self.stall, self.source.next())
                .await
                .map_err(|_| Error::unavailable(&self.registry, Problem::Timeout))?
                .transpose()
                .map_err(|error| Error::from_transport(&error, &self.registry))?;
            let Some(piece) = piece else {
                self.check()?;
                return Ok(self.held.take().map(|last| (last, true)));
            };
            self.seen += piece.len() as u64;
            self.hasher.update(&piece);
            self.watch.moved.store(self.seen, Ordering::Relaxed);
            if self.seen > self.blob.size {
                let problem = format!("it is longer than the {} bytes that it should have", self.blob.size);
                return Err(Error::broken(&self.reference, problem));
            }
            if let Some(before) = self.held.replace(piece) {
                return Ok(Some((before, false)));
            }
        }
    }

    fn check(&mut self) -> Result<(), Error> {
        if self.seen < self.blob.size {
            // An end that came early looks like a lost connection, and is worth another try.
            let problem = format!("it ended after {} of {} bytes", self.seen, self.blob.size);
            return Err(Error::unavailable(&self.registry, Problem::Connection(problem)));
        }
        let found = format!("sha256:{}", hex::encode(self.hasher.finalize_reset()));
        if found == self.blob.digest.as_str() {
            Ok(())
        } else {
            Err(Error::broken(&self.reference, format!("its digest is {found}")))
        }
    }
}
