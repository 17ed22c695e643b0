//! Google's registries: tokens of the metadata server, of the service account that this machine or pod runs as
//! (<https://cloud.google.com/artifact-registry/docs/docker/authentication#token>).

use std::time::Duration;

use async_trait::async_trait;
use kiln_registry::{Credential, Error};
use reqwest::Client;
use secrecy::SecretString;
use serde::Deserialize;

use crate::config::Google as Config;
use crate::kept::{Kept, Lasting};
use crate::metrics::Metrics;
use crate::source::{Source, cannot_be_had};
use crate::web;

const TOKEN: &str = "computeMetadata/v1/instance/service-accounts/default/token";

pub(crate) struct Google {
    config: Config,
    client: Client,
    tokens: Kept<()>,
    metrics: Metrics,
}

#[derive(Deserialize)]
struct Token {
    access_token: SecretString,
    expires_in: u64,
}

impl Google {
    pub(crate) fn new(config: Config, metrics: Metrics) -> Result<Self, String> {
        Ok(Self { config, client: web::near()?, tokens: Kept::new(), metrics })
    }

    async fn fetch(&self) -> Result<Lasting, String> {
        let url = format!("{}/{TOKEN}", self.config.metadata_url.trim_end_matches('/'));
        let request = self.client.get(url).header("Metadata-Flavor", "Google");
        let token: Token = web::ask("Google's metadata server", request).await?;
        let credential =
            Credential::Password { username: "oauth2accesstoken".into(), password: token.access_token };
        Ok(Lasting { credential, lasts: Duration::from_secs(token.expires_in) })
    }
}

#[async_trait]
impl Source for Google {
    async fn serves(&self, registry: &str) -> bool {
        is_google(registry)
    }

    async fn credential(&self, registry: &str) -> Result<Option<Credential>, Error> {
        if !is_google(registry) {
            return Ok(None);
        }
        self.tokens.get((), self.fetch()).await.map(Some).map_err(|problem| {
            self.metrics.source_failed("google");
            cannot_be_had(registry, problem)
        })
    }

    async fn registries(&self) -> Vec<String> {
        self.config.registries.clone()
    }
}

/// `gcr.io`, `<place>.gcr.io` and `<place>-docker.pkg.dev`.
fn is_google(registry: &str) -> bool {
    let place = |text: &str| {
        !text.is_empty() && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    };
    registry == "gcr.io"
        || registry.strip_suffix(".gcr.io").is_some_and(place)
        || registry.strip_suffix("-docker.pkg.dev").is_some_and(place)
}

#[cfg(test)]
mod tests {
    use kiln_testkit::front::{Front, Reply};

    use super::*;

    #[test]
    fn only_googles_registries_are_googles() {
        for registry in ["gcr.io", "eu.gcr.io", "europe-west1-docker.pkg.dev", "us-docker.pkg.dev"] {
            assert!(is_google(registry), "{registry}");
        }
        for registry in [
            "evilgcr.io",
            "gcr.io.evil.test",
            "gcr.io:443",
            "a.b.gcr.io",
            "-docker.pkg.dev.evil.test",
            "evil.test/x-docker.pkg.dev",
            "docker.pkg.dev",
            "x.y-docker.pkg.dev",
        ] {
            assert!(!is_google(registry), "{registry}");
        }
    }

    #[tokio::test]
    async fn a_token_of_the_metadata_server_is_kept_until_near_its_end() {
        let server = Front::start(|asked| {
            if asked.headers.get("metadata-flavor").map(String::as_str) == Some("Google") {
                Reply::json(r#"{"access_token":"ya29.x","expires_in":3599,"token_type":"Bearer"}"#)
            } else {
                Reply::status(403)
            }
        })
        .await
        .unwrap();
        let config = Config { metadata_url: format!("http://{}", server.address), ..Config::default() };
        let google = Google::new(config, Metrics::register(&mut Default::default())).unwrap();
        for registry in ["gcr.io", "us-docker.pkg.dev", "gcr.io"] {
            let credential = google.credential(registry).await.unwrap().unwrap();
            assert_eq!(credential.distinguishing(), ["password", "oauth2accesstoken", "ya29.x"]);
        }
        assert!(google.credential("other.test").await.unwrap().is_none());
        let asked = server.asked();
        assert_eq!((asked.len(), asked[0].target.as_str()), (1, &*format!("/{TOKEN}")));
    }

    #[tokio::test]
    async fn without_a_metadata_server_that_is_said() {
        for (reply, expected) in [(500, "answers HTTP 500"), (200, "answers what is no token")] {
            let server = Front::start(move |_| Reply::status(reply).body("s3cret")).await.unwrap();
            let config = Config { metadata_url: format!("http://{}", server.address), ..Config::default() };
            let google = Google::new(config, Metrics::register(&mut Default::default())).unwrap();
            let error = google.credential("gcr.io").await.unwrap_err().to_string();
            assert!(error.contains(expected) && !error.contains("s3cret"), "{error}");
        }
    }
}
