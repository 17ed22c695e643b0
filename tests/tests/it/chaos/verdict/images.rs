//! A build's state says what it put into the registry, by the registry's own log.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use kiln_domain::failure::FailureReason;
use kiln_domain::id::{BuildId, RunId};
use kiln_domain::limits;
use kiln_domain::record::{Record, State};
use kiln_domain::reference::ImageReference;
use kiln_domain::source::Source;
use kiln_testkit::registry::Put;

use super::{Evidence, Problem};
use crate::chaos::callers::{Answer, Seen};
use crate::chaos::faults::Done;
use crate::chaos::plan::Kind;

pub(super) async fn check(evidence: &Evidence<'_>) -> Result<Vec<Problem>> {
    let mut problems = Vec::new();
    let mut puts: BTreeMap<String, Vec<Put>> = BTreeMap::new();
    for put in evidence.world.workshop.registry.puts()? {
        puts.entry(put.path.clone()).or_default().push(put);
    }
    // The last digest that a build of the target said it had put there.
    let mut there: BTreeMap<&str, Option<String>> = BTreeMap::new();
    let mut builds: Vec<&Record> = evidence.records.values().collect();
    builds.sort_by_key(|record| record.queued_at);
    for record in builds {
        let put = take_puts(record, &mut puts)?;
        problems.extend(of_one_run(&record.id, &put).map(|text| Problem::of(&record.id, text)));
        match (record.state, put.len()) {
            (State::Succeeded, 0) => problems.push(Problem::of(&record.id, "nothing was put at its target")),
            (State::Failed | State::Cancelled, 1..) => {
                problems.push(Problem::of(&record.id, format!("{}, and its image was put", record.state)));
            }
            _ => {}
        }
        problems.extend(plausible(evidence, record).map(|text| Problem::of(&record.id, text)));
        let last = there.entry(&record.target_ref).or_default();
        if let Some(digest) = &record.digest {
            *last = Some(digest.to_string());
        }
    }
    for put in puts.values().flatten().filter(|put| put.path.contains("/workspace/")) {
        problems.push(Problem::new(format!("{put:?}, when no build of it was on")));
    }
    for record in evidence.records.values() {
        let target: ImageReference = record.target_ref.parse()?;
        let found = evidence.world.workshop.pushed(&target).await?.map(|digest| digest.to_string());
        if there.get(record.target_ref.as_str()) != Some(&found) {
            let text = format!("its target has {found:?}, and the journal says {there:?}");
            problems.push(Problem::of(&record.id, text));
        }
    }
    for Seen { request, answer } in evidence.seen {
        let Answer::AlreadyBuilt(already) = answer else { continue };
        let of_builds = evidence.records.values().any(|record| {
            record.target_ref == already.r#ref
                && record.digest.as_ref().is_some_and(|digest| digest.as_str() == already.digest)
        });
        if !of_builds {
            problems
                .push(Problem::new(format!("request {request} was told of {already:?}, which nobody built")));
        }
    }
    Ok(problems)
}

/// What was put at the target while the build was on; what is left in `puts` was put by no build. Builds of one image follow
/// each other, so it was this build.
fn take_puts(record: &Record, puts: &mut BTreeMap<String, Vec<Put>>) -> Result<Vec<Put>> {
    let target: ImageReference = record.target_ref.parse()?;
    let path = format!("/v2/{}/manifests/{}", target.repository(), target.selector());
    let Some(puts) = puts.get_mut(&path) else { return Ok(Vec::new()) };
    let on = |put: &mut Put| {
        record.queued_at.is_some_and(|queued| queued <= put.at)
            && record.finished_at.is_none_or(|finished| put.at <= finished)
    };
    Ok(puts.extract_if(.., on).collect())
}

/// What is wrong with who put a build's target. No two of its runs may: once one of them may have, the build ends by what the
/// registry shows. (A run may well do it again, when the answer was lost.)
fn of_one_run(build: &BuildId, puts: &[Put]) -> Option<String> {
    let run = |put: &Put| {
        let (_, rest) = put.user_agent.split_once("(run ")?;
        rest.strip_suffix(')')?.parse::<RunId>().ok().filter(|run| run.build() == *build)
    };
    let runs: BTreeSet<Option<RunId>> = puts.iter().map(run).collect();
    (runs.len() > 1 || runs.contains(&None)).then(|| format!("not one of its runs put its target: {puts:?}"))
}

/// Whether the end is one that its Dockerfile and the faults explain.
fn plausible(evidence: &Evidence<'_>, record: &Record) -> Option<String> {
    let Source::Dockerfile(source) = &record.source else { return Some("it is a copy".into()) };
    let number = source.build_args.get("IMAGE").and_then(|number| number.parse::<usize>().ok());
    let Some(image) = number.and_then(|number| evidence.plan.images.get(number)) else {
        return Some("nobody asked for it".into());
    };
    let explained = match (record.state, record.reason) {
        (State::Succeeded, _) => image.kind != Kind::Failing,
        (State::Cancelled, _) => record.cancel.is_some(),
        (State::Failed, Some(FailureReason::Dockerfile)) => {
            image.kind == Kind::Failing && record.message.contains("exit code 3")
        }
        (State::Failed, Some(FailureReason::EngineLost)) => record.attempt == limits::ATTEMPTS,
        (State::Failed, Some(FailureReason::RegistryUnavailable)) => Done::count(&evidence.done.registry) > 0,
        _ => false,
    };
    (!explained).then(|| {
        format!("{:?} does not end {} for {:?}: {}", image.kind, record.state, record.reason, record.message)
    })
}

#[test]
fn only_one_run_of_a_build_puts_its_target() {
    let build = |number: u8| BuildId::new(&kiln_domain::id::ImageKey::of("a/b:1"), [number; 10]);
    let put =
        |agent: String| Put { at: jiff::Timestamp::UNIX_EPOCH, path: "/v2/a/b".into(), user_agent: agent };
    let run = |number, attempt| put(format!("kiln/0.1.0 (run {})", RunId::new(&build(number), attempt)));
    let wrong = |puts: &[Put]| of_one_run(&build(1), puts).is_some();
    assert!(!wrong(&[]) && !wrong(&[run(1, 2)]) && !wrong(&[run(1, 1), run(1, 1)]));
    assert!(wrong(&[run(1, 1), run(1, 2)]), "two runs");
    assert!(wrong(&[run(2, 1)]), "another build's");
    assert!(wrong(&[run(1, 1), put("curl/8".into())]) && wrong(&[put(String::new())]), "somebody else");
}
