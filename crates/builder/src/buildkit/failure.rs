//! What buildctl's last words mean, and whose fault it was.

use kiln_domain::failure::{Failure, FailureReason};
use kiln_domain::reference::ImageReference;
use kiln_domain::step::Step;

use crate::registry_error::{RegistryError, asked};
use crate::tool::ToolError;

/// Words that only the loss of the daemon, or of the connection to it, brings.
const LOST: [&str; 6] = [
    "listing workers for Build: failed to list workers",
    "rpc error: code = Unavailable",
    "error reading from server: EOF",
    "transport is closing",
    "no active session for",
    "closing transport due to: connection error",
];

/// A build that failed. `words`: what buildctl said besides progress; `step`: which failed, where one did; `exhausted`: the
/// memory limit that was hit meanwhile; `pushed_to`: where the image was to go.
pub(super) fn of_build(
    words: &str,
    step: Option<&Step>,
    exhausted: Option<String>,
    pushed_to: &ImageReference,
) -> ToolError {
    let error = error_of(words);
    let failed = |reason, message: String| ToolError::Failed(Failure::new(reason, message));
    if error.is_empty() {
        return ToolError::Lost("buildctl ended without a reason".into());
    }
    if LOST.iter().any(|lost| error.contains(lost)) {
        return ToolError::Lost(format!("BuildKit's daemon is gone: {error}"));
    }
    let named = step.map_or_else(|| "the build".to_owned(), Step::label);
    // The command's own text comes first, and may say anything: what became of it stands last.
    if let Some((_, told)) = error.rsplit_once("did not complete successfully: ") {
        let code = told
            .strip_prefix("exit code: ")
            .and_then(|code| code.split([':', ' ']).next()?.parse::<i32>().ok());
        return match (code, exhausted) {
            (_, Some(limit)) if code == Some(137) || told.contains("cannot allocate memory") => failed(
                FailureReason::OutOfMemory,
                format!("{named} was killed for its memory; what it ran into is {limit}"),
            ),
            (Some(code), _) => {
                failed(FailureReason::Dockerfile, format!("{named} failed with exit code {code}"))
            }
            (None, _) => failed(FailureReason::Dockerfile, format!("{named} failed: {told}")),
        };
    }
    if error.contains("no space left on device") {
        return failed(FailureReason::Internal, format!("{named}: the build tool's disk is full: {error}"));
    }
    if error.contains("denied by policy") {
        let message = format!(
            "{named}: the image may not be pulled: its registry did not confirm it to this build's credentials: {error}"
        );
        return failed(FailureReason::RegistryDenied, message);
    }
    let pushing = error.starts_with("failed to push ");
    let named = if pushing { format!("cannot push `{}`", pushed_to.name()) } else { named };
    // A step that isn't a FROM speaks of files and URLs, which may be denied too.
    let of_registry = step.is_none_or(|step| step.name.starts_with("FROM "));
    match RegistryError::told_by(&error).filter(|_| of_registry) {
        Some(RegistryError::Denied) => failed(
            FailureReason::RegistryDenied,
            if pushing {
                format!("{named}: {error}")
            } else {
                format!("{named}: the image may not be pulled: {error}")
            },
        ),
        Some(RegistryError::Refused) => ToolError::Refused {
            registry: if pushing {
                Some(pushed_to.registry().to_owned())
            } else {
                asked(&error).map(str::to_owned)
            },
            failure: Failure::new(FailureReason::RegistryUnavailable, format!("{named}: {error}")),
        },
        Some(RegistryError::Unavailable) => {
            failed(FailureReason::RegistryUnavailable, format!("{named}: {error}"))
        }
        _ if error.contains("failed to resolve source metadata") && error.ends_with(": not found") => {
            failed(FailureReason::Dockerfile, format!("{named}: the image is not there: {error}"))
        }
        _ if step.is_some() => failed(FailureReason::Dockerfile, format!("{named} failed: {error}")),
        _ if is_dockerfile_error(words, &error) => {
            failed(FailureReason::Dockerfile, format!("the Dockerfile cannot be built: {error}"))
        }
        _ => failed(FailureReason::Internal, format!("BuildKit failed: {error}")),
    }
}

/// The frontend shows the lines of the Dockerfile that it complains of; some complaints are of none.
fn is_dockerfile_error(words: &str, error: &str) -> bool {
    let shows_lines = words.contains("\n--------------------\n") && words.contains(" >>> ");
    shows_lines
        || [
            "dockerfile parse error",
            "target stage",
            "the Dockerfile cannot be empty",
            "failed to calculate checksum",
        ]
        .iter()
        .any(|text| error.contains(text))
}

/// buildctl's last `error: …`, in one line and without the names of things inside the daemon.
fn error_of(words: &str) -> String {
    let begin =
        words.rfind("\nerror: ").map(|at| at + 1).or_else(|| words.starts_with("error: ").then_some(0));
    let error = begin.and_then(|at| words.get(at..)?.strip_prefix("error: ")).unwrap_or_default();
    let error = error.strip_prefix("failed to solve: ").unwrap_or(error);
    let error = match error.split_once("failed to calculate checksum of ref ") {
        Some((_, reference)) => reference.split_once(": ").map_or(error, |(_, told)| told),
        None => error,
    };
    error.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINES: &str = "\nDockerfile:2\n--------------------\n   2 | >>> X\n--------------------\n";

    #[test]
    fn whose_fault_it_was() {
        use FailureReason::{Dockerfile, Internal, OutOfMemory, RegistryDenied, RegistryUnavailable};
        let run = Step {
            number: 2,
            of: 3,
            name: "RUN make".into(),
            started_at: jiff::Timestamp::UNIX_EPOCH,
            duration_ms: None,
            cached: false,
        };
        let exit =
            |code| format!("process \"/bin/sh -c make\" did not complete successfully: exit code: {code}");
        for (error, step, exhausted, reason, part) in [
            (exit(9), true, None, Dockerfile, "step 2/3 `RUN make` failed with exit code 9"),
            (exit(137), true, Some("8 MiB"), OutOfMemory, "8 MiB"),
            (exit(1), true, Some("8 MiB"), Dockerfile, "exit code 1"),
            (
                "process \"connect: connection refused\" did not complete successfully: exit code: 3".into(),
                true,
                None,
                Dockerfile,
                "code 3",
            ),
            (
                "failed to compute cache key: failed to calculate checksum of ref a::b: \"/nope\": not found".into(),
                false,
                None,
                Dockerfile,
                "built: \"/nope\": not found",
            ),
            ("lstat /secret: permission denied".into(), true, None, Dockerfile, "step 2/3 `RUN make` failed: lstat"),
            ("failed to copy: write /x: no space left on device".into(), false, None, Internal, "disk is full"),
            ("dockerfile parse error on line 2: unknown instruction: X".into(), false, None, Dockerfile, "line 2"),
            ("base name ($X) should not be blank".into(), false, None, Dockerfile, "($X)"),
            (
                "h/x:1: failed to resolve source metadata for h/x:1: h/x:1: not found".into(),
                false,
                None,
                Dockerfile,
                "not there",
            ),
            (
                "h/x:1: failed to resolve source metadata for h/x:1: pull access denied, repository does not exist or may require authorization: server message: insufficient_scope: authorization failed".into(),
                false,
                None,
                RegistryDenied,
                "may not be pulled",
            ),
            ("source \"docker-image://h/x@sha256:0\" denied by policy".into(), false, None, RegistryDenied, "confirm"),
            (
                "failed to push h/x: unexpected status from HEAD request to https://h/v2/x: 401 Unauthorized".into(),
                false,
                None,
                RegistryDenied,
                "cannot push `r:1/base`",
            ),
            ("failed to do request: Head \"https://h/v2/\": lookup h: no such host".into(), false, None, RegistryUnavailable, "no such host"),
        ] {
            let words = format!("{LINES}error: failed to solve: {error}\n");
            let told = of_build(&words, step.then_some(&run), exhausted.map(str::to_owned), &"r:1/base:t".parse().unwrap());
            let failure = told.into_failure();
            assert_eq!(failure.reason, reason, "{error}: {failure}");
            assert!(failure.message.contains(part) && !failure.message.contains("a::b"), "{failure}");
        }
        let other = of_build("error: failed to solve: odd\n", None, None, &"r:1/base:t".parse().unwrap());
        assert_eq!(other.into_failure().reason, Internal);
    }

    #[test]
    fn what_is_worth_another_try() {
        let of =
            |error: &str| of_build(&format!("error: {error}\n"), None, None, &"r:1/base:t".parse().unwrap());
        for (error, registry) in [
            (
                "failed to solve: failed to push r:1/base: failed to do request: Head \"https://r:1/v2/\": dial tcp 10.0.0.1:1: connect: connection refused",
                "r:1",
            ),
            (
                "failed to solve: failed to do request: Head \"http://h:5/v2/x/manifests/1\": dial tcp 10.0.0.2:5: connect: connection refused",
                "h:5",
            ),
        ] {
            assert!(matches!(of(error), ToolError::Refused { registry: Some(told), .. } if told == registry));
        }
        for error in [
            "failed to receive status: rpc error: code = Unavailable desc = error reading from server: EOF",
            "listing workers for Build: failed to list workers: Unavailable: connection error",
            "",
        ] {
            assert!(matches!(of(error), ToolError::Lost(_)), "{error}");
        }
    }
}
