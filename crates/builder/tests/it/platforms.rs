//! Images for other platforms, and for several.

use anyhow::{Context as _, Result, ensure};
use kiln_domain::failure::FailureReason::Dockerfile;
use kiln_domain::platform::Platform;
use kiln_domain::reference::Digest;
use kiln_domain::run::{RunSecrets, Work};
use kiln_domain::run_folder::Builder;
use kiln_registry::{Access, OciRegistry};
use kiln_testkit::registry::OCI_INDEX;
use kiln_testkit::workshop::{Repository, Workshop};

use crate::run::{failed, pushed, run};

/// Nobody has an emulator for it at hand.
const STRANGE: &str = "linux/mips64le";

fn repository(workshop: &Workshop, rest: &str) -> Result<Repository> {
    let dockerfile = format!(
        "FROM --platform=$BUILDPLATFORM scratch AS native\nCOPY busybox /bin/sh\nRUN echo made here > /made\n\
         FROM scratch\nARG TARGETARCH\nLABEL arch=$TARGETARCH\nCOPY --from=native /made /made\n{rest}"
    );
    workshop.repository(&[("Dockerfile", &dockerfile)], &["."])
}

fn platforms(names: &[&str]) -> Result<Vec<Platform>> {
    names.iter().map(|name| Ok(name.parse()?)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn one_index_of_all_that_was_asked_for() -> Result<()> {
    let Some(workshop) = Workshop::with_buildkit(kiln_builder::missing).await? else { return Ok(()) };
    let source = repository(&workshop, "")?;
    let asked = platforms(&["linux/amd64", STRANGE])?;
    let spec = workshop.build(&source, |source| *source = source.clone().for_platforms(asked.clone()))?;
    let (outcome, output) = run(&workshop, &spec, &RunSecrets::default())?;
    let digest = pushed(&outcome).context(output)?;
    let Work::Build { base_ref, .. } = &spec.work else { unreachable!() };
    for reference in [&spec.target_ref, base_ref] {
        let found = workshop.registry.manifest(reference.repository(), reference.selector()).await?;
        let (media_type, content) = found.context("no image")?;
        ensure!(media_type == OCI_INDEX && Digest::of(&content) == digest, "{reference} is {media_type}");
        // Each image is there with all that it is made of.
        let client = OciRegistry::default();
        let access = Access::anonymous(std::time::Duration::from_secs(60));
        let images = client.images(reference, &access).await?;
        let built = &outcome.findings.images;
        ensure!(images.len() == 2 && built.len() == 2, "{images:?}, {built:?}");
        for (image, built) in images.iter().zip(built) {
            ensure!(image.platform.as_ref() == Some(&built.platform), "{images:?}, {built:?}");
            ensure!((&image.digest, image.bytes) == (&built.digest, built.bytes) && built.bytes > 0);
            ensure!(asked.contains(&built.platform), "{built:?}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn another_platform_by_itself() -> Result<()> {
    let Some(workshop) = Workshop::with_buildkit(kiln_builder::missing).await? else { return Ok(()) };
    let source = repository(&workshop, "")?;
    let asked = platforms(&[STRANGE])?;
    let spec = workshop.build(&source, |source| *source = source.clone().for_platforms(asked.clone()))?;
    let (outcome, output) = run(&workshop, &spec, &RunSecrets::default())?;
    let digest = pushed(&outcome).context(output)?;
    let [built] = outcome.findings.images.as_slice() else {
        anyhow::bail!("one image, not {:?}", outcome.findings.images)
    };
    ensure!(built.platform == STRANGE.parse()? && built.digest == digest, "{built:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_run_here_is_known_before_the_build_begins() -> Result<()> {
    let Some(workshop) = Workshop::with_buildkit(kiln_builder::missing).await? else { return Ok(()) };
    let source = repository(&workshop, "RUN [\"/made\"]\n")?;
    let asked = platforms(&["linux/amd64", STRANGE])?;
    let spec = workshop.build(&source, |source| *source = source.clone().for_platforms(asked))?;
    let (outcome, output) = run(&workshop, &spec, &RunSecrets::default())?;
    let failure = failed(&outcome, Dockerfile).context(output.clone())?;
    ensure!(failure.message.contains("`RUN [\"/made\"]` can't run for linux/mips64le here"), "{failure}");
    ensure!(!output.contains("[internal]"), "it began: {output}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn buildah_refuses_them_by_name() -> Result<()> {
    let workshop = Workshop::new().await?.using(Builder::Buildah);
    let source = workshop.repository(&[("Dockerfile", "FROM scratch\nCOPY Dockerfile /\n")], &[])?;
    for asked in [&["linux/arm64"] as &[&str], &["linux/amd64", "linux/arm64"]] {
        let asked = platforms(asked)?;
        let spec = workshop.build(&source, |source| *source = source.clone().for_platforms(asked))?;
        let (outcome, _) = run(&workshop, &spec, &RunSecrets::default())?;
        let failure = failed(&outcome, Dockerfile)?;
        ensure!(failure.message.contains("not for linux/arm64: that takes BuildKit"), "{failure}");
    }
    Ok(())
}
