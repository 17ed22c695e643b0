//! Asking a token service for a token
//! (<https://distribution.github.io/distribution/spec/auth/token/>).

use std::time::Duration;

use http::{HeaderValue, Method, StatusCode, header};
use reqwest::Request;
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;
use tokio::time::Instant;
use url::Url;

use crate::access::Credential;
use crate::error::Error;
use crate::http::{Http, body, same_security, successful};

/// What a token lasts for when its service doesn't say (the specification's default).
const DEFAULT: Duration = Duration::from_secs(60);
/// A token is not used in its last seconds, as a request takes time too.
const MARGIN: Duration = Duration::from_secs(10);

/// A value for the `Authorization` header, and when it ends.
#[derive(Clone)]
pub(crate) struct Authorization {
    pub(crate) value: HeaderValue,
    pub(crate) until: Option<Instant>,
}

impl Authorization {
    /// RFC 7617. `None` for what is no user name and password.
    pub(crate) fn basic(credential: &Credential) -> Option<Self> {
        use base64::Engine as _;
        let Credential::Password { username, password } = credential else { return None };
        let pair = SecretString::from(format!("{username}:{}", password.expose_secret()));
        let text = base64::engine::general_purpose::STANDARD.encode(pair.expose_secret());
        Self::sensitive(&format!("Basic {text}"), None)
    }

    /// RFC 6750. `None` for what is no token that a registry takes.
    pub(crate) fn bearer(credential: &Credential) -> Option<Self> {
        let Credential::RegistryToken(token) = credential else { return None };
        Self::sensitive(&format!("Bearer {}", token.expose_secret()), None)
    }

    fn sensitive(text: &str, until: Option<Instant>) -> Option<Self> {
        let mut value = HeaderValue::from_str(text).ok()?;
        value.set_sensitive(true);
        Some(Self { value, until })
    }

    pub(crate) fn is_fresh(&self) -> bool {
        self.until.is_none_or(|until| Instant::now() < until)
    }
}

/// Whose token it is to be, and what it is to allow.
pub(crate) struct Wanted<'a> {
    pub(crate) realm: &'a str,
    pub(crate) service: Option<&'a str>,
    pub(crate) scopes: &'a [String],
    pub(crate) credential: Option<&'a Credential>,
    /// The registry's own URL, whose security the token service must have.
    pub(crate) base: &'a Url,
    pub(crate) reference: &'a str,
    pub(crate) registry: &'a str,
}

/// Some services name the token in the one way, some in the other, some in both.
#[derive(Deserialize)]
struct Answer {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<u64>,
}

/// Asks for a token, once.
pub(crate) async fn fetch(http: &Http, wanted: &Wanted<'_>) -> Result<Authorization, Error> {
    let broken = |problem: String| Error::broken(wanted.reference, problem);
    let mut url = Url::parse(wanted.realm).map_err(|_| broken("its token service is no URL".into()))?;
    same_security(wanted.base, &url).map_err(|problem| broken(format!("its token service is {problem}")))?;
    let request = match wanted.credential {
        Some(Credential::IdentityToken(token)) => refresh(url, wanted, token),
        credential => {
            {
                let mut query = url.query_pairs_mut();
                query.extend_pairs(wanted.service.map(|service| ("service", service)));
                query.extend_pairs(wanted.scopes.iter().map(|scope| ("scope", scope)));
            }
            let mut request = Request::new(Method::GET, url);
            if let Some(basic) = credential.and_then(Authorization::basic) {
                request.headers_mut().insert(header::AUTHORIZATION, basic.value);
            }
            request
        }
    };
    let answer = http.execute(request, wanted.registry).await?;
    if answer.status().is_redirection() {
        return Err(broken("its token service redirects".into()));
    }
    if answer.status() == StatusCode::NOT_FOUND {
        return Err(broken("its token service is not there".into()));
    }
    let answer = successful(answer, wanted.reference, wanted.registry).await?;
    let answer = body(answer, wanted.reference, wanted.registry).await?;
    // The parser's words could quote the token.
    let answer: Answer = serde_json::from_slice(&answer)
        .map_err(|_| broken("its token service's answer is no token".into()))?;
    let lasts = answer.expires_in.map_or(DEFAULT, Duration::from_secs).min(Duration::from_secs(24 * 3600));
    let until = Instant::now() + lasts.saturating_sub(MARGIN);
    answer
        .token
        .or(answer.access_token)
        .filter(|token| !token.is_empty())
        .and_then(|token| Authorization::sensitive(&format!("Bearer {token}"), Some(until)))
        .ok_or_else(|| broken("its token service's answer is no token".into()))
}

/// An identity token is shown in a body, by OAuth 2 (<https://distribution.github.io/distribution/spec/auth/oauth/>).
fn refresh(url: Url, wanted: &Wanted<'_>, token: &SecretString) -> Request {
    let mut form = url::form_urlencoded::Serializer::new(String::new());
    form.append_pair("grant_type", "refresh_token")
        .append_pair("refresh_token", token.expose_secret())
        .append_pair("client_id", "kiln")
        .append_pair("scope", &wanted.scopes.join(" "));
    form.extend_pairs(wanted.service.map(|service| ("service", service)));
    let mut request = Request::new(Method::POST, url);
    let form_type = HeaderValue::from_static("application/x-www-form-urlencoded");
    request.headers_mut().insert(header::CONTENT_TYPE, form_type);
    *request.body_mut() = Some(form.finish().into());
    request
}
