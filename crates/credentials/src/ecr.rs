//! Amazon's registries (ECR): tokens of the AWS API, by whatever identity this process has on AWS.

use std::time::Duration;

use async_trait::async_trait;
use aws_config::timeout::TimeoutConfig;
use aws_config::{BehaviorVersion, ConfigLoader, Region, SdkConfig};
use aws_sdk_ecr::error::DisplayErrorContext;
use aws_smithy_http_client::tls::Provider;
use aws_smithy_http_client::tls::rustls_provider::CryptoMode;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use kiln_registry::{Credential, Error};
use tokio::sync::OnceCell;

use crate::config::Ecr as Config;
use crate::kept::{Kept, Lasting};
use crate::metrics::Metrics;
use crate::source::{Source, cannot_be_had};

/// For one question, its retries included.
const WITHIN: Duration = Duration::from_secs(10);

pub(crate) struct Ecr {
    config: Config,
    loader: Box<dyn Fn() -> ConfigLoader + Send + Sync>,
    /// Read at the first question: it may take a while where there is no AWS.
    aws: OnceCell<SdkConfig>,
    /// A token is good for all registries of a region that its identity may use.
    tokens: Kept<Place>,
    metrics: Metrics,
}

/// Where a registry's token is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Place {
    region: String,
    fips: bool,
}

impl Ecr {
    pub(crate) fn new(config: Config, metrics: Metrics) -> Self {
        let loader = || {
            let client = aws_smithy_http_client::Builder::new()
                .tls_provider(Provider::Rustls(CryptoMode::Ring))
                .build_https();
            let timeouts = TimeoutConfig::builder().operation_timeout(WITHIN).build();
            aws_config::defaults(BehaviorVersion::latest()).http_client(client).timeout_config(timeouts)
        };
        Self::by(loader, config, metrics)
    }

    fn by(
        loader: impl Fn() -> ConfigLoader + Send + Sync + 'static,
        config: Config,
        metrics: Metrics,
    ) -> Self {
        Self { config, loader: Box::new(loader), aws: OnceCell::new(), tokens: Kept::new(), metrics }
    }

    async fn fetch(&self, place: &Place) -> Result<Lasting, String> {
        let aws = self.aws.get_or_init(|| (self.loader)().load()).await;
        let mut config = aws_sdk_ecr::config::Builder::from(aws)
            .region(Region::new(place.region.clone()))
            .use_fips(place.fips);
        if let Some(url) = &self.config.endpoint_url {
            config = config.endpoint_url(url);
        }
        let client = aws_sdk_ecr::Client::from_conf(config.build());
        let answer = client.get_authorization_token().send().await;
        let answer = answer.map_err(|error| format!("AWS: {}", DisplayErrorContext(error)))?;
        let data = answer.authorization_data.unwrap_or_default().into_iter().next();
        let data = data.ok_or("AWS gives no token")?;
        let pair = data.authorization_token.and_then(|token| STANDARD.decode(token).ok());
        let pair = pair.and_then(|pair| String::from_utf8(pair).ok()).ok_or("AWS gives what is no token")?;
        let (username, password) = pair.split_once(':').ok_or("AWS gives what is no token")?;
        let credential = Credential::Password { username: username.into(), password: password.into() };
        let ends = data.expires_at.map_or(0, |at| at.secs());
        let lasts = Duration::from_secs(u64::try_from(ends - now().as_second()).unwrap_or_default());
        Ok(Lasting { credential, lasts })
    }
}

#[async_trait]
impl Source for Ecr {
    async fn serves(&self, registry: &str) -> bool {
        place_of(registry).is_some()
    }

    async fn credential(&self, registry: &str) -> Result<Option<Credential>, Error> {
        let Some(place) = place_of(registry) else { return Ok(None) };
        match self.tokens.get(place.clone(), self.fetch(&place)).await {
            Ok(credential) => Ok(Some(credential)),
            Err(problem) => {
                self.metrics.source_failed("ecr");
                Err(cannot_be_had(registry, problem))
            }
        }
    }

    async fn registries(&self) -> Vec<String> {
        self.config.registries.clone()
    }
}

/// Of `<account>.dkr.ecr[-fips].<region>.amazonaws.com`, of China's `….amazonaws.com.cn`, and of the dual-stack
/// `<account>.dkr-ecr[-fips].<region>.on.aws`; of nothing that is only like them
/// (<https://docs.aws.amazon.com/general/latest/gr/ecr.html>).
fn place_of(registry: &str) -> Option<Place> {
    let (account, rest) = registry.split_once('.')?;
    if account.len() != 12 || !account.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let (rest, suffix) = [("dkr.", ".amazonaws.com"), ("dkr.", ".amazonaws.com.cn"), ("dkr-", ".on.aws")]
        .into_iter()
        .find_map(|(prefix, suffix)| Some((rest.strip_prefix(prefix)?.strip_suffix(suffix)?, suffix)))?;
    let (service, region) = rest.split_once('.')?;
    let fips = match service {
        "ecr" => false,
        "ecr-fips" => true,
        _ => return None,
    };
    let fits = !region.is_empty()
        && region.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    let china = region.starts_with("cn-");
    let right_suffix = suffix == ".on.aws" || china == (suffix == ".amazonaws.com.cn");
    (fits && right_suffix).then(|| Place { region: region.to_owned(), fips })
}

#[expect(clippy::disallowed_methods, reason = "AWS says when a token ends by the wall clock")]
fn now() -> Timestamp {
    Timestamp::now()
}

#[cfg(test)]
mod tests {
    use std::process::Stdio;

    use aws_sdk_ecr::config::Credentials;
    use futures::future::join_all;
    use kiln_testkit::front::{Front, Reply};
    use tokio::io::{AsyncBufReadExt as _, BufReader};
    use tokio::process::{Child, Command};

    use super::*;

    #[test]
    fn only_amazons_registries_are_amazons() {
        let place = |region: &str, fips| Some(Place { region: region.into(), fips });
        for (registry, expected) in [
            ("123456789012.dkr.ecr.eu-west-1.amazonaws.com", place("eu-west-1", false)),
            ("123456789012.dkr.ecr.us-gov-west-1.amazonaws.com", place("us-gov-west-1", false)),
            ("123456789012.dkr.ecr-fips.us-gov-east-1.amazonaws.com", place("us-gov-east-1", true)),
            ("123456789012.dkr.ecr-fips.us-east-2.amazonaws.com", place("us-east-2", true)),
            ("123456789012.dkr.ecr.cn-north-1.amazonaws.com.cn", place("cn-north-1", false)),
            ("123456789012.dkr-ecr.us-west-2.on.aws", place("us-west-2", false)),
            ("123456789012.dkr-ecr-fips.us-west-2.on.aws", place("us-west-2", true)),
            ("123456789012.dkr.ecr.eu-west-1.amazonaws.com.evil.tld", None),
            ("123456789012.dkr.ecr.eu-west-1.amazonaws.com:443", None),
            ("123456789012.dkr.ecr.eu-west-1.amazonawsXcom", None),
            ("123456789012.dkr.ecr.eu-west-1.evil.amazonaws.com", None),
            ("evil.123456789012.dkr.ecr.eu-west-1.amazonaws.com", None),
            ("x123456789012.dkr.ecr.eu-west-1.amazonaws.com", None),
            ("12345678901.dkr.ecr.eu-west-1.amazonaws.com", None),
            ("123456789012xdkr.ecr.eu-west-1.amazonaws.com", None),
            ("123456789012.dkr.ecr.eu-west-1.amazonaws.com.cn", None),
            ("123456789012.dkr.ecr.cn-north-1.amazonaws.com", None),
            ("123456789012.dkr.ecr..amazonaws.com", None),
            ("123456789012.dkr.s3.eu-west-1.amazonaws.com", None),
            ("123456789012.dkr.ecr.EU.amazonaws.com", None),
            ("public.ecr.aws", None),
        ] {
            assert_eq!(place_of(registry), expected, "{registry}");
        }
    }

    /// moto's server: AWS's API, as real as there is one without AWS.
    async fn moto() -> (String, Child) {
        let mut child = Command::new("moto_server")
            .args(["-H", "127.0.0.1", "-p", "0"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("moto_server is missing: scripts/bootstrap installs it");
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        loop {
            let line = lines.next_line().await.unwrap().expect("moto_server ended");
            if let Some((_, url)) = line.split_once("Running on http://") {
                return (url.trim().to_owned(), child);
            }
        }
    }

    fn ecr(url: &str) -> Ecr {
        let loader = || {
            aws_config::defaults(BehaviorVersion::latest())
                .http_client(aws_smithy_http_client::Builder::new().build_http())
                .credentials_provider(Credentials::for_tests())
                .retry_config(aws_config::retry::RetryConfig::disabled())
        };
        let config = Config { endpoint_url: Some(format!("http://{url}")), ..Config::default() };
        Ecr::by(loader, config, Metrics::register(&mut Default::default()))
    }

    #[tokio::test]
    async fn a_token_of_the_aws_api() {
        let (moto, _child) = moto().await;
        let ecr = ecr(&moto);
        let registry = "123456789012.dkr.ecr.eu-west-1.amazonaws.com";
        assert!(ecr.serves(registry).await && !ecr.serves("eu-west-1.amazonaws.com").await);
        let credential = ecr.credential(registry).await.unwrap().unwrap();
        let [kind, username, password] = credential.distinguishing();
        assert_eq!((kind, username), ("password", "AWS"));
        assert!(!password.is_empty());
        assert!(ecr.credential("example.test").await.unwrap().is_none());
    }

    #[tokio::test]
    async fn one_token_for_a_region_until_near_its_end_and_asked_of_that_region() {
        let ends = now().as_second() + 12 * 3600;
        let token = STANDARD.encode("AWS:se:cret");
        let api = Front::start(move |_| {
            Reply::json(format!(
                r#"{{"authorizationData":[{{"authorizationToken":"{token}","expiresAt":{ends}}}]}}"#
            ))
        })
        .await
        .unwrap();
        let ecr = ecr(&api.address);
        let of = |account: &str, region: &str| format!("{account}.dkr.ecr.{region}.amazonaws.com");
        let registries = [of("111111111111", "eu-west-1"), of("222222222222", "eu-west-1")];
        for credential in join_all(registries.iter().cycle().take(20).map(|name| ecr.credential(name))).await
        {
            assert_eq!(credential.unwrap().unwrap().distinguishing(), ["password", "AWS", "se:cret"]);
        }
        assert_eq!(api.asked().len(), 1);
        ecr.credential(&of("111111111111", "us-gov-west-1")).await.unwrap();
        let signed = |index: usize| api.asked()[index].authorization().unwrap().to_owned();
        assert!(signed(0).contains("/eu-west-1/ecr/"), "{}", signed(0));
        assert!(signed(1).contains("/us-gov-west-1/ecr/"), "{}", signed(1));
    }

    #[tokio::test]
    async fn what_the_aws_api_refuses_is_told_and_asked_again() {
        let api = Front::start(|_| {
            Reply::status(400)
                .header("x-amzn-errortype", "AccessDeniedException")
                .body(r#"{"message":"not for you"}"#)
        })
        .await
        .unwrap();
        let ecr = ecr(&api.address);
        for times in 1..=2 {
            let error = ecr.credential("111111111111.dkr.ecr.eu-west-1.amazonaws.com").await.unwrap_err();
            assert!(matches!(error, Error::NoCredential { .. }) && error.to_string().contains("not for you"));
            assert_eq!(api.asked().len(), times);
        }
    }
}
