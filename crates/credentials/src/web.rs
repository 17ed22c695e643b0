//! Asking a cloud's own services for tokens.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use reqwest::{Client, RequestBuilder, redirect};
use serde::de::DeserializeOwned;

const WITHIN: Duration = Duration::from_secs(10);
/// More than any token has.
const BODY_BYTES: usize = 1 << 20;

/// A client for a service of this machine's cloud, which no proxy reaches.
pub(crate) fn near() -> Result<Client, String> {
    build(Client::builder().no_proxy().tls_certs_only([]))
}

/// A client for anything else: by the environment's proxies and the system's trust roots.
pub(crate) fn far() -> Result<Client, String> {
    build(Client::builder())
}

fn build(builder: reqwest::ClientBuilder) -> Result<Client, String> {
    kiln_registry::install_crypto_provider();
    let builder = builder.timeout(WITHIN).redirect(redirect::Policy::none());
    builder.build().map_err(|error| error.without_url().to_string())
}

/// A success's body, as JSON. An error names no word of the answer, which may be secret.
pub(crate) async fn ask<T: DeserializeOwned>(what: &str, request: RequestBuilder) -> Result<T, String> {
    let failed = |error: reqwest::Error| format!("{what} can't be asked: {}", error.without_url());
    let mut answer = request.send().await.map_err(failed)?;
    if !answer.status().is_success() {
        return Err(format!("{what} answers HTTP {}", answer.status().as_u16()));
    }
    let mut body = BytesMut::new();
    while let Some(piece) = answer.chunk().await.map_err(failed)? {
        if body.len() + piece.len() > BODY_BYTES {
            return Err(format!("{what} answers more than 1 MiB"));
        }
        body.extend_from_slice(&piece);
    }
    let body: Bytes = body.freeze();
    serde_json::from_slice(&body).map_err(|_| format!("{what} answers what is no token"))
}
