//! Questions in, answers out: message → call → answer, and what each error is to the user.

use std::sync::Arc;

use kiln_bus::BusError;
use kiln_bus::seal::OpenKey;
use kiln_bus::serve::Server;
use kiln_contract::error::{Code, Refusal};
use kiln_contract::resolver::{
    FindImage, FoundImage, ResolveCommit, ResolveImage, ResolvedCommit, ResolvedImage,
};
use kiln_contract::secrets::Secrets;
use kiln_credentials::{Installation, Permitted};
use kiln_domain::platform::Platform;
use kiln_domain::reference::ImageReference;
use kiln_registry::Error as RegistryError;

use crate::commits::{self, Commits};
use crate::complaint::Kind;
use crate::images::{self, Images};

const REMOTE_URI: &str = "source.dockerfile.git.remote_uri";
const REVISION: &str = "source.dockerfile.git.revision";

/// What the answers are made from.
pub(crate) struct Duties {
    pub(crate) open_key: OpenKey,
    pub(crate) installation: Arc<Installation>,
    pub(crate) images: Images,
    pub(crate) commits: Commits,
}

pub(crate) async fn serve(server: &Server, duties: &Arc<Duties>) -> Result<(), BusError> {
    let shared = duties.clone();
    server
        .answer(move |question: ResolveImage| {
            let duties = shared.clone();
            async move { image(&duties, question).await }
        })
        .await?;
    let shared = duties.clone();
    server
        .answer(move |question: ResolveCommit| {
            let duties = shared.clone();
            async move { commit(&duties, question).await }
        })
        .await?;
    let shared = duties.clone();
    server
        .answer(move |question: FindImage| {
            let duties = shared.clone();
            async move { find(&duties, question).await }
        })
        .await
}

async fn image(duties: &Duties, question: ResolveImage) -> Result<ResolvedImage, Refusal> {
    let reference = parse_reference(&question.reference)?;
    let platform = parse_platform(&question.platform)?;
    let secrets = open(duties, &question.secrets)?;
    let credentials = Permitted::of(secrets.registry, duties.installation.clone())
        .map_err(|error| invalid(format!("auth.credentials: {error}")))?;
    let wanted = images::Wanted { reference, platform, credentials: Arc::new(credentials) };
    let resolved =
        duties.images.resolve(&wanted, question.refresh).await.map_err(|error| image_refusal(&error))?;
    Ok(ResolvedImage {
        reference: wanted.reference.pinned(&resolved.digest).to_string(),
        stale: resolved.stale,
        age_ms: u64::try_from(resolved.age.as_millis()).unwrap_or(u64::MAX),
        mirror: resolved.mirror,
        cached: resolved.cached,
        fresh_for_ms: u64::try_from(resolved.fresh_for.as_millis()).unwrap_or(u64::MAX),
    })
}

async fn commit(duties: &Duties, question: ResolveCommit) -> Result<ResolvedCommit, Refusal> {
    let secrets = open(duties, &question.secrets)?;
    let wanted = commits::Wanted {
        remote_uri: question.remote_uri,
        revision: question.revision,
        username: secrets.git_username,
        password: secrets.git_password.into(),
    };
    let commit = duties.commits.resolve(&wanted).await.map_err(|error| commit_refusal(&error))?;
    Ok(ResolvedCommit { commit })
}

async fn find(duties: &Duties, question: FindImage) -> Result<FoundImage, Refusal> {
    let reference = parse_reference(&question.reference)?;
    let found = duties.images.find(&reference).await.map_err(|error| image_refusal(&error))?;
    Ok(FoundImage { digest: found.map(|digest| digest.to_string()).unwrap_or_default() })
}

fn parse_reference(text: &str) -> Result<ImageReference, Refusal> {
    text.parse().map_err(|error: kiln_domain::reference::InvalidReference| invalid(error.to_string()))
}

fn parse_platform(text: &str) -> Result<Platform, Refusal> {
    if text.is_empty() {
        return Ok(Platform::default());
    }
    text.parse().map_err(|error| invalid(format!("platform: {error}")))
}

fn open(duties: &Duties, sealed: &[u8]) -> Result<Secrets, Refusal> {
    kiln_bus::secrets::open(&duties.open_key, sealed).map_err(|error| {
        tracing::error!(
            "a question's secrets can't be opened: does the gateway know another seal key? {error}"
        );
        Refusal::new(Code::Internal, format!("the resolver can't read the request's secrets: {error}"))
    })
}

fn invalid(message: String) -> Refusal {
    Refusal::new(Code::InvalidArgument, message)
}

/// Gitpod's clients look at the beginnings of these texts.
fn image_refusal(error: &images::Error) -> Refusal {
    let too_many = match error {
        images::Error::Registry(RegistryError::Limited { .. }) => true,
        images::Error::Paused { limited, .. } => *limited,
        images::Error::Registry(_) => false,
    };
    if too_many {
        let text = format!("upstream registry responds with 'too many request': {error}");
        return Refusal::new(Code::Unavailable, text);
    }
    let code = match error {
        images::Error::Paused { .. } => Code::Unavailable,
        images::Error::Registry(error) => match error {
            RegistryError::NotFound { .. }
            | RegistryError::UnknownHost { .. }
            | RegistryError::NoPlatform { .. } => Code::NotFound,
            RegistryError::Unauthenticated { .. } => Code::Unauthenticated,
            RegistryError::Denied { .. } => Code::PermissionDenied,
            RegistryError::NoCredential { .. }
            | RegistryError::Limited { .. }
            | RegistryError::Unavailable { .. } => Code::Unavailable,
            RegistryError::Broken { .. }
            | RegistryError::Unsupported { .. }
            | RegistryError::Rejected { .. } => Code::FailedPrecondition,
            RegistryError::Stopped(_) => Code::Internal,
        },
    };
    Refusal::new(code, format!("cannot resolve image: {error}"))
}

fn commit_refusal(error: &commits::Error) -> Refusal {
    let (code, field) = match error {
        commits::Error::Invalid(field) => return field.clone().into(),
        commits::Error::NoRevision { .. } | commits::Error::NoHead { .. } => (Code::NotFound, REVISION),
        commits::Error::Abbreviated { .. } => (Code::InvalidArgument, REVISION),
        commits::Error::Remote { complaint, .. } => {
            let code = match complaint.kind {
                Kind::NoRepository | Kind::UnknownHost => Code::NotFound,
                Kind::Unauthenticated => Code::Unauthenticated,
                Kind::Denied => Code::PermissionDenied,
                Kind::Unavailable => Code::Unavailable,
            };
            (code, REMOTE_URI)
        }
        commits::Error::Late { .. } => (Code::Unavailable, REMOTE_URI),
        commits::Error::TooLong { .. } => (Code::FailedPrecondition, REMOTE_URI),
        commits::Error::Program(source) => {
            tracing::error!("{error}: {source}");
            return Refusal::new(Code::Internal, format!("{error}: {source}"));
        }
    };
    Refusal::new(code, format!("{field}: {error}"))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn codes_and_beginnings_are_those_that_clients_know() {
        let reference = || "r.io/x:1".to_owned();
        let problem = || "why".to_owned();
        for (error, code, beginning) in [
            (
                RegistryError::NotFound { reference: reference() },
                Code::NotFound,
                "cannot resolve image: r.io/x:1",
            ),
            (
                RegistryError::Unauthenticated { reference: reference(), problem: problem() },
                Code::Unauthenticated,
                "cannot resolve image: ",
            ),
            (
                RegistryError::Denied { reference: reference(), problem: problem() },
                Code::PermissionDenied,
                "cannot resolve image: ",
            ),
            (
                RegistryError::Limited { registry: "r.io".into(), retry_after: None },
                Code::Unavailable,
                "upstream registry responds with 'too many request': ",
            ),
            (
                RegistryError::UnknownHost { registry: "r.io".into() },
                Code::NotFound,
                "cannot resolve image: registry host r.io does not exist",
            ),
            (
                RegistryError::NoPlatform {
                    reference: reference(),
                    platform: Platform::default(),
                    offered: Vec::new(),
                },
                Code::NotFound,
                "cannot resolve image: no manifest for platform linux-amd64 found",
            ),
        ] {
            let refusal = image_refusal(&error.into());
            assert_eq!(refusal.code, code, "{refusal}");
            assert!(refusal.message.starts_with(beginning), "{refusal}");
        }
        let left = Duration::from_secs(7);
        let paused = images::Error::Paused { registry: "r.io".into(), left, limited: true };
        let refusal = image_refusal(&paused);
        assert_eq!(refusal.code, Code::Unavailable);
        assert!(
            refusal.message.ends_with("registry r.io asked not to be asked for another 7 s"),
            "{refusal}"
        );
    }
}
