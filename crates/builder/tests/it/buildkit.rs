//! Builds by BuildKit, where that is there.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use kiln_domain::failure::FailureReason::{Dockerfile, RegistryDenied};
use kiln_domain::reference::Digest;
use kiln_domain::run::{RunSecrets, Work};
use kiln_domain::run_folder::{self, Builder};
use kiln_testkit::registry::{DockerRegistry, PASSWORD, USERNAME};
use kiln_testkit::workshop::Workshop;

use crate::run::{Run, failed, pushed, run};

/// Of a stage without a shell of its own.
const SHELL: &str = "FROM scratch AS shell\nCOPY busybox /bin/sh\n";

#[tokio::test(flavor = "multi_thread")]
async fn an_image_with_its_steps_bases_and_secrets() -> Result<()> {
    let Some(workshop) = Workshop::with_buildkit(kiln_builder::missing).await? else { return Ok(()) };
    let repository = workshop.repository(&[("Dockerfile", SHELL)], &["."])?;
    let spec = workshop.build(&repository, |_| {})?;
    let from = spec.target_ref.clone();
    let base = pushed(&run(&workshop, &spec, &RunSecrets::default())?.0)?;

    let dockerfile = format!(
        "# syntax=docker/dockerfile:1.7-labs\nARG BASE={}\nFROM $BASE:{} AS one\nARG WORD=none\nRUN <<EOF\necho word=$WORD\n\
         echo secret=$(cat /run/secrets/token)\nprintf 'no line end'\nEOF\nFROM one AS two\nCOPY --from=one /bin/sh /again\n\
         FROM two AS three\nRUN exit 1\n",
        from.name(),
        from.selector()
    )
    .replace("RUN <<", "RUN --mount=type=secret,id=token <<");
    let repository = workshop.repository(&[("docker/file", dockerfile.as_str())], &[])?;
    let build = || {
        workshop.build(&repository, |source| {
            source.path = "docker/file".into();
            source.target = "two".into();
            source.build_args.insert("WORD".into(), "a,\"b\" c=d".into());
        })
    };
    let secret = base64::engine::general_purpose::STANDARD.encode("se,c\"ret");
    let secrets =
        RunSecrets { mounts: BTreeMap::from([("token".into(), secret.into())]), ..Default::default() };
    let spec = build()?;
    let (outcome, output) = run(&workshop, &spec, &secrets)?;
    let digest = pushed(&outcome)?;
    let Work::Build { base_ref, .. } = &spec.work else { unreachable!() };
    for reference in [&spec.target_ref, base_ref] {
        ensure!(workshop.pushed(reference).await? == Some(digest.clone()), "not at {reference}");
    }
    for line in [" word=a,\"b\" c=d\n", " secret=se,c\"ret\n", " no line end\n"] {
        ensure!(output.contains(line), "{line} is not in {output}");
    }
    let bases = &outcome.findings.bases;
    let first = bases.first().context("no base")?;
    ensure!(bases.len() == 1 && first.reference == from.to_string(), "{bases:?}");
    ensure!(first.digest.as_ref() == Some(&base), "{bases:?} is not {base}");
    ensure!(outcome.findings.build_tool == "buildkit");
    let steps = &outcome.findings.steps;
    let names: Vec<_> = steps.iter().map(|step| step.name.split(' ').next().unwrap_or_default()).collect();
    ensure!(names == ["FROM", "RUN", "COPY"], "{steps:?}");
    ensure!(steps.iter().all(|step| step.duration_ms.is_some()), "a step never ended: {steps:?}");

    // The daemon outlives the builder, and its cache with it; nothing of the run is left there or here.
    let (outcome, again) = run(&workshop, &build()?, &secrets)?;
    ensure!(outcome.findings.steps.iter().any(|step| step.cached), "nothing was cached: {again}");
    ensure!(pushed(&outcome)? == digest, "the same source made another image");
    let mut anew = build()?;
    anew.no_cache = true;
    let (outcome, output) = run(&workshop, &anew, &secrets)?;
    pushed(&outcome)?;
    ensure!(output.contains(" word=a,\"b\" c=d\n"), "no_cache took the cache: {output}");
    let mut left = workshop.left(&spec.run)?;
    left.retain(|path| path.ends_with("/work") || path.ends_with(run_folder::SECRETS));
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn whose_fault_it_was() -> Result<()> {
    let Some(workshop) = Workshop::with_buildkit(kiln_builder::missing).await? else { return Ok(()) };
    let missing = workshop.registry.reference("no/such:1")?;
    for (dockerfile, part) in [
        (
            format!("{SHELL}RUN echo last words; exit 9\n"),
            "step 2/2 `RUN echo last words; exit 9` failed with exit code 9",
        ),
        (format!("{SHELL}COPY nope /\n"), "\"/nope\": not found"),
        (format!("{SHELL}COPPY a b\n"), "unknown instruction: COPPY"),
        (format!("FROM {missing}\n"), "not there"),
        ("FROM scratch\nRUN x\nFROM\n".into(), "line 3"),
        (String::new(), "cannot be empty"),
        ("# syntax=evil.test/frontend:1\nFROM scratch\n".into(), "`# syntax=evil.test/frontend:1`"),
    ] {
        let repository = workshop.repository(&[("Dockerfile", dockerfile.as_str())], &["."])?;
        let spec = workshop.build(&repository, |_| {})?;
        let (outcome, output) = run(&workshop, &spec, &RunSecrets::default())?;
        let failure = failed(&outcome, Dockerfile).with_context(|| format!("{dockerfile}: {output}"))?;
        ensure!(failure.message.contains(part), "{dockerfile}: {failure}");
        ensure!(workshop.pushed(&spec.target_ref).await?.is_none());
    }
    Ok(())
}

/// What one build's credentials brought into the daemon is not for another that has none.
#[tokio::test(flavor = "multi_thread")]
async fn credentials_are_one_builds_own() -> Result<()> {
    let Some(open) = Workshop::with_buildkit(kiln_builder::missing).await? else { return Ok(()) };
    let private = DockerRegistry::start_with_password().await?;
    let digest: Digest = private.push_image("lib/base:1", "linux/amd64", &[("x", b"y")]).await?;
    let image = private.reference("lib/base:1")?;
    let mut secrets = RunSecrets::default();
    secrets.registries.insert(private.address().into(), format!("{USERNAME}:{PASSWORD}").into());
    let pinned = image.pinned(&digest);
    for dockerfile in [
        format!("FROM {image}\nCOPY Dockerfile /\n"),
        format!("FROM {pinned}\nCOPY Dockerfile /\n"),
        format!("FROM scratch\nCOPY --from={pinned} x /\n"),
    ] {
        let repository = open.repository(&[("Dockerfile", dockerfile.as_str())], &[])?;
        let spec = open.build(&repository, |_| {})?;
        let mut with = Run::prepare(&open, &spec, &secrets)?;
        with.start()?;
        ensure!(with.wait()? == Some(0), "{}", with.output());
        let told = with.output() + &serde_json::to_string(&with.outcome()?)?;
        ensure!(!told.contains(PASSWORD), "the password shows");

        let (without, output) = run(&open, &open.build(&repository, |_| {})?, &RunSecrets::default())?;
        failed(&without, RegistryDenied).with_context(|| format!("{dockerfile}: {output}"))?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn buildah_refuses_a_heredoc_by_its_name() -> Result<()> {
    let workshop = Workshop::new().await?.using(Builder::Buildah);
    let repository = workshop.repository(&[("Dockerfile", "FROM scratch\nCOPY <<EOF /x\ny\nEOF\n")], &[])?;
    let (outcome, _) = run(&workshop, &workshop.build(&repository, |_| {})?, &RunSecrets::default())?;
    let failure = failed(&outcome, Dockerfile)?;
    ensure!(failure.message.contains("heredoc in line 2"), "{failure}");
    Ok(())
}
