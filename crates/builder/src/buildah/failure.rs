//! What buildah's last words mean, and whose fault it was.

use std::os::unix::process::ExitStatusExt;

use kiln_domain::failure::{Failure, FailureReason};
use kiln_domain::reference::ImageReference;
use kiln_domain::step::Step;

use crate::children::Finished;
use crate::registry_error::{RegistryError as Registry, asked};
use crate::tool::ToolError;

/// What buildah 1.28 says in its `chroot` isolation of a step whose own process was killed; it gives it exit status 1.
const STEP_KILLED: &str = "subprocess exited on killed";
/// SIGKILL.
const KILLED: i32 = 9;

/// A build that failed. `work` is cut out of the message; `exhausted` names the memory limit if one was hit meanwhile.
pub(super) fn of_build(
    ended: &Finished,
    work: &str,
    step: Option<&Step>,
    exhausted: Option<String>,
) -> ToolError {
    let error = last_error(&ended.tail)
        .replace(&format!("{work}/source/"), "")
        .replace(&format!("{work}/source"), ".");
    let error = without_dump(&error.replace(work, "")).to_owned();
    let failed = |reason, message: String| ToolError::Failed(Failure::new(reason, message));
    let named = step.map_or_else(|| "the build".to_owned(), Step::label);
    if let Some(at_step) = error.strip_prefix("building at STEP ") {
        // The step's own text comes first, and may say anything: an exit status is what stands last.
        let code = at_step.rsplit_once("exit status ").and_then(|(_, code)| code.trim().parse::<i32>().ok());
        let killed = code == Some(137)
            || at_step.ends_with("signal: killed")
            || ended.tail.lines().any(|line| line == STEP_KILLED);
        let told = at_step.split_once("\": ").map_or(at_step, |(_, told)| told);
        return match (code, exhausted) {
            (_, Some(limit)) if killed => failed(
                FailureReason::OutOfMemory,
                format!("{named} was killed for its memory; what it ran into is {limit}"),
            ),
            // Something beneath it may have been: a compiler that `make` started.
            (Some(code), Some(limit)) => failed(
                FailureReason::Dockerfile,
                format!(
                    "{named} failed with exit code {code}; meanwhile a process was killed for its memory, and what it ran into is {limit}"
                ),
            ),
            (Some(code), None) => {
                failed(FailureReason::Dockerfile, format!("{named} failed with exit code {code}"))
            }
            (None, _) if told.contains("no space left on device") => {
                failed(FailureReason::Internal, format!("{named}: {told}"))
            }
            (None, _) => failed(FailureReason::Dockerfile, format!("{named} failed: {told}")),
        };
    }
    if error.is_empty() {
        return match exhausted.filter(|_| ended.status.signal() == Some(KILLED)) {
            // The kernel chooses what it kills: here it was not the step, but the tool that runs it.
            Some(limit) => failed(
                FailureReason::OutOfMemory,
                format!("buildah was killed for its memory at {named}; what it ran into is {limit}"),
            ),
            None => failed(FailureReason::Internal, ended_oddly(ended)),
        };
    }
    match Registry::told_by(&error) {
        Some(Registry::Missing) => {
            failed(FailureReason::Dockerfile, format!("{named}: the image is not there: {error}"))
        }
        Some(Registry::Denied) => {
            failed(FailureReason::RegistryDenied, format!("{named}: the image may not be pulled: {error}"))
        }
        Some(Registry::Refused) => ToolError::Refused {
            registry: asked(&error).map(str::to_owned),
            failure: Failure::new(FailureReason::RegistryUnavailable, error),
        },
        Some(Registry::Unavailable) => failed(FailureReason::RegistryUnavailable, error),
        None if is_dockerfile_error(&error) => {
            failed(FailureReason::Dockerfile, format!("the Dockerfile cannot be built: {error}"))
        }
        None => failed(FailureReason::Internal, format!("buildah failed: {error}")),
    }
}

/// Without the dump of its own structures that buildah puts behind some messages.
fn without_dump(error: &str) -> &str {
    const DUMPS: [&str; 4] = [" {Value:", " &imagebuilder.", "copier.request{", "(*idtools."];
    let end = DUMPS.iter().filter_map(|dump| error.find(dump)).min();
    let text = end.and_then(|end| error.get(..end)).unwrap_or(error);
    if end.is_some() { text.trim_end().trim_end_matches([':', '"', '(', '{']).trim_end() } else { text }
}

/// A push that failed.
pub(super) fn of_push(ended: &Finished, to: &ImageReference) -> ToolError {
    let error = last_error(&ended.tail);
    let told = if error.is_empty() { ended_oddly(ended) } else { error.clone() };
    let failure = |reason| Failure::new(reason, format!("cannot push `{to}`: {told}"));
    match Registry::told_by(&error) {
        Some(Registry::Denied) => ToolError::Failed(failure(FailureReason::RegistryDenied)),
        Some(Registry::Refused) => ToolError::Refused {
            registry: Some(to.registry().to_owned()),
            failure: failure(FailureReason::RegistryUnavailable),
        },
        Some(Registry::Unavailable) => ToolError::Failed(failure(FailureReason::RegistryUnavailable)),
        Some(Registry::Missing) | None => ToolError::Failed(failure(FailureReason::Internal)),
    }
}

fn is_dockerfile_error(error: &str) -> bool {
    [
        "no FROM statement",
        "no stages to build",
        "no contents in",
        "was not found in the provided Dockerfile",
        "invalid reference format",
        "repository name must be lowercase",
        "resolving step {",
        "nknown instruction",
        "parse error",
        "parsing",
        "syntax error",
        "no stage or image found",
        "referred to by ID",
        "short-name",
        "requires",
        "unknown flag",
        "no matching",
        "choosing an image from manifest list",
    ]
    .iter()
    .any(|text| error.contains(text))
}

/// The last `Error: …` to the end, in one line.
fn last_error(tail: &str) -> String {
    let begin = tail.rfind("\nError: ").map(|at| at + 1).or_else(|| tail.starts_with("Error: ").then_some(0));
    let error = begin
        .and_then(|at| tail.get(at..))
        .and_then(|error| error.strip_prefix("Error: "))
        .unwrap_or_default();
    error.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn ended_oddly(ended: &Finished) -> String {
    match ended.status.signal() {
        Some(signal) => format!("buildah was killed by signal {signal}"),
        None => format!("buildah ended without a reason ({})", ended.status),
    }
}

#[cfg(test)]
mod tests {
    use std::process::ExitStatus;

    use super::*;

    #[test]
    fn whose_fault_it_was() {
        use FailureReason::{Dockerfile, Internal, OutOfMemory, RegistryDenied, RegistryUnavailable};
        let step = Step {
            number: 2,
            of: 3,
            name: "RUN make".into(),
            started_at: jiff::Timestamp::UNIX_EPOCH,
            duration_ms: None,
            cached: false,
        };
        for (tail, exhausted, reason, part) in [
            (
                "out\nError: building at STEP \"RUN make\": exit status 9\n",
                None,
                Dockerfile,
                "step 2/3 `RUN make` failed with exit code 9",
            ),
            (
                "Error: building at STEP \"RUN x\": while running runtime: exit status 1",
                None,
                Dockerfile,
                "exit code 1",
            ),
            ("Error: building at STEP \"RUN make\": exit status 137", Some("8 MiB"), OutOfMemory, "8 MiB"),
            (
                "Error: building at STEP \"RUN make\": exit status 1",
                Some("8 MiB"),
                Dockerfile,
                "exit code 1; meanwhile a process was killed for its memory, and what it ran into is 8 MiB",
            ),
            (
                "subprocess exited on killed\nsubprocess exited with status 1\nError: building at STEP \"RUN x\": exit status 1",
                Some("8 MiB"),
                OutOfMemory,
                "killed for its memory; what it ran into is 8 MiB",
            ),
            (
                "subprocess exited on killed\nsubprocess exited with status 1\nError: building at STEP \"RUN x\": exit status 1",
                None,
                Dockerfile,
                "exit code 1",
            ),
            (
                "Error: building at STEP \"RUN echo connect: connection refused\": exit status 3",
                None,
                Dockerfile,
                "code 3",
            ),
            (
                "Error: building at STEP \"COPY a b\": checking on sources under \"/w/source\": copier: stat: \"/a\": no such file or directory",
                None,
                Dockerfile,
                "\"/a\": no such file",
            ),
            (
                "Error: building at STEP \"COPY a b\": write /x: no space left on device",
                None,
                Internal,
                "no space",
            ),
            ("Error: no FROM statement found", None, Dockerfile, "no FROM"),
            ("Error: The target \"zz\" was not found in the provided Dockerfile", None, Dockerfile, "zz"),
            (
                "Error: creating build container: initializing source docker://h/x:1: reading manifest 1 in h/x: manifest unknown: manifest unknown",
                None,
                Dockerfile,
                "not there",
            ),
            (
                "Error: creating build container: initializing source docker://h/x:1: reading manifest 1 in h/x: unauthorized: authentication required",
                None,
                RegistryDenied,
                "may not be pulled",
            ),
            (
                "Error: creating build container: pinging container registry h: dial tcp: lookup h: no such host",
                None,
                RegistryUnavailable,
                "no such host",
            ),
            ("", None, Internal, "signal 9"),
            (
                "",
                Some("8 MiB"),
                OutOfMemory,
                "buildah was killed for its memory at step 2/3 `RUN make`; what it ran into is 8 MiB",
            ),
        ] {
            let ended = Finished { status: ExitStatus::from_raw(9), tail: tail.into() };
            let failure = of_build(&ended, "/w", Some(&step), exhausted.map(str::to_owned)).into_failure();
            assert_eq!(failure.reason, reason, "{tail}: {failure}");
            assert!(failure.message.contains(part) && !failure.message.contains("/w"), "{failure}");
        }
    }

    #[test]
    fn only_refused_connections_are_worth_another_try() {
        let ended =
            |text: &str| Finished { status: ExitStatus::from_raw(256), tail: format!("Error: {text}") };
        let to = "127.0.0.1:1/x:y".parse().unwrap();
        let refused = |error| match error {
            ToolError::Refused { registry, .. } => registry,
            other => panic!("{other}"),
        };
        let error = of_push(&ended("dial tcp 127.0.0.1:1: connect: connection refused"), &to);
        assert_eq!(refused(error).as_deref(), Some("127.0.0.1:1"));
        for (text, registry) in [
            (
                "creating build container: initializing source docker://r:5000/x:1: pinging container registry r:5000: Get \"https://r:5000/v2/\": dial tcp 10.0.0.1:5000: connect: connection refused",
                Some("r:5000"),
            ),
            (
                "reading blob: Get \"http://[::1]:5000/v2/x/blobs/y\": dial tcp [::1]:5000: connect: connection refused",
                Some("[::1]:5000"),
            ),
            ("dial tcp 10.0.0.1:5000: connect: connection refused", None),
        ] {
            let error = of_build(&ended(text), "/w", None, None);
            assert_eq!(refused(error).as_deref(), registry, "{text}");
        }
        assert!(matches!(of_push(&ended("unauthorized: no"), &to), ToolError::Failed(_)));
    }
}
