//! Azure's registries: the managed identity's token, exchanged at the registry for one of its own
//! (<https://github.com/Azure/acr/blob/main/docs/AAD-OAuth.md>).

use std::time::Duration;

use async_trait::async_trait;
use kiln_registry::{Credential, Error};
use reqwest::Client;
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Deserializer};
use url::form_urlencoded::Serializer;

use crate::config::Azure as Config;
use crate::kept::{Kept, Lasting};
use crate::metrics::Metrics;
use crate::source::{Source, cannot_be_had};
use crate::web;

/// What the identity's token is for: registries take that of the resource manager, in every cloud.
const RESOURCE: &str = "https://management.azure.com/";
/// A registry's refresh token lasts three hours and does not say so.
const REFRESH_LASTS: Duration = Duration::from_secs(3 * 3600);

pub(crate) struct Azure {
    config: Config,
    near: Client,
    far: Client,
    tokens: Kept<String>,
    metrics: Metrics,
}

#[derive(Deserialize)]
struct Identity {
    access_token: SecretString,
    #[serde(deserialize_with = "seconds")]
    expires_in: u64,
}

#[derive(Deserialize)]
struct Exchanged {
    refresh_token: SecretString,
}

impl Azure {
    pub(crate) fn new(config: Config, metrics: Metrics) -> Result<Self, String> {
        Ok(Self { config, near: web::near()?, far: web::far()?, tokens: Kept::new(), metrics })
    }

    async fn fetch(&self, registry: &str) -> Result<Lasting, String> {
        self.exchange(registry, &format!("https://{registry}")).await
    }

    /// `at`: where the registry is on the wire.
    async fn exchange(&self, registry: &str, at: &str) -> Result<Lasting, String> {
        let query = Serializer::new(String::new())
            .append_pair("api-version", "2018-02-01")
            .append_pair("resource", RESOURCE)
            .extend_pairs(self.config.client_id.as_ref().map(|id| ("client_id", id)))
            .finish();
        let base = self.config.metadata_url.trim_end_matches('/');
        let url = format!("{base}/metadata/identity/oauth2/token?{query}");
        let request = self.near.get(url).header("Metadata", "true");
        let identity: Identity = web::ask("Azure's metadata service", request).await?;

        let form = Serializer::new(String::new())
            .append_pair("grant_type", "access_token")
            .append_pair("service", registry)
            .append_pair("access_token", identity.access_token.expose_secret())
            .finish();
        let request = self.far.post(format!("{at}/oauth2/exchange"));
        let request = request.header("Content-Type", "application/x-www-form-urlencoded").body(form);
        let exchanged: Exchanged = web::ask("the registry's token exchange", request).await?;
        let lasts = REFRESH_LASTS.min(Duration::from_secs(identity.expires_in));
        Ok(Lasting { credential: Credential::IdentityToken(exchanged.refresh_token), lasts })
    }
}

#[async_trait]
impl Source for Azure {
    async fn serves(&self, registry: &str) -> bool {
        is_azure(registry)
    }

    async fn credential(&self, registry: &str) -> Result<Option<Credential>, Error> {
        if !is_azure(registry) {
            return Ok(None);
        }
        self.tokens.get(registry.to_owned(), self.fetch(registry)).await.map(Some).map_err(|problem| {
            self.metrics.source_failed("azure");
            cannot_be_had(registry, problem)
        })
    }

    async fn registries(&self) -> Vec<String> {
        self.config.registries.clone()
    }
}

/// `<name>.azurecr.io`, and those of Azure's clouds for China and the US government.
fn is_azure(registry: &str) -> bool {
    let name = |text: &str| {
        !text.is_empty() && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    };
    [".azurecr.io", ".azurecr.cn", ".azurecr.us"]
        .iter()
        .any(|suffix| registry.strip_suffix(suffix).is_some_and(name))
}

/// Azure writes it as a text.
fn seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Written {
        Number(u64),
        Text(String),
    }
    match Written::deserialize(deserializer)? {
        Written::Number(seconds) => Ok(seconds),
        Written::Text(text) => text.parse().map_err(serde::de::Error::custom),
    }
}

#[cfg(test)]
mod tests {
    use kiln_testkit::front::{Front, Reply};

    use super::*;

    #[test]
    fn only_azures_registries_are_azures() {
        for registry in ["kiln.azurecr.io", "a-1.azurecr.cn", "kiln.azurecr.us"] {
            assert!(is_azure(registry), "{registry}");
        }
        for registry in
            ["azurecr.io", "kiln.azurecr.io.evil.test", "x.kiln.azurecr.io", "kiln.azurecr.io:5000"]
        {
            assert!(!is_azure(registry), "{registry}");
        }
    }

    #[tokio::test]
    async fn the_identitys_token_is_exchanged_at_the_registry() {
        let metadata = Front::start(|asked| {
            let right = asked.headers.get("metadata").map(String::as_str) == Some("true");
            let right = right && asked.target.contains("client_id=mine");
            if right && asked.target.contains("resource=https%3A%2F%2Fmanagement.azure.com%2F") {
                Reply::json(r#"{"access_token":"aad","expires_in":"86399","token_type":"Bearer"}"#)
            } else {
                Reply::status(400)
            }
        })
        .await
        .unwrap();
        let registry = Front::start(|asked| {
            let body = "grant_type=access_token&service=kiln.azurecr.io&access_token=aad";
            let right = asked.is("POST", "/oauth2/exchange") && asked.body == body.as_bytes();
            if right { Reply::json(r#"{"refresh_token":"refresh"}"#) } else { Reply::status(401) }
        })
        .await
        .unwrap();
        let config = Config {
            metadata_url: format!("http://{}", metadata.address),
            client_id: Some("mine".into()),
            ..Config::default()
        };
        let azure = Azure::new(config, Metrics::register(&mut Default::default())).unwrap();
        let at = format!("http://{}", registry.address);
        let exchanged = azure.exchange("kiln.azurecr.io", &at).await.unwrap();
        assert_eq!(exchanged.credential.distinguishing(), ["identity token", "", "refresh"]);
        assert_eq!(exchanged.lasts, REFRESH_LASTS);
        let refused = azure.exchange("other.azurecr.io", &at).await.err().unwrap();
        assert_eq!(refused, "the registry's token exchange answers HTTP 401");
        assert!(azure.credential("other.test").await.unwrap().is_none());
    }
}
