//! The resolver, as this service asks it.

use std::time::Duration;

use bytes::Bytes;
use kiln_bus::Bus;
use kiln_contract::error::{Code, Refusal};
use kiln_contract::resolver::{FindImage, ResolveCommit, ResolveImage};
use kiln_domain::reference::{Digest, ImageReference};
use kiln_domain::source::DockerfileSource;

/// Long enough for a git remote on the other side of the world.
const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) struct Resolver {
    bus: Bus,
}

impl Resolver {
    pub(crate) fn new(bus: &Bus) -> Self {
        Self { bus: bus.clone() }
    }

    /// `name@digest` of an image for linux/amd64.
    pub(crate) async fn pin(
        &self,
        reference: &ImageReference,
        secrets: &Bytes,
    ) -> Result<ImageReference, Refusal> {
        let question = ResolveImage {
            reference: reference.to_string(),
            platform: String::new(),
            secrets: secrets.clone(),
            refresh: false,
        };
        parsed(&self.bus.ask(&question, PATIENCE).await?.reference)
    }

    /// The commit that a source's revision is now, which also shows that the caller may read it.
    pub(crate) async fn commit(&self, source: &DockerfileSource, secrets: &Bytes) -> Result<String, Refusal> {
        let question = ResolveCommit {
            remote_uri: source.remote_uri.clone(),
            revision: source.revision.clone(),
            secrets: secrets.clone(),
        };
        Ok(self.bus.ask(&question, PATIENCE).await?.commit)
    }

    /// What lies at a reference right now, by the registry's own word. The inner refusal is the registry's, as a resolver
    /// tells it; the outer one says that no resolver could be asked.
    pub(crate) async fn find(
        &self,
        reference: &ImageReference,
    ) -> Result<Result<Option<Digest>, Refusal>, Refusal> {
        let asked = self.bus.try_ask(&FindImage { reference: reference.to_string() }, PATIENCE).await?;
        match asked {
            Ok(found) if found.digest.is_empty() => Ok(Ok(None)),
            Ok(found) => parsed(&found.digest).map(|digest| Ok(Some(digest))),
            Err(refusal) => Ok(Err(refusal)),
        }
    }
}

fn parsed<T: std::str::FromStr<Err: std::fmt::Display>>(text: &str) -> Result<T, Refusal> {
    text.parse().map_err(|error| {
        Refusal::new(Code::Internal, format!("the resolver answered what can't be read: {error}"))
    })
}
