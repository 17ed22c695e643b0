//! What an image says of how it was made, and whether it is made the same again.

use anyhow::{Context as _, Result, ensure};
use kiln_domain::failure::FailureReason::Dockerfile;
use kiln_domain::run::RunSecrets;
use kiln_domain::run_folder::Builder;
use kiln_domain::source::DockerfileSource;
use kiln_testkit::registry::OCI_INDEX;
use kiln_testkit::workshop::Workshop;
use serde_json::Value;

use crate::run::{failed, pushed, run};

type Change = fn(&mut DockerfileSource);

const DOCKERFILE: &str = "FROM scratch AS shell\nCOPY busybox /bin/sh\nFROM shell\nWORKDIR /w\nRUN echo made > a; mkdir b\n\
     COPY Dockerfile /\n";

#[tokio::test(flavor = "multi_thread")]
async fn two_empty_daemons_make_the_same_digest() -> Result<()> {
    let Some(workshop) = Workshop::with_buildkit(kiln_builder::missing).await? else { return Ok(()) };
    let source = workshop.repository(&[("Dockerfile", DOCKERFILE)], &["."])?;
    let digest = |reproducible| {
        let change = |source: &mut DockerfileSource| source.reproducible = reproducible;
        let (outcome, output) = run(&workshop, &workshop.build(&source, change)?, &RunSecrets::default())?;
        workshop.forget_layers()?;
        pushed(&outcome).context(output)
    };
    ensure!(digest(true)? == digest(true)?, "it is another image");
    // Or this would show nothing.
    ensure!(digest(false)? != digest(false)?, "two daemons make the same of it anyway");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn provenance_is_made_for_who_asks() -> Result<()> {
    let Some(workshop) = Workshop::with_buildkit(kiln_builder::missing).await? else { return Ok(()) };
    let source = workshop.repository(&[("Dockerfile", DOCKERFILE)], &["."])?;
    for asked in [false, true] {
        let spec = workshop.build(&source, |source| source.provenance = asked)?;
        let (outcome, output) = run(&workshop, &spec, &RunSecrets::default())?;
        pushed(&outcome).context(output)?;
        let repository = spec.target_ref.repository();
        let found = workshop.registry.manifest(repository, spec.target_ref.selector()).await?;
        let (media_type, content) = found.context("no image")?;
        ensure!((media_type == OCI_INDEX) == asked, "{media_type}");
        ensure!(outcome.findings.images.len() == 1, "{:?}", outcome.findings.images);
        if !asked {
            continue;
        }
        // The attestation is at the target too, with what it says.
        let index: Value = serde_json::from_slice(&content)?;
        let entries = index["manifests"].as_array().context("no index")?;
        let attestation =
            entries.iter().find(|entry| entry["platform"]["os"] == "unknown").context("no attestation")?;
        let digest = attestation["digest"].as_str().unwrap_or_default();
        let (_, manifest) =
            workshop.registry.manifest(repository, digest).await?.context("it is not there")?;
        let manifest: Value = serde_json::from_slice(&manifest)?;
        let layer = manifest["layers"][0]["digest"].as_str().context("no layer")?.parse()?;
        let statement = workshop.registry.blob(repository, &layer).await?.context("no statement")?;
        let statement: Value = serde_json::from_slice(&statement)?;
        ensure!(
            statement["predicateType"].as_str().unwrap_or_default().contains("slsa.dev/provenance"),
            "{statement}"
        );
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn buildah_refuses_both_by_name() -> Result<()> {
    let workshop = Workshop::new().await?.using(Builder::Buildah);
    let source = workshop.repository(&[("Dockerfile", "FROM scratch\nCOPY Dockerfile /\n")], &[])?;
    let changes: [(Change, &str); 2] = [
        (|source| source.provenance = true, "no provenance"),
        (|source| source.reproducible = true, "no reproducible"),
    ];
    for (change, words) in changes {
        let (outcome, _) = run(&workshop, &workshop.build(&source, change)?, &RunSecrets::default())?;
        let failure = failed(&outcome, Dockerfile)?;
        ensure!(failure.message.contains(words), "{failure}");
    }
    Ok(())
}
