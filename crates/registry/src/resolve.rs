//! From a reference to the one manifest that it stands for.

use std::collections::VecDeque;

use kiln_domain::platform::Platform;
use kiln_domain::reference::{Digest, ImageReference};
use oci_spec::image::Descriptor;

use crate::access::Access;
use crate::error::Error;
use crate::manifest::{
    Choice, Content, DOCKER_MANIFEST, Manifest, OCI_MANIFEST, choose, fits, platform_of_config, platforms,
};
use crate::repository::{Repository, digest_of};
use crate::{OciRegistry, Sized};

/// How many manifests are read to find one: an index may nest others, or not say what its entries are for.
const MOST: usize = 16;

/// See [`crate::Registry::resolve`].
pub(crate) async fn resolve(
    client: &OciRegistry,
    reference: &ImageReference,
    platform: &Platform,
    access: &Access,
) -> Result<Digest, Error> {
    let repository = Repository::source(client, reference, access)?;
    // What is not there, or not to be read, is found out before a GET that limits count.
    let selector = if reference.digest().is_none() {
        repository.head(reference.selector(), &reference.to_string()).await?.map(String::from)
    } else {
        None
    };
    let selector = selector.as_deref().unwrap_or(reference.selector());
    match find(&repository, selector, reference, platform).await? {
        Found::Named(digest) => Ok(digest),
        Found::Read(manifest) => Ok(manifest.digest),
    }
}

/// See [`crate::Registry::digest`].
pub(crate) async fn digest(
    client: &OciRegistry,
    reference: &ImageReference,
    access: &Access,
) -> Result<Option<Digest>, Error> {
    let repository = Repository::source(client, reference, access)?;
    let (selector, text) = (reference.selector(), reference.to_string());
    let found = match repository.head(selector, &text).await {
        Ok(None) => repository.manifest(selector, &text).await.map(|manifest| manifest.digest),
        Ok(Some(digest)) => Ok(digest),
        Err(failure) => Err(failure),
    };
    match found {
        Ok(digest) => Ok(Some(digest)),
        Err(Error::NotFound { .. }) => Ok(None),
        Err(failure) => Err(failure),
    }
}

/// See [`OciRegistry::bytes`].
pub(crate) async fn bytes(
    client: &OciRegistry,
    reference: &ImageReference,
    access: &Access,
) -> Result<u64, Error> {
    let repository = Repository::source(client, reference, access)?;
    let text = reference.to_string();
    match repository.manifest(reference.selector(), &text).await?.content {
        Content::Image { layers, .. } => Ok(layers.iter().map(Descriptor::size).fold(0, u64::saturating_add)),
        Content::Index(_) => {
            let problem = "it is an index, of which each platform has a size of its own".to_owned();
            Err(Error::Unsupported { reference: text, problem })
        }
    }
}

/// See [`OciRegistry::images`].
pub(crate) async fn images(
    client: &OciRegistry,
    reference: &ImageReference,
    access: &Access,
) -> Result<Vec<Sized>, Error> {
    let repository = Repository::source(client, reference, access)?;
    let text = reference.to_string();
    let whole = repository.manifest(reference.selector(), &text).await?;
    let sized = |platform, digest, config: &Descriptor, layers: &[Descriptor]| Sized {
        platform,
        digest,
        bytes: layers.iter().map(Descriptor::size).fold(config.size(), u64::saturating_add),
    };
    match &whole.content {
        Content::Image { config, layers } => Ok(vec![sized(None, whole.digest.clone(), config, layers)]),
        Content::Index(entries) => {
            let mut images = Vec::new();
            for (entry, platform) in platforms(entries).take(MOST) {
                let digest = digest_of(entry, &text)?;
                let manifest = repository.manifest(digest.as_str(), &text).await?;
                if let Content::Image { config, layers } = &manifest.content {
                    images.push(sized(Some(platform), digest, config, layers));
                }
            }
            Ok(images)
        }
    }
}

/// A single-platform manifest: by an index's word, or read.
pub(crate) enum Found {
    Named(Digest),
    Read(Box<Manifest>),
}

/// What is to be looked at next, and whether an index says that it is for the platform.
struct Pointer {
    selector: String,
    named: bool,
}

/// Finds the platform's manifest from a tag or digest on.
pub(crate) async fn find(
    repository: &Repository<'_>,
    selector: &str,
    reference: &ImageReference,
    platform: &Platform,
) -> Result<Found, Error> {
    let text = reference.to_string();
    let mut pointers = VecDeque::from([Pointer { selector: selector.to_owned(), named: false }]);
    let mut all_offered = Vec::new();
    let mut read = 0;
    while let Some(Pointer { selector, named }) = pointers.pop_front() {
        if read == MOST {
            let problem = format!("it takes more than {MOST} manifests to find {platform} in it");
            return Err(Error::Unsupported { reference: text, problem });
        }
        read += 1;
        let manifest = match repository.manifest(&selector, &text).await {
            // The tag was there: what it points at is not.
            Err(Error::NotFound { .. }) if read > 1 => {
                return Err(Error::broken(&text, format!("its manifest {selector} is missing")));
            }
            other => other?,
        };
        match &manifest.content {
            Content::Index(entries) => match choose(entries, platform) {
                Choice::Found(entry) => {
                    let digest = digest_of(entry, &text)?;
                    if is_image(entry) {
                        return Ok(Found::Named(digest));
                    }
                    pointers = VecDeque::from([Pointer { selector: digest.into(), named: true }]);
                }
                Choice::Other { offered, unnamed } => {
                    all_offered.extend(offered);
                    for entry in unnamed {
                        let selector = digest_of(entry, &text)?.into();
                        pointers.push_back(Pointer { selector, named: false });
                    }
                }
            },
            Content::Image { config, .. } => {
                let own = if named { None } else { own_platform(repository, config, &text).await? };
                match own.filter(|own| !fits(own, platform)) {
                    Some(other) => all_offered.push(other.to_string()),
                    None => return Ok(Found::Read(Box::new(manifest))),
                }
            }
        }
    }
    Err(Error::NoPlatform { reference: text, platform: platform.clone(), offered: all_offered })
}

fn is_image(entry: &Descriptor) -> bool {
    let media_type = entry.media_type().to_string();
    media_type == OCI_MANIFEST || media_type == DOCKER_MANIFEST
}

/// The platform that an image says it is for; `None` if its config doesn't say.
async fn own_platform(
    repository: &Repository<'_>,
    config: &Descriptor,
    reference: &str,
) -> Result<Option<Platform>, Error> {
    let digest = digest_of(config, reference)?;
    match repository.small_blob(&digest).await {
        Ok(bytes) => Ok(platform_of_config(&bytes)),
        Err(Error::NotFound { .. }) => {
            Err(Error::broken(reference, format!("its config {digest} is missing")))
        }
        Err(failure) => Err(failure),
    }
}
