//! Builds that succeed.

use anyhow::{Context as _, Result, ensure};
use kiln_domain::reference::Digest;
use kiln_domain::run::{RunSecrets, Work};
use kiln_domain::run_folder;
use kiln_testkit::registry::{DockerRegistry, PASSWORD, USERNAME};
use kiln_testkit::workshop::{Workshop, git};

use crate::run::{Run, pushed, run};

#[tokio::test(flavor = "multi_thread")]
async fn an_image_with_its_steps_and_bases() -> Result<()> {
    let workshop = Workshop::new().await?;
    let repository =
        workshop.repository(&[("Dockerfile", "FROM scratch\nCOPY busybox /bin/busybox\n")], &["."])?;
    let spec = workshop.build(&repository, |_| {})?;
    let base = pushed(&run(&workshop, &spec, &RunSecrets::default())?.0)?;
    let from = spec.target_ref.clone();
    let (base_name, base_tag) = (from.name(), from.selector());
    let dockerfile = format!(
        "ARG BASE={base_name}\nFROM $BASE:{base_tag} AS one\nARG WORD=none\n\
         RUN [\"/bin/busybox\", \"sh\", \"-c\", \"echo word=$WORD; echo $WORD > /word\"]\n\
         FROM scratch AS two\nCOPY --from=one /word /word\nFROM one AS three\nRUN [\"/nonexistent\"]\n"
    );
    let repository = workshop.repository(&[("docker/file", dockerfile.as_str())], &[])?;
    let spec = workshop.build(&repository, |source| {
        source.path = "docker/file".into();
        source.target = "two".into();
        source.build_args.insert("WORD".into(), "a,\"b\" c=d".into());
    })?;
    let (outcome, output) = run(&workshop, &spec, &RunSecrets::default())?;
    let digest = pushed(&outcome)?;
    ensure!(workshop.pushed(&spec.target_ref).await? == Some(digest.clone()), "not at the target");
    let Work::Build { base_ref, .. } = &spec.work else { unreachable!() };
    ensure!(workshop.pushed(base_ref).await? == Some(digest.clone()), "not at the base ref");

    ensure!(output.starts_with(&format!("kiln: building {} (attempt 1)\n", spec.target_ref)), "{output}");
    ensure!(output.contains("word=a,\"b\" c=d\n"), "{output}");
    let bases = &outcome.findings.bases;
    let first = bases.first().context("no base")?;
    ensure!(bases.len() == 1 && first.reference == from.to_string(), "{bases:?}");
    ensure!(first.digest.as_ref() == Some(&base), "{bases:?} is not {base}");
    ensure!(outcome.findings.build_tool == "buildah");
    let steps: Vec<_> =
        outcome.findings.steps.iter().map(|step| step.name.split(' ').next().unwrap_or_default()).collect();
    ensure!(steps == ["FROM", "ARG", "RUN", "FROM", "COPY"], "{steps:?}");
    ensure!(outcome.findings.steps.iter().all(|step| step.duration_ms.is_some()), "a step never ended");
    ensure!(
        std::fs::read_to_string(workshop.runs().join(spec.run.as_str()).join(run_folder::TARGET_DIGEST))?
            == digest.as_str()
    );

    // A second build of the same takes its layers from the first.
    let again = workshop.build(&repository, |source| {
        source.path = "docker/file".into();
        source.target = "two".into();
        source.build_args.insert("WORD".into(), "a,\"b\" c=d".into());
    })?;
    let (outcome, _) = run(&workshop, &again, &RunSecrets::default())?;
    ensure!(
        outcome.findings.steps.iter().any(|step| step.cached),
        "nothing was cached: {:?}",
        outcome.findings.steps
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_no_branch_begins_with_and_a_context_without_git() -> Result<()> {
    let workshop = Workshop::new().await?;
    let dockerfile = "FROM scratch\nCOPY . /\nRUN [\"/busybox\", \"sh\", \"-c\", \"/busybox ls -a /; /busybox cat /new\"]\n";
    let repository =
        workshop.repository(&[("app/Dockerfile", dockerfile), ("app/new", "first\n")], &["app"])?;
    std::fs::write(repository.path.join("app/new"), "second\n")?;
    repository.commit_all()?;
    // A server that gives no unadvertised commit: over its old protocol only, where that is enforced.
    git(&repository.path, &["config", "uploadpack.allowAnySHA1InWant", "false"])?;
    let spec = workshop.build(&repository, |source| source.path = "app/Dockerfile".into())?;
    let (outcome, output) = run(&workshop, &spec, &RunSecrets::default())?;
    pushed(&outcome)?;
    ensure!(
        output.contains("first\n") && !output.contains("second\n") && !output.contains(".git\n"),
        "{output}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_with_credentials_that_show_nowhere() -> Result<()> {
    let workshop = Workshop::with(DockerRegistry::start_with_password().await?)?;
    let digest = workshop.registry.push_image("lib/base:1", "linux/amd64", &[("x", b"y")]).await?;
    let from = workshop.registry.reference("lib/base:1")?;
    let spec = workshop.spec(Work::Copy { from: from.clone(), platform: Default::default() })?;
    let mut secrets = RunSecrets::default();
    secrets.registries.insert(workshop.registry.address().into(), format!("{USERNAME}:{PASSWORD}").into());
    let (outcome, output) = run(&workshop, &spec, &secrets)?;
    ensure!(pushed(&outcome)? == digest && workshop.pushed(&spec.target_ref).await? == Some(digest.clone()));
    ensure!(outcome.findings.bases.first().and_then(|base| base.digest.clone()) == Some(digest));

    // The same for a build, which pulls and pushes by the build tool.
    let repository =
        workshop.repository(&[("Dockerfile", &format!("FROM {from}\nCOPY Dockerfile /\n"))], &[])?;
    let spec = workshop.build(&repository, |_| {})?;
    let mut started = Run::prepare(&workshop, &spec, &secrets)?;
    started.start()?;
    ensure!(started.wait()? == Some(0), "{}", started.output());
    let outcome = started.outcome()?;
    for text in [output, started.output(), serde_json::to_string(&outcome)?] {
        ensure!(!text.contains(PASSWORD), "the password shows");
    }
    ensure!(!started.has(run_folder::SECRETS) && !started.has(run_folder::WORK), "secrets are left");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_is_away_for_a_while() -> Result<()> {
    let mut workshop = Workshop::new().await?;
    let repository = workshop.repository(&[("Dockerfile", "FROM scratch\nCOPY Dockerfile /\n")], &[])?;
    let spec = workshop.build(&repository, |_| {})?;
    workshop.registry.stop();
    let mut started = Run::prepare(&workshop, &spec, &RunSecrets::default())?;
    started.start()?;
    kiln_testkit::workshop::until("it is refused", || Ok(started.output().contains("refuses connections")))
        .await?;
    workshop.registry.start_again().await?;
    ensure!(started.wait()? == Some(0), "{}", started.output());
    let digest: Digest = pushed(&started.outcome()?)?;
    ensure!(workshop.pushed(&spec.target_ref).await? == Some(digest));
    Ok(())
}
