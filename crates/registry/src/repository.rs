//! One repository of a registry, as one caller may use it: authorization, retries, manifests.

use bytes::Bytes;
use http::{HeaderValue, Method, StatusCode, header};
use kiln_domain::reference::{Digest, ImageReference};
use oci_spec::image::Descriptor;
use reqwest::{Request, Response};
use tokio::sync::Mutex;
use tokio::time::timeout;
use url::Url;

use crate::OciRegistry;
use crate::access::{Access, Credential, Keychain};
use crate::challenge::Challenge;
use crate::error::{Error, Problem};
use crate::http::{Http, body, successful};
use crate::manifest::{ACCEPTED, Flaw, Manifest};
use crate::retry::Retry;
use crate::token::{Authorization, Wanted};
use crate::tokens::Tokens;

/// For the length of one call.
pub(crate) struct Repository<'a> {
    pub(crate) http: &'a Http,
    tokens: &'a Tokens,
    keychain: &'a dyn Keychain,
    pub(crate) access: &'a Access,
    /// As the reference names it.
    pub(crate) registry: &'a str,
    pub(crate) name: &'a str,
    /// `http(s)://host/v2/`.
    base: Url,
    scopes: Vec<String>,
    session: Mutex<Session>,
}

#[derive(Default)]
struct Session {
    /// Looked up once; `Some(None)` for a registry without one.
    credential: Option<Option<Credential>>,
    challenge: Option<Challenge>,
    authorization: Option<Authorization>,
}

impl<'a> Repository<'a> {
    /// To read from.
    pub(crate) fn source(
        client: &'a OciRegistry,
        reference: &'a ImageReference,
        access: &'a Access,
    ) -> Result<Self, Error> {
        let scope = format!("repository:{}:pull", reference.repository());
        Self::new(client, reference, access, &*access.keychain, vec![scope])
    }

    /// To write to, and within its registry to mount from another.
    pub(crate) fn target(
        client: &'a OciRegistry,
        reference: &'a ImageReference,
        mount_from: Option<&str>,
        access: &'a Access,
    ) -> Result<Self, Error> {
        let scope = format!("repository:{}:pull,push", reference.repository());
        let from = mount_from.map(|name| format!("repository:{name}:pull"));
        let scopes = std::iter::once(scope).chain(from).collect();
        Self::new(client, reference, access, &**access.to_push(), scopes)
    }

    /// To remove from, too.
    pub(crate) fn keeper(
        client: &'a OciRegistry,
        reference: &'a ImageReference,
        access: &'a Access,
    ) -> Result<Self, Error> {
        let scope = format!("repository:{}:delete,pull,push", reference.repository());
        Self::new(client, reference, access, &**access.to_push(), vec![scope])
    }

    fn new(
        client: &'a OciRegistry,
        reference: &'a ImageReference,
        access: &'a Access,
        keychain: &'a dyn Keychain,
        scopes: Vec<String>,
    ) -> Result<Self, Error> {
        let (registry, name) = (reference.registry(), reference.repository());
        let OciRegistry { http, tokens } = client;
        let base = http.base(registry)?;
        Ok(Self { http, tokens, keychain, access, registry, name, base, scopes, session: Mutex::default() })
    }

    /// `registry/name@digest`, to name a blob or manifest in a message.
    pub(crate) fn at(&self, digest: &Digest) -> String {
        format!("{}/{}@{digest}", self.registry, self.name)
    }

    /// A request to `…/v2/<name>/<path>`.
    pub(crate) fn request(&self, method: Method, path: &str, reference: &str) -> Result<Request, Error> {
        let url = self.base.join(&format!("{}/{path}", self.name));
        let url = url.map_err(|_| Error::broken(reference, "it has no URL"))?;
        Ok(Request::new(method, url))
    }

    /// Does `attempt` until it succeeds, fails for good, or the caller's patience ends.
    pub(crate) async fn again<T, F>(&self, mut attempt: impl FnMut() -> F) -> Result<T, Error>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let mut retry = Retry::of_request(self.access, self.registry);
        let late = || Error::unavailable(self.registry, Problem::Timeout);
        loop {
            let done = timeout(self.http.config.request_timeout, attempt()).await;
            match done.unwrap_or_else(|_| Err(late())) {
                Ok(done) => return Ok(done),
                Err(failure) => retry.wait(failure).await?,
            }
        }
    }

    /// Sends a request, and meets a challenge if it is answered by one. Success is any other answer.
    pub(crate) async fn send(&self, request: Request, reference: &str) -> Result<Response, Error> {
        let once_more = request.try_clone();
        let shown = self.authorization(request.url()).await?;
        let answer = self.http.send(authorized(request, shown.clone()), reference, self.registry).await?;
        // Another host's challenge, after a redirect or at an upload's own place, is none of the credential's business.
        if answer.status() != StatusCode::UNAUTHORIZED || answer.url().origin() != self.base.origin() {
            return Ok(answer);
        }
        let (Some(request), Some(challenge)) = (once_more, Challenge::among(answer.headers())) else {
            return Ok(answer);
        };
        match self.meet(challenge, shown).await? {
            Some(value) => self.http.send(authorized(request, Some(value)), reference, self.registry).await,
            None => Ok(answer),
        }
    }

    /// What to show at a URL: nothing unless it is the registry's own.
    pub(crate) async fn authorization(&self, url: &Url) -> Result<Option<HeaderValue>, Error> {
        if url.origin() != self.base.origin() {
            return Ok(None);
        }
        let mut session = self.session.lock().await;
        if let Some(authorization) = session.authorization.as_ref().filter(|a| a.is_fresh()) {
            return Ok(Some(authorization.value.clone()));
        }
        let renewed = match session.challenge.clone() {
            Some(challenge) => self.answer(&mut session, challenge, None).await?,
            None => self.unasked(&mut session).await?,
        };
        session.authorization.clone_from(&renewed);
        Ok(renewed.map(|authorization| authorization.value))
    }

    /// What to show to a registry that is expected to demand it, as it did before; else it would cost a request to be told.
    async fn unasked(&self, session: &mut Session) -> Result<Option<Authorization>, Error> {
        let Some(challenge) = self.tokens.demanded(&self.base, &self.scopes).await else { return Ok(None) };
        match self.answer(session, challenge, None).await {
            Err(failure) if !matches!(failure, Error::Limited { .. }) => {
                // The registry may have another token service by now: it is let speak for itself.
                self.tokens.forget_demand(&self.base, &self.scopes).await;
                Ok(None)
            }
            other => other,
        }
    }

    /// What to show now that `shown` was not enough; `None` if there is nothing else.
    async fn meet(
        &self,
        challenge: Challenge,
        shown: Option<HeaderValue>,
    ) -> Result<Option<HeaderValue>, Error> {
        let mut session = self.session.lock().await;
        let current = session.authorization.as_ref().map(|authorization| &authorization.value);
        if current != shown.as_ref() {
            // Another request of this call has met it meanwhile.
            return Ok(current.cloned());
        }
        self.tokens.demands(&self.base, &self.scopes, challenge.clone()).await;
        let met = self.answer(&mut session, challenge.clone(), shown.as_ref()).await?;
        session.challenge = Some(challenge);
        session.authorization.clone_from(&met);
        Ok(met.map(|authorization| authorization.value).filter(|value| Some(value) != shown.as_ref()))
    }

    async fn answer(
        &self,
        session: &mut Session,
        challenge: Challenge,
        rejected: Option<&HeaderValue>,
    ) -> Result<Option<Authorization>, Error> {
        let credential = match &session.credential {
            Some(known) => known.clone(),
            None => {
                let found = self.keychain.credential(self.registry).await?;
                session.credential.insert(found).clone()
            }
        };
        match challenge {
            Challenge::Basic => Ok(credential.as_ref().and_then(Authorization::basic)),
            Challenge::Bearer { .. } if matches!(credential, Some(Credential::RegistryToken(_))) => {
                Ok(credential.as_ref().and_then(Authorization::bearer))
            }
            Challenge::Bearer { realm, service, scope } => {
                // What the registry names, as it knows best; and what will be wanted, so that one token does.
                let named = scope.iter().flat_map(|scope| scope.split(' ')).filter(|scope| !scope.is_empty());
                let mut scopes = self.scopes.clone();
                scopes.extend(named.map(str::to_owned));
                scopes.sort_unstable();
                scopes.dedup();
                let wanted = Wanted {
                    realm: &realm,
                    service: service.as_deref(),
                    scopes: &scopes,
                    credential: credential.as_ref(),
                    base: &self.base,
                    // Not a tag of it: the token is for all who ask for the repository meanwhile.
                    reference: &format!("{}/{}", self.registry, self.name),
                    registry: self.registry,
                };
                self.tokens.token(self.http, &wanted, rejected).await.map(Some)
            }
        }
    }

    /// The digest that a HEAD says a tag has; `None` where the registry doesn't say it to a HEAD.
    pub(crate) async fn head(&self, selector: &str, reference: &str) -> Result<Option<Digest>, Error> {
        self.again(async || {
            let mut request = self.request(Method::HEAD, &format!("manifests/{selector}"), reference)?;
            request.headers_mut().insert(header::ACCEPT, HeaderValue::from_static(ACCEPTED));
            let answer = self.send(request, reference).await?;
            if matches!(answer.status().as_u16(), 400 | 405 | 501) {
                return Ok(None);
            }
            Ok(told_digest(&successful(answer, reference, self.registry).await?))
        })
        .await
    }

    /// The manifest or index that a tag or digest stands for.
    pub(crate) async fn manifest(&self, selector: &str, reference: &str) -> Result<Manifest, Error> {
        self.again(async || {
            let mut request = self.request(Method::GET, &format!("manifests/{selector}"), reference)?;
            request.headers_mut().insert(header::ACCEPT, HeaderValue::from_static(ACCEPTED));
            let answer = self.send(request, reference).await?;
            let answer = successful(answer, reference, self.registry).await?;
            let told = told_digest(&answer);
            let media_type = answer.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
            let media_type = media_type.map(str::to_owned);
            let bytes = body(answer, reference, self.registry).await?;
            let digest = Digest::of(&bytes);
            let wanted = selector.parse().ok().or(told);
            if let Some(wanted) = wanted.filter(|wanted| *wanted != digest) {
                return Err(Error::broken(reference, format!("its digest is {digest}, not {wanted}")));
            }
            Manifest::parse(bytes, media_type.as_deref()).map_err(|flaw| match flaw {
                Flaw::Broken(problem) => Error::broken(reference, problem),
                Flaw::Unsupported(problem) => Error::Unsupported { reference: reference.to_owned(), problem },
            })
        })
        .await
    }

    /// A small blob, whole.
    pub(crate) async fn small_blob(&self, digest: &Digest) -> Result<Bytes, Error> {
        let reference = self.at(digest);
        self.again(async || {
            let request = self.request(Method::GET, &format!("blobs/{digest}"), &reference)?;
            let answer = self.send(request, &reference).await?;
            let answer = successful(answer, &reference, self.registry).await?;
            let bytes = body(answer, &reference, self.registry).await?;
            let found = Digest::of(&bytes);
            if found == *digest {
                Ok(bytes)
            } else {
                Err(Error::broken(&reference, format!("its digest is {found}")))
            }
        })
        .await
    }

    /// Puts a manifest under a tag, once: the caller decides what comes before each attempt.
    pub(crate) async fn put_manifest(
        &self,
        selector: &str,
        manifest: &Manifest,
        reference: &str,
    ) -> Result<(), Error> {
        let mut request = self.request(Method::PUT, &format!("manifests/{selector}"), reference)?;
        let media_type = HeaderValue::from_str(&manifest.media_type);
        let media_type = media_type.map_err(|_| Error::broken(reference, "its media type is no header"))?;
        request.headers_mut().insert(header::CONTENT_TYPE, media_type);
        *request.body_mut() = Some(manifest.bytes.clone().into());
        let answered =
            async { successful(self.send(request, reference).await?, reference, self.registry).await };
        let answer = timeout(self.http.config.request_timeout, answered).await;
        let answer = answer.map_err(|_| Error::unavailable(self.registry, Problem::Timeout))??;
        match told_digest(&answer).filter(|told| *told != manifest.digest) {
            Some(told) => {
                let problem = format!("{} was put, the registry stored {told}", manifest.digest);
                Err(Error::broken(reference, problem))
            }
            None => Ok(()),
        }
    }
}

/// A descriptor's digest, if it is one that can be checked.
pub(crate) fn digest_of(descriptor: &Descriptor, reference: &str) -> Result<Digest, Error> {
    descriptor.digest().as_ref().parse().map_err(|_| Error::Unsupported {
        reference: reference.to_owned(),
        problem: format!("it has a digest by {}, only sha256 is known", descriptor.digest().algorithm()),
    })
}

fn told_digest(answer: &Response) -> Option<Digest> {
    answer.headers().get("docker-content-digest")?.to_str().ok()?.parse().ok()
}

pub(crate) fn authorized(mut request: Request, value: Option<HeaderValue>) -> Request {
    if let Some(value) = value {
        request.headers_mut().insert(header::AUTHORIZATION, value);
    }
    request
}
