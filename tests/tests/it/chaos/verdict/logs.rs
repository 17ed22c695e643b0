//! Every log is complete, the same for whoever reads it, and byte for byte what the builders wrote.

use anyhow::{Context as _, Result};
use kiln_domain::failure::FailureReason;
use kiln_domain::id::{BuildId, RunId};
use kiln_domain::record::{Record, State};
use kiln_domain::source::Source;
use kiln_proto::kiln_v1 as api;

use super::{Evidence, Problem};
use crate::chaos::callers::{Answer, Seen, insist};
use crate::chaos::sources::{printed, secret};

pub(super) async fn check(evidence: &Evidence<'_>) -> Result<Vec<Problem>> {
    let mut problems = Vec::new();
    let clients = evidence.world.clients()?;
    for (id, record) in &evidence.records {
        // Each gateway is asked, and none may need to wait.
        for gateway in 0..clients.len() {
            match read(&clients, gateway, id).await? {
                (_, false) => problems.push(Problem::of(id, "its log is not complete")),
                (log, true) => {
                    problems.extend(differs(evidence, record, &log).map(|text| Problem::of(id, text)));
                }
            }
        }
        problems.extend(holds_what_was_printed(evidence, record).map(|text| Problem::of(id, text)));
    }
    for Seen { answer, .. } in evidence.seen {
        let Answer::Build { last, logs, .. } = answer else { continue };
        let id: BuildId = last.id.parse()?;
        let Some(record) = evidence.records.get(&id) else { continue };
        for log in logs {
            let text = differs(evidence, record, log).map(|text| format!("as a follower read it, {text}"));
            problems.extend(text.map(|text| Problem::of(&id, text)));
        }
    }
    Ok(problems)
}

async fn read(
    clients: &[api::builds_client::BuildsClient<tonic::transport::Channel>],
    gateway: usize,
    id: &BuildId,
) -> Result<(Vec<u8>, bool)> {
    let client = clients.get(gateway..=gateway).context("a gateway")?;
    let request = api::BuildLogsRequest { id: id.to_string(), follow: false, start: None };
    let mut chunks =
        insist(client, 0, async |mut client: api::builds_client::BuildsClient<tonic::transport::Channel>| {
            client.build_logs(request.clone()).await
        })
        .await?;
    let (mut log, mut complete) = (Vec::new(), false);
    while let Some(chunk) = chunks.message().await? {
        log.extend_from_slice(&chunk.content);
        complete |= chunk.complete;
    }
    Ok((log, complete))
}

/// Whether a log is not what the builders wrote, with what the relay has to say.
fn differs(evidence: &Evidence<'_>, record: &Record, log: &[u8]) -> Option<String> {
    // Of a builder that wrote nothing the journal doesn't tell whether it had begun.
    let differ = ["started", "wrote anything"].map(|before| compare(log, &written(evidence, record, before)));
    let [first, second] = differ;
    first.filter(|_| second.is_some())
}

/// What the log of a build must be: the outputs of its attempts, with a line of the relay between them and maybe at the
/// end, and the secret masked.
fn written(evidence: &Evidence<'_>, record: &Record, before: &str) -> Vec<u8> {
    let mut log: Vec<u8> = Vec::new();
    for attempt in 1..=record.attempt {
        if attempt > 1 {
            if log.last().is_some_and(|last| *last != b'\n') {
                log.push(b'\n');
            }
            let line = format!("kiln: attempt {} was lost; attempt {attempt} follows\n", attempt - 1);
            log.extend_from_slice(line.as_bytes());
        }
        let output = evidence.outputs.get(&RunId::new(&record.id, attempt));
        log.extend_from_slice(output.map_or(&[], Vec::as_slice));
    }
    let spoke = evidence.outputs.get(&record.run()).is_some_and(|output| !output.is_empty());
    if let Some(words) = last_words(record, spoke, before) {
        if log.last().is_some_and(|last| *last != b'\n') {
            log.push(b'\n');
        }
        log.extend_from_slice(format!("kiln: {words}\n").as_bytes());
    }
    // Outputs are text here.
    let Ok(text) = String::from_utf8(log) else { return Vec::new() };
    image_of(record).map_or(text.clone(), |number| text.replace(&secret(number), "***")).into_bytes()
}

/// What the relay says where the last builder's output, if there is any, does not tell how the build ended.
fn last_words(record: &Record, spoke: bool, before: &str) -> Option<String> {
    let what = match record.attempt {
        1 => "it".to_owned(),
        attempt => format!("attempt {attempt}"),
    };
    match (record.state, record.reason) {
        (State::Cancelled, _) if !spoke => Some(format!("the build was cancelled before {what} {before}")),
        (State::Failed, _) if !spoke => {
            Some(format!("the build failed before {what} {before}: {}", record.message))
        }
        (State::Failed, Some(FailureReason::EngineLost)) => {
            Some(format!("the build failed: {}", record.message))
        }
        (State::Succeeded, _) if !spoke && record.attempt == 1 => {
            Some("nothing was run: the image was there".into())
        }
        _ => None,
    }
}

/// The image's number in the plan.
fn image_of(record: &Record) -> Option<usize> {
    let Source::Dockerfile(source) = &record.source else { return None };
    source.build_args.get("IMAGE")?.parse().ok()
}

fn compare(log: &[u8], expected: &[u8]) -> Option<String> {
    if log == expected {
        return None;
    }
    let same = log.iter().zip(expected).take_while(|(a, b)| a == b).count();
    let from = |bytes: &[u8]| {
        let rest = &bytes[same.saturating_sub(40)..];
        String::from_utf8_lossy(&rest[..rest.len().min(200)]).into_owned()
    };
    Some(format!(
        "its log of {} bytes and the builders' {} bytes differ from byte {same} on: {:?}, not {:?}",
        log.len(),
        expected.len(),
        from(log),
        from(expected)
    ))
}

/// Outputs are looked at themselves, too: they could be lost with the log.
fn holds_what_was_printed(evidence: &Evidence<'_>, record: &Record) -> Option<String> {
    let number = image_of(record)?;
    let printed = printed(number, *evidence.plan.images.get(number)?);
    let output = evidence.outputs.get(&record.run());
    let output = String::from_utf8_lossy(output.map_or(&[], Vec::as_slice)).into_owned();
    if record.state == State::Succeeded && output.is_empty() {
        return Some("it succeeded, and its last run left no output".into());
    }
    // Nothing is printed where only the copy was left to be made, or the build tool knew the step already.
    let last_step = output.rsplit("\nSTEP ").next().unwrap_or_default();
    let ran = output.contains("kiln: pushing") && !last_step.contains("\n--> Using cache");
    // buildah 1.28 itself loses a step's output now and then under load: what it passes on is what the log must hold.
    let times = output.matches(&printed).count();
    let wrong = if evidence.plan.images.get(number)?.kind.is_played() { times != 1 } else { times > 1 };
    (ran && wrong)
        .then(|| format!("its step printed {} bytes, and the output lacks them: {output:?}", printed.len()))
}

#[test]
fn a_log_that_differs_is_seen() {
    assert_eq!(compare(b"abc", b"abc"), None);
    for log in ["ab", "abcd", "abd", "aabc", ""] {
        assert!(compare(log.as_bytes(), b"abc").is_some(), "{log}");
    }
}
