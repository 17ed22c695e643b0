//! The layers of builds in a registry: what an emptied daemon has of them, and that nothing that is wrong with them is a
//! build's trouble.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use kiln_domain::layer_cache::{CacheRefs, LayerCache};
use kiln_domain::reference::{Digest, ImageReference};
use kiln_domain::run::{Outcome, RunSecrets, RunSpec, Work};
use kiln_domain::source::DockerfileSource;
use kiln_testkit::registry::{DockerRegistry, OCI_MANIFEST, descriptor};
use kiln_testkit::workshop::{Repository, Workshop, builder_program, until};
use serde_json::{Value, json};

use crate::run::{pushed, run};

/// What a step writes here no other run of it writes.
const ONCE: &str = "FROM scratch AS shell\nCOPY busybox /bin/sh\nFROM shell AS one\n\
     RUN cat /proc/sys/kernel/random/uuid > /once\nFROM shell\nCOPY --from=one /once /once\n";

async fn workshop(change: impl FnOnce(&mut LayerCache)) -> Result<Option<Workshop>> {
    let mut layer_cache = LayerCache::default();
    change(&mut layer_cache);
    Ok(Workshop::with_buildkit(kiln_builder::missing)
        .await?
        .map(|workshop| workshop.keeping_layers(layer_cache)))
}

fn repository(workshop: &Workshop, last: &str) -> Result<Repository> {
    workshop.repository(&[("Dockerfile", &format!("{ONCE}{last}"))], &["."])
}

/// Where this run leaves its layers, if all may have them.
fn cache_of(spec: &RunSpec) -> Result<ImageReference> {
    let Work::Build { source, base_ref, .. } = &spec.work else { unreachable!() };
    Ok(CacheRefs::of(&format!("{}-cache", base_ref.name()), source, None)?.own)
}

/// Builds, and waits until so many exports have come to their end here; the outcome.
async fn exported(
    workshop: &Workshop,
    spec: &RunSpec,
    secrets: &RunSecrets,
    exports: usize,
) -> Result<Outcome> {
    let (outcome, output) = run(workshop, spec, secrets)?;
    pushed(&outcome).context(output)?;
    left(workshop, exports).await?;
    ensure!(!workshop.exports().contains("cannot"), "{}", workshop.exports());
    Ok(outcome)
}

/// Waits until so many exports have come to their end, and nothing is left of any.
async fn left(workshop: &Workshop, exports: usize) -> Result<()> {
    let ended = || Ok(workshop.exports().lines().count() >= exports && workshop.exporting()? == 0);
    until("the layers are exported", ended).await
}

fn all_cached(outcome: &Outcome) -> bool {
    outcome.findings.steps.iter().all(|step| step.cached || step.name.starts_with("FROM "))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_emptied_daemon_has_the_layers_of_earlier_builds() -> Result<()> {
    let Some(workshop) = workshop(|_| {}).await? else { return Ok(()) };
    let source = repository(&workshop, "RUN echo last\n")?;
    let build = |change: fn(&mut DockerfileSource)| workshop.build(&source, change);
    let none = RunSecrets::default();

    // Asked for by its name, the default branch is the default one still.
    let spec = build(|source| source.revision = "main".into())?;
    let first = pushed(&exported(&workshop, &spec, &none, 1).await?)?;
    workshop.forget_layers()?;
    let (outcome, output) = run(&workshop, &build(|_| {})?, &none)?;
    ensure!(all_cached(&outcome) && pushed(&outcome)? == first, "{output}");

    // Nothing was new: nothing is exported. Another branch begins with the default one's layers, and leaves its own.
    std::fs::write(source.path.join("Dockerfile"), format!("{ONCE}RUN echo other\n"))?;
    let other = Repository { commit: source.commit_all()?, ..source.clone() };
    workshop.forget_layers()?;
    let spec = workshop.build(&other, |source| source.revision = "feature/x".into())?;
    let outcome = exported(&workshop, &spec, &none, 2).await?;
    let ran: Vec<_> =
        outcome.findings.steps.iter().filter(|step| !step.cached).map(|step| &*step.name).collect();
    ensure!(ran.contains(&"RUN echo other") && !ran.iter().any(|step| step.contains("uuid")), "{ran:?}");
    ensure!(workshop.pushed(&cache_of(&spec)?).await?.is_some(), "{}", workshop.exports());

    // Whoever wants none of it has none.
    workshop.forget_layers()?;
    let mut spec = build(|_| {})?;
    spec.no_cache = true;
    let (outcome, output) = run(&workshop, &spec, &none)?;
    ensure!(!outcome.findings.steps.iter().any(|step| step.cached), "{output}");
    Ok(())
}

/// What one owner's credentials brought in is not for another.
#[tokio::test(flavor = "multi_thread")]
async fn the_layers_of_a_private_source_are_its_owners() -> Result<()> {
    let Some(workshop) = workshop(|_| {}).await? else { return Ok(()) };
    let source = repository(&workshop, "")?;
    let secrets = RunSecrets { git_password: Some("s3cret-word".into()), ..RunSecrets::default() };
    let mut spec = workshop.build(&source, |_| {})?;
    let first = pushed(&exported(&workshop, &spec, &secrets, 1).await?)?;
    ensure!(workshop.pushed(&cache_of(&spec)?).await?.is_none(), "all may read it");
    ensure!(!workshop.exports().contains("s3cret-word"));
    for (owner, same) in [("bob", false), ("", false), ("ann", true)] {
        workshop.forget_layers()?;
        spec = workshop.build(&source, |_| {})?;
        spec.owner = owner.into();
        let (outcome, output) = run(&workshop, &spec, &secrets)?;
        ensure!((pushed(&outcome)? == first) == same, "{owner}: {output}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_cache_is_a_build_without() -> Result<()> {
    let Some(workshop) = workshop(|_| {}).await? else { return Ok(()) };
    let none = RunSecrets::default();
    let source = repository(&workshop, "")?;
    let spec = workshop.build(&source, |_| {})?;
    exported(&workshop, &spec, &none, 1).await?;
    let cache = cache_of(&spec)?;
    let repository = cache.repository();
    let (_, manifest) =
        workshop.registry.manifest(repository, cache.selector()).await?.context("no cache")?;
    let manifest: Value = serde_json::from_slice(&manifest)?;
    for layer in manifest["layers"].as_array().context("no layers")? {
        workshop.registry.delete_blob(repository, layer["digest"].as_str().unwrap_or_default()).await?;
    }
    workshop.forget_layers()?;
    // A step on top of what is missing.
    std::fs::write(source.path.join("Dockerfile"), format!("{ONCE}RUN cat /once; echo on top\n"))?;
    let source = Repository { commit: source.commit_all()?, ..source };
    let (outcome, output) = run(&workshop, &workshop.build(&source, |_| {})?, &none)?;
    pushed(&outcome).context(output.clone())?;
    ensure!(output.contains("once more, without the layers of earlier builds"), "{output}");

    // A list that is none.
    left(&workshop, 2).await?;
    let list = b"no list";
    workshop.registry.push_blob(repository, list).await?;
    let config = descriptor("application/vnd.buildkit.cacheconfig.v0", list);
    let manifest = json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": []});
    workshop
        .registry
        .push_manifest(repository, cache.selector(), OCI_MANIFEST, manifest.to_string().as_bytes())
        .await?;
    workshop.forget_layers()?;
    let (outcome, output) = run(&workshop, &workshop.build(&source, |_| {})?, &none)?;
    pushed(&outcome).context(output)?;
    Ok(())
}

/// Nothing listens there; something does, and never answers.
#[tokio::test(flavor = "multi_thread")]
async fn a_cache_that_is_away_is_a_build_without() -> Result<()> {
    let silent = DockerRegistry::start().await?;
    silent.pause()?;
    // Compiled before the time is taken.
    builder_program()?;
    for (address, seconds) in [("127.0.0.1:1", 3), (silent.address(), 1)] {
        let change = |layer_cache: &mut LayerCache| {
            layer_cache.repository = Some(format!("{address}/cache"));
            (layer_cache.import_seconds, layer_cache.export_seconds) = (seconds, 2);
        };
        let Some(workshop) = workshop(change).await? else { return Ok(()) };
        let source = repository(&workshop, "")?;
        let began = tokio::time::Instant::now();
        let (outcome, output) = run(&workshop, &workshop.build(&source, |_| {})?, &RunSecrets::default())?;
        let _: Digest = pushed(&outcome).context(output.clone())?;
        ensure!(output.contains("building without the layers of"), "{output}");
        ensure!(began.elapsed() < Duration::from_secs(50), "it took {:?}", began.elapsed());
        left(&workshop, 1).await?;
        ensure!(workshop.exports().contains("cannot export"), "{}", workshop.exports());
    }
    silent.resume()
}
