//! Builds whose registry speaks TLS of an own authority, wants a certificate, and mirrors where the FROM is from.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use kiln_domain::failure::FailureReason;
use kiln_domain::registries::{ClientCertificate, Reach};
use kiln_domain::run::{RunSecrets, Work};
use kiln_domain::run_folder::Builder;
use kiln_testkit::authority::Authority;
use kiln_testkit::front::{Front, Reply};
use kiln_testkit::registry::{DockerRegistry, PASSWORD, USERNAME};
use kiln_testkit::workshop::Workshop;

use crate::run::{failed, pushed, run};

/// A host that isn't there: only its mirrors can have the image.
const BASE: &str = "origin.kiln.invalid/team/base:1";

async fn workshop(authority: &Authority, mirrors: Vec<String>, shows: bool) -> Result<Workshop> {
    let mut workshop = Workshop::with(DockerRegistry::start_with_tls(authority, true).await?)?;
    let at = workshop.registry.address().to_owned();
    workshop.registry.push_image("team/base:1", "linux/amd64", &[("of-the-mirror", b"x")]).await?;
    let [certificate, key] = authority.client();
    let client_certificate = shows.then_some(ClientCertificate { certificate, key });
    let trust = Reach { ca: Some(authority.ca()), client_certificate, ..Reach::default() };
    let mirrors = mirrors.into_iter().chain([at.clone()]).collect();
    let mirrored = Reach { mirrors, ..Reach::default() };
    workshop.registries = [(at, trust), ("origin.kiln.invalid".to_owned(), mirrored)].into_iter().collect();
    Ok(workshop)
}

fn logins(workshop: &Workshop) -> RunSecrets {
    let own = format!("{USERNAME}:{PASSWORD}");
    let registries = [
        (workshop.registry.address().to_owned(), own.into()),
        ("origin.kiln.invalid".to_owned(), "me:the origin's secret".into()),
    ];
    RunSecrets { registries: BTreeMap::from(registries), ..RunSecrets::default() }
}

async fn builds_from_the_mirror_that_has_it(builder: Builder) -> Result<()> {
    let lacks = Front::start(|asked| match asked.target.as_str() {
        "/v2/" => Reply::json("{}"),
        _ => Reply::status(404),
    })
    .await?;
    let authority = Authority::new()?;
    let workshop = workshop(&authority, vec![lacks.address.clone()], true).await?.using(builder);
    if let Some(program) = kiln_builder::missing(&workshop.settings()) {
        eprintln!("left out: {program} is not here; `scripts/bootstrap --buildkit` brings BuildKit");
        return Ok(());
    }
    let secrets = logins(&workshop);
    let dockerfile =
        format!("FROM {BASE}\nCOPY busybox /busybox\nRUN [\"/busybox\", \"ls\", \"/of-the-mirror\"]\n");
    let repository = workshop.repository(&[("Dockerfile", &dockerfile)], &["."])?;
    let spec = workshop.build(&repository, |_| {})?;
    let (outcome, output) = run(&workshop, &spec, &secrets)?;
    let digest = pushed(&outcome).with_context(|| output.clone())?;
    ensure!(workshop.pushed(&spec.target_ref).await? == Some(digest), "not at the target: {output}");
    let first = lacks.asked().iter().any(|asked| asked.target.starts_with("/v2/team/base/manifests/"));
    ensure!(first, "the first mirror was not asked: {output}");
    let secret = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, "me:the origin's secret");
    for asked in lacks.asked() {
        ensure!(asked.authorization().is_none_or(|shown| !shown.contains(&secret)), "{asked:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn buildah_builds_from_the_mirror_that_has_it_and_pushes_under_tls() -> Result<()> {
    builds_from_the_mirror_that_has_it(Builder::Buildah).await
}

#[tokio::test(flavor = "multi_thread")]
async fn buildkit_builds_from_the_mirror_that_has_it_and_pushes_under_tls() -> Result<()> {
    builds_from_the_mirror_that_has_it(Builder::Buildkit).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_comes_from_the_mirror_and_without_the_certificate_nothing_does() -> Result<()> {
    let authority = Authority::new()?;
    let copy = || Ok::<_, anyhow::Error>(Work::Copy { from: BASE.parse()?, platform: Default::default() });
    let shows = workshop(&authority, vec!["127.0.0.1:1".into()], true).await?;
    let spec = shows.spec(copy()?)?;
    let (outcome, output) = run(&shows, &spec, &logins(&shows))?;
    let digest = pushed(&outcome).with_context(|| output.clone())?;
    ensure!(shows.pushed(&spec.target_ref).await? == Some(digest), "not at the target: {output}");
    ensure!(output.contains("taking it from the mirror's"), "{output}");

    let hides = workshop(&authority, Vec::new(), false).await?;
    let (outcome, _) = run(&hides, &hides.spec(copy()?)?, &logins(&hides))?;
    failed(&outcome, FailureReason::RegistryUnavailable)?;
    Ok(())
}
