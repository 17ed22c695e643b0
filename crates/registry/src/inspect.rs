//! An examination of a registry: does it answer, and does it take what is pushed to a repository.

use std::time::Duration;

use kiln_domain::finding::Finding;
use kiln_domain::reference::ImageReference;

use crate::access::Access;
use crate::error::Error;
use crate::http::Config;
use crate::repository::Repository;
use crate::{OciRegistry, Registry as _, blob};

const PATIENCE: Duration = Duration::from_secs(2);
const TIME: Duration = Duration::from_secs(8);
/// A tag that nobody pushes.
const NO_TAG: &str = "kiln-doctor";

/// Examines a repository, `registry/name`, without credentials: an installation has none, they come with each request.
pub async fn repository(config: Config, repository: &str) -> Finding {
    let part = format!("registry {repository}");
    let reference: ImageReference = match format!("{repository}:{NO_TAG}").parse() {
        Ok(reference) => reference,
        Err(error) => {
            return Finding::problem(
                part,
                format!("it is no repository: {error}"),
                "see `kiln check-config FILE`",
            );
        }
    };
    let access = Access { patience: PATIENCE, ..Access::anonymous(TIME) };
    let registry = OciRegistry::new(config);
    match registry.digest(&reference, &access).await {
        Ok(_) | Err(Error::NotFound { .. }) => {}
        Err(Error::Unauthenticated { .. } | Error::Denied { .. }) => {
            return Finding::ok(
                part,
                "it answers, and wants credentials, which requests bring; not tried further",
            );
        }
        Err(error) => return trouble(part, &error, &reference),
    }
    let writable =
        async { blob::may_upload(&Repository::target(&registry, &reference, None, &access)?).await };
    match access.in_time(reference.registry(), writable).await {
        Ok(()) => Finding::ok(part, "it answers, and takes uploads"),
        Err(Error::Unauthenticated { .. } | Error::Denied { .. }) => {
            Finding::ok(part, "it answers; to push it wants credentials, which requests bring")
        }
        Err(error @ (Error::Unavailable { .. } | Error::Limited { .. })) => trouble(part, &error, &reference),
        Err(error) => Finding::problem(
            part,
            format!("it answers, and takes no upload: {error}"),
            "make the repository, if that registry wants it, or see whether it is read-only or full",
        ),
    }
}

fn trouble(part: String, error: &Error, reference: &ImageReference) -> Finding {
    let host = reference.registry();
    match error {
        Error::Limited { .. } => Finding::warning(part, error.to_string(), "wait, or ask for a higher limit"),
        _ => Finding::problem(
            part,
            error.to_string(),
            format!(
                "see whether {host} runs and can be reached from here; where it speaks no TLS, name it in `plain_http` of \
                 the resolver and the orchestrator"
            ),
        ),
    }
}
