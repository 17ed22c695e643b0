//! Speaks OCI distribution (<https://github.com/opencontainers/distribution-spec>) with any registry:
//! what a reference points at, whether a tag is there, and copying an image from one repository to another.
//!
//! - I am asked by the resolver (resolve, digest) and the builder (digest, copy), through the port [`Registry`].
//! - I ask registries over HTTP(S), the token services that they name, and the caller's [`Keychain`].
//! - I never keep anything between two calls but tokens (caching answers is the resolver's), give a token to a credential
//!   that it was not made for, send a credential anywhere but to the registry it is for and that registry's token service,
//!   or follow a redirect with one.
//!
//! An own client, not oci-client 0.18: that one reads bodies without a bound, drops Retry-After, follows redirects
//! by itself and unwraps what a registry sends (the upload location, a token that is no header value).

mod access;
mod blob;
mod challenge;
mod copy;
mod error;
mod http;
pub mod inspect;
mod manifest;
mod repository;
mod resolve;
mod retry;
mod tags;
mod token;
mod tokens;
mod trust;

use std::io;

use async_trait::async_trait;
use kiln_domain::platform::Platform;
use kiln_domain::reference::{Digest, ImageReference};

pub use crate::access::{
    Access, Credential, InvalidCredential, Keychain, Keyring, TOKEN_USER, registry_name,
};
pub use crate::error::{Error, Problem};
pub use crate::http::Config;
use crate::http::Http;
pub use crate::tags::Tagged;
use crate::tokens::Tokens;

/// Called with the digest of the manifest that is about to be put. What it returns is dropped when that attempt is over:
/// answered, failed, or given up.
pub type BeforePut<'a> = dyn FnMut(&Digest) -> io::Result<Box<dyn Send>> + Send + 'a;

/// What the rest of Kiln wants of registries.
///
/// Every method ends by [`Access::deadline`] (but for a PUT that has begun, see [`copy`](Self::copy)), and retries by
/// itself what may pass.
#[async_trait]
pub trait Registry: Send + Sync {
    /// The digest of the single-platform manifest that `reference` stands for.
    ///
    /// An index is narrowed down to `platform`; a single image must be for it, unless its config names no
    /// platform. [`Error::NoPlatform`] if there is none.
    async fn resolve(
        &self,
        reference: &ImageReference,
        platform: &Platform,
        access: &Access,
    ) -> Result<Digest, Error>;

    /// The digest of what `reference` points at now, an index's as it stands; `None` if there is nothing.
    ///
    /// Costs a HEAD, which rate limits mostly don't count; a GET where a registry answers no digest to it.
    async fn digest(&self, reference: &ImageReference, access: &Access) -> Result<Option<Digest>, Error>;

    /// Makes `to` the same image as `from`, for one platform, and returns its manifest's digest; without a platform all that
    /// `from` is, an index with each of its images.
    ///
    /// Blobs first: by a mount within a registry that offers it, else streamed, what is there already skipped;
    /// then the manifest, byte for byte. `before_put` is called with the digest before every attempt to PUT the
    /// manifest; its error ends the copy as [`Error::Stopped`], the tag untouched by that attempt. An attempt that has
    /// begun is not broken off at the deadline, as the registry might finish it: it has [`Config::request_timeout`].
    /// Called again after any end, the copy does what is left.
    async fn copy(
        &self,
        from: &ImageReference,
        to: &ImageReference,
        platform: Option<&Platform>,
        access: &Access,
        before_put: &mut BeforePut<'_>,
    ) -> Result<Digest, Error>;
}

/// One platform's image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sized {
    /// None where it is no part of an index, and its own config isn't asked.
    pub platform: Option<Platform>,
    pub digest: Digest,
    /// Of config and layers.
    pub bytes: u64,
}

/// The real registries, over HTTP(S).
///
/// Cheap until used: HTTP clients are made, and trust roots read, at the first request that needs them.
#[derive(Debug, Default)]
pub struct OciRegistry {
    http: Http,
    tokens: Tokens,
}

impl OciRegistry {
    pub fn new(config: Config) -> Self {
        Self { http: Http::new(config), tokens: Tokens::default() }
    }

    /// What `reference` is: each of its images with the platform that an index names it for, and its size as it is moved. An
    /// index's attestations are none.
    pub async fn images(&self, reference: &ImageReference, access: &Access) -> Result<Vec<Sized>, Error> {
        access.in_time(reference.registry(), resolve::images(self, reference, access)).await
    }

    /// How many bytes the layers of an image have, as they are moved. `reference` must name one platform's manifest.
    pub async fn bytes(&self, reference: &ImageReference, access: &Access) -> Result<u64, Error> {
        access.in_time(reference.registry(), resolve::bytes(self, reference, access)).await
    }
}

#[async_trait]
impl Registry for OciRegistry {
    async fn resolve(
        &self,
        reference: &ImageReference,
        platform: &Platform,
        access: &Access,
    ) -> Result<Digest, Error> {
        access.in_time(reference.registry(), resolve::resolve(self, reference, platform, access)).await
    }

    async fn digest(&self, reference: &ImageReference, access: &Access) -> Result<Option<Digest>, Error> {
        access.in_time(reference.registry(), resolve::digest(self, reference, access)).await
    }

    async fn copy(
        &self,
        from: &ImageReference,
        to: &ImageReference,
        platform: Option<&Platform>,
        access: &Access,
        before_put: &mut BeforePut<'_>,
    ) -> Result<Digest, Error> {
        copy::copy(self, from, to, platform, access, before_put).await
    }
}

/// Makes ring the crypto of all TLS in this process; a second call changes nothing.
///
/// `main` calls it before anything speaks TLS, as no other provider is compiled in.
pub fn install_crypto_provider() {
    if rustls::crypto::CryptoProvider::get_default().is_none() {
        // It fails only where another thread was quicker to do the same.
        let _ = rustls::crypto::ring::default_provider().install_default();
    }
}
