//! Base images that are in the store of builds before a build asks for them.

use anyhow::{Context as _, Result, ensure};
use kiln_builder::BaseImages;
use kiln_domain::reference::{Digest, ImageReference};
use kiln_domain::run::RunSecrets;
use kiln_testkit::front::{Front, Reply};
use kiln_testkit::registry::{DockerRegistry, tar};
use kiln_testkit::workshop::Workshop;

use crate::run::{pushed, run};

#[tokio::test(flavor = "multi_thread")]
async fn a_build_fetches_no_layer_that_was_pulled_before_it() -> Result<()> {
    let workshop = Workshop::new().await?;
    let files: [(&str, &[u8]); 1] = [("of-the-base", b"x")];
    let digest = workshop.registry.push_image("team/base:1", "linux/amd64", &files).await?;
    let layer = format!("/blobs/{}", Digest::of(&tar(&files)?));
    let upstream = workshop.registry.address().to_owned();
    let front = Front::start(move |_| Reply::Forward(upstream.clone())).await?;
    let tagged = format!("{}/team/base:1", front.address);
    let image = tagged.parse::<ImageReference>()?.pinned(&digest);

    let images = BaseImages::open(&workshop.settings())?.context("buildah's store")?;
    ensure!(images.bytes(&image).await? == u64::try_from(tar(&files)?.len())?, "{image} has another size");
    for _ in 0..2 {
        images.pull(&image).await?;
        ensure!(front.count("GET", &layer) == 1, "{:?}", front.asked());
    }
    images.remove(&image).await?;
    images.pull(&image).await?;
    ensure!(front.count("GET", &layer) == 2, "it was given up, and had to be fetched again");
    // Another process of this host does the same: what is there is not fetched again.
    BaseImages::open(&workshop.settings())?.context("the same store")?.pull(&image).await?;

    let dockerfile = format!("FROM {tagged}\nCOPY busybox /busybox\n");
    let repository = workshop.repository(&[("Dockerfile", &dockerfile)], &["."])?;
    let spec = workshop.build(&repository, |_| {})?;
    let asked_before = front.count("GET", "/manifests/");
    let (outcome, output) = run(&workshop, &spec, &RunSecrets::default())?;
    pushed(&outcome).with_context(|| output.clone())?;
    ensure!(front.count("GET", &layer) == 2, "the build fetched it: {:?}", front.asked());
    ensure!(front.count("GET", "/manifests/") > asked_before, "the build has to ask, as it always does");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_not_all_may_have_does_not_come_in() -> Result<()> {
    let workshop = Workshop::with(DockerRegistry::start_with_password().await?)?;
    let digest = workshop.registry.push_image("private/base:1", "linux/amd64", &[]).await?;
    let image = workshop.registry.reference("private/base:1")?.pinned(&digest);
    let images = BaseImages::open(&workshop.settings())?.context("buildah's store")?;
    let error = images.pull(&image).await.err().context("it was pulled")?.to_string();
    ensure!(error.contains("unauthorized"), "{error}");
    Ok(())
}
