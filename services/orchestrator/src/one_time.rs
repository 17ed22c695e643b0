//! Git credentials that a request of the old API names by a URL which gives them once (`auth_ots`). With builders that fetch
//! by themselves it is theirs to ask; else it is asked here, once, and what it gives is kept sealed with the build's secrets.

use std::time::Duration;

use bytes::Bytes;
use kiln_bus::secrets::{open, seal};
use kiln_contract::error::{Code, Refusal};
use kiln_contract::secrets::Secrets;

use crate::Shared;
use crate::accept::unopenable;

const WITHIN: Duration = Duration::from_secs(10);
/// A token is some hundred bytes.
const LARGEST: usize = 64 << 10;

impl Shared {
    /// The sealed secrets with the credentials in the place of their URL; unchanged where there is none.
    pub(crate) async fn with_credentials(&self, sealed: &Bytes) -> Result<Bytes, Refusal> {
        let mut secrets = open(&self.open_key, sealed).map_err(|error| unopenable(&error))?;
        if secrets.git_one_time_url.is_empty() {
            return Ok(sealed.clone());
        }
        let url = std::mem::take(&mut secrets.git_one_time_url);
        take_login(&mut secrets, &fetch(&url).await?);
        seal(&self.open_key.seal_key(), &secrets).map_err(|error| unopenable(&error))
    }
}

/// `username:password`, or a password alone.
fn take_login(secrets: &mut Secrets, answer: &str) {
    let answer = answer.trim_end_matches(['\r', '\n']);
    let (username, password) = answer.split_once(':').unwrap_or(("", answer));
    username.clone_into(&mut secrets.git_username);
    password.clone_into(&mut secrets.git_password);
}

/// What lies at a URL, which is a secret as well: no error names it.
async fn fetch(url: &str) -> Result<String, Refusal> {
    kiln_registry::install_crypto_provider();
    let client = reqwest::Client::builder()
        .timeout(WITHIN)
        .redirect(reqwest::redirect::Policy::none())
        .build()
        .map_err(|error| refusal(Code::Internal, &error.without_url().to_string()))?;
    let unreachable = |error: reqwest::Error| {
        let code = if error.is_builder() { Code::InvalidArgument } else { Code::Unavailable };
        refusal(code, &error.without_url().to_string())
    };
    let mut answer = client.get(url).send().await.map_err(unreachable)?;
    if !answer.status().is_success() {
        // It was given before, or never was there: who asks again needs another.
        return Err(refusal(Code::InvalidArgument, &format!("it answers {}", answer.status())));
    }
    let mut content = Vec::new();
    while let Some(chunk) = answer.chunk().await.map_err(unreachable)? {
        content.extend_from_slice(&chunk);
        if content.len() > LARGEST {
            return Err(refusal(Code::InvalidArgument, "its answer is too long"));
        }
    }
    String::from_utf8(content).map_err(|_| refusal(Code::InvalidArgument, "its answer is no text"))
}

fn refusal(code: Code, why: &str) -> Refusal {
    Refusal::new(code, format!("the one-time URL of the git credentials gives none: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_login_is_cut_at_its_first_colon() {
        for (answer, username, password) in [
            ("ann:pass:word\n", "ann", "pass:word"),
            ("token", "", "token"),
            ("token\r\n", "", "token"),
            (":token", "", "token"),
        ] {
            let mut secrets = Secrets::default();
            take_login(&mut secrets, answer);
            assert_eq!((secrets.git_username.as_str(), secrets.git_password.as_str()), (username, password));
        }
    }
}
