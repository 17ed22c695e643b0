//! What a registry wants to be shown: the `WWW-Authenticate` header (RFC 9110, section 11.6.1).

use http::{HeaderMap, header};

/// A challenge that can be met.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Challenge {
    /// A user name and a password.
    Basic,
    /// A token of the token service at `realm`
    /// (<https://distribution.github.io/distribution/spec/auth/token/>).
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
}

impl Challenge {
    /// The best challenge among an answer's headers: a Bearer's before Basic.
    pub(crate) fn among(headers: &HeaderMap) -> Option<Self> {
        let texts = headers.get_all(header::WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok());
        let mut basic = None;
        for challenge in texts.flat_map(parse) {
            match challenge {
                Self::Bearer { .. } => return Some(challenge),
                Self::Basic => basic = Some(challenge),
            }
        }
        basic
    }
}

/// All challenges in one header, which may hold several: `Basic realm="x", Bearer realm="y",service="z"`.
fn parse(text: &str) -> Vec<Challenge> {
    let mut found = Vec::new();
    let mut scheme = String::new();
    let mut parameters: Vec<(String, String)> = Vec::new();
    let mut rest = text;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let end = rest.find([' ', '\t', ',', '=']).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        if let Some(value) = after.strip_prefix('=') {
            let (value, after) = parameter_value(value);
            parameters.push((word.to_ascii_lowercase(), value));
            rest = after;
            continue;
        }
        found.extend(challenge(&scheme, &parameters));
        if word.is_empty() {
            return found;
        }
        (scheme, parameters, rest) = (word.to_ascii_lowercase(), Vec::new(), after);
    }
}

fn challenge(scheme: &str, parameters: &[(String, String)]) -> Option<Challenge> {
    let parameter = |name: &str| parameters.iter().find(|(n, _)| n == name).map(|(_, value)| value.clone());
    match scheme {
        "basic" => Some(Challenge::Basic),
        "bearer" => {
            let realm = parameter("realm")?;
            Some(Challenge::Bearer { realm, service: parameter("service"), scope: parameter("scope") })
        }
        _ => None,
    }
}

/// A token or a quoted string, and what follows it.
fn parameter_value(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([' ', '\t', ',']).unwrap_or(text.len());
        let (value, rest) = text.split_at(end);
        return (value.to_owned(), rest);
    };
    let mut value = String::new();
    let mut characters = quoted.chars();
    while let Some(character) = characters.next() {
        match character {
            '"' => break,
            '\\' => value.extend(characters.next()),
            other => value.push(other),
        }
    }
    (value, characters.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bearer(realm: &str, service: Option<&str>, scope: Option<&str>) -> Option<Challenge> {
        let owned = |text: Option<&str>| text.map(str::to_owned);
        Some(Challenge::Bearer { realm: realm.into(), service: owned(service), scope: owned(scope) })
    }

    #[test]
    fn headers_as_registries_write_them() {
        for (text, expected) in [
            (
                r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:library/x:pull,push""#,
                bearer(
                    "https://auth.docker.io/token",
                    Some("registry.docker.io"),
                    Some("repository:library/x:pull,push"),
                ),
            ),
            (r#"basic realm="a \"b\", c""#, Some(Challenge::Basic)),
            (r#"Basic realm=x, Bearer realm="y" , service=z"#, bearer("y", Some("z"), None)),
            (r#"Negotiate, BEARER REALM="y""#, bearer("y", None, None)),
            (r#"Digest realm="x", nonce="y==""#, None),
            (r#"Bearer service="no realm""#, None),
            (r#"Bearer realm="unclosed"#, bearer("unclosed", None, None)),
            ("", None),
            ("=,= \"", None),
        ] {
            let headers = [(header::WWW_AUTHENTICATE, text.parse().unwrap())].into_iter().collect();
            assert_eq!(Challenge::among(&headers), expected, "{text}");
        }
    }
}
