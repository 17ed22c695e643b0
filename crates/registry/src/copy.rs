//! Copying one platform's image from one repository to another.

use std::collections::BTreeMap;

use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use kiln_domain::platform::Platform;
use kiln_domain::reference::{Digest, ImageReference};
use oci_spec::image::Descriptor;

use crate::access::Access;
use crate::blob::{self, Blob};
use crate::error::Error;
use crate::manifest::{Content, Manifest};
use crate::repository::{Repository, digest_of};
use crate::resolve::{Found, find};
use crate::retry::Retry;
use crate::{BeforePut, OciRegistry};

/// See [`crate::Registry::copy`].
pub(crate) async fn copy(
    client: &OciRegistry,
    from: &ImageReference,
    to: &ImageReference,
    platform: Option<&Platform>,
    access: &Access,
    before_put: &mut BeforePut<'_>,
) -> Result<Digest, Error> {
    let source = Repository::source(client, from, access)?;
    let mount_from = (from.registry() == to.registry()).then_some(from.repository());
    let target = Repository::target(client, to, mount_from, access)?;
    let manifest =
        access.in_time(to.registry(), copy_blobs(client, &source, &target, from, platform)).await?;

    // No attempt begins after the deadline; one that has begun before it is seen to its end.
    let mut retry = Retry::of_request(access, to.registry());
    let mut doubts = Retry::of_doubts(access);
    loop {
        let held = before_put(&manifest.digest).map_err(|error| Error::Stopped(error.into()))?;
        let answer = target.put_manifest(to.selector(), &manifest, &to.to_string()).await;
        drop(held);
        match answer {
            Ok(()) => return Ok(manifest.digest),
            // The manifest and its blobs are known to be right. docker-registry 2.8 finds a blob missing or wrong in the moment
            // in which another copy mounts it, as it then writes the blob's link file anew.
            Err(failure @ Error::Rejected { status: 400 | 404, .. }) => doubts.wait(failure).await?,
            Err(failure) => retry.wait(failure).await?,
        }
    }
}

/// Copies all that an image consists of but its manifest, which is returned.
async fn copy_blobs(
    client: &OciRegistry,
    source: &Repository<'_>,
    target: &Repository<'_>,
    from: &ImageReference,
    platform: Option<&Platform>,
) -> Result<Manifest, Error> {
    let Some(platform) = platform else { return copy_whole(client, source, target, from).await };
    let manifest = match find(source, from.selector(), from, platform).await? {
        Found::Read(manifest) => *manifest,
        Found::Named(digest) => named(source, from, &digest).await?,
    };
    copy_image(client, source, target, from, &manifest).await?;
    Ok(manifest)
}

/// The same of all that a reference is; the images of an index are put by their digests.
async fn copy_whole(
    client: &OciRegistry,
    source: &Repository<'_>,
    target: &Repository<'_>,
    from: &ImageReference,
) -> Result<Manifest, Error> {
    let whole = source.manifest(from.selector(), &from.to_string()).await?;
    let Content::Index(entries) = &whole.content else {
        copy_image(client, source, target, from, &whole).await?;
        return Ok(whole);
    };
    for entry in entries {
        let digest = digest_of(entry, &from.to_string())?;
        let manifest = named(source, from, &digest).await?;
        copy_image(client, source, target, from, &manifest).await?;
        let put = || target.put_manifest(digest.as_str(), &manifest, target.name);
        target.again(put).await?;
    }
    Ok(whole)
}

async fn copy_image(
    client: &OciRegistry,
    source: &Repository<'_>,
    target: &Repository<'_>,
    from: &ImageReference,
    manifest: &Manifest,
) -> Result<(), Error> {
    let blobs = blobs(manifest, &from.pinned(&manifest.digest).to_string())?;
    let copies = blobs.into_iter().map(|blob| async move { blob::copy(source, target, &blob).await });
    let parallel = client.http.config.parallel_blobs.max(1);
    stream::iter(copies).buffer_unordered(parallel).try_collect::<()>().await
}

/// Reads the manifest that an index names.
async fn named(source: &Repository<'_>, from: &ImageReference, digest: &Digest) -> Result<Manifest, Error> {
    match source.manifest(digest.as_str(), &from.pinned(digest).to_string()).await {
        Err(Error::NotFound { .. }) => {
            Err(Error::broken(&from.to_string(), format!("its manifest {digest} is missing")))
        }
        other => other,
    }
}

/// All that an image consists of besides its manifest, each once.
fn blobs(manifest: &Manifest, reference: &str) -> Result<Vec<Blob>, Error> {
    let Content::Image { config, layers } = &manifest.content else {
        return Err(Error::broken(reference, "its index names another index as an image"));
    };
    let mut blobs = BTreeMap::new();
    for descriptor in std::iter::once(&**config).chain(layers.iter().filter(|layer| !is_foreign(layer))) {
        let blob = Blob { digest: digest_of(descriptor, reference)?, size: descriptor.size() };
        blobs.insert(blob.digest.clone(), blob);
    }
    Ok(blobs.into_values().collect())
}

/// A layer that registries don't hold: it is had from its URLs (Windows' base images).
fn is_foreign(layer: &Descriptor) -> bool {
    let media_type = layer.media_type().to_string();
    let foreign = media_type.contains("nondistributable") || media_type.contains("rootfs.foreign");
    foreign && layer.urls().as_ref().is_some_and(|urls| !urls.is_empty())
}
