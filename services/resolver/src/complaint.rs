//! What git means by what it writes when a remote can't be listed.

use std::fmt;

use kiln_domain::limits::truncated;

const QUOTED_BYTES: usize = 400;

/// What is wrong, and git's own words: one line, cut, without credentials.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Complaint {
    pub(crate) kind: Kind,
    pub(crate) quoted: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// No such repository, or none that may be known of.
    NoRepository,
    UnknownHost,
    /// No credentials, or wrong ones.
    Unauthenticated,
    Denied,
    /// The network, or the remote's own trouble.
    Unavailable,
}

impl fmt::Display for Complaint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let meaning = match self.kind {
            Kind::NoRepository => "there is no such repository",
            Kind::UnknownHost => "its host does not exist",
            Kind::Unauthenticated => "it needs other credentials, or does not exist",
            Kind::Denied => "access is denied",
            Kind::Unavailable => "it can't be asked",
        };
        write!(f, "{meaning}; git says: {}", self.quoted)
    }
}

/// Phrases of git 2.39 to 2.5x, curl and OpenSSH (in the C locale), the more telling first.
const PHRASES: [(&str, Kind); 18] = [
    ("Could not resolve host", Kind::UnknownHost),
    ("unable to look up", Kind::UnknownHost),
    ("Authentication failed", Kind::Unauthenticated),
    ("could not read Username", Kind::Unauthenticated),
    ("could not read Password", Kind::Unauthenticated),
    ("invalid credentials", Kind::Unauthenticated),
    ("Permission denied (", Kind::Unauthenticated),
    ("returned error: 401", Kind::Unauthenticated),
    ("returned error: 403", Kind::Denied),
    ("returned error: 404", Kind::NoRepository),
    ("returned error: 410", Kind::NoRepository),
    ("does not appear to be a git repository", Kind::NoRepository),
    ("did you run git update-server-info", Kind::NoRepository),
    ("repository not exported", Kind::NoRepository),
    ("epository not found", Kind::NoRepository),
    ("' not found", Kind::NoRepository),
    ("not valid: is this a git repository", Kind::NoRepository),
    ("no such repository", Kind::NoRepository),
];

/// `secret` (a password, or a token) is cut out of what is quoted, as is the user part of any URL.
pub(crate) fn understand(text: &str, secret: &str) -> Complaint {
    let kind =
        PHRASES.iter().find(|(phrase, _)| text.contains(phrase)).map_or(Kind::Unavailable, |(_, kind)| *kind);
    let mut quoted = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !BOILERPLATE.contains(line))
        .collect::<Vec<_>>()
        .join("; ");
    if !secret.is_empty() {
        quoted = quoted.replace(secret, "***").replace(&percent_encoded(secret), "***");
    }
    let quoted = without_users(&quoted).replace(char::is_control, " ");
    Complaint { kind, quoted: truncated(quoted, QUOTED_BYTES) }
}

/// What git adds to every failure of a transport.
const BOILERPLATE: [&str; 3] = [
    "fatal: Could not read from remote repository.",
    "Please make sure you have the correct access rights",
    "and the repository exists.",
];

/// `https://user@host` without `user@`: a token may stand in a user's place.
fn without_users(text: &str) -> String {
    let mut parts = text.split("://");
    let mut result = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let authority = part.split(['/', ' ', '\'', '"', ';']).next().unwrap_or_default();
        let user = authority.rfind('@').map_or(0, |at| at + 1);
        result.push_str("://");
        result.push_str(part.get(user..).unwrap_or_default());
    }
    result
}

/// As git writes a password into a URL.
fn percent_encoded(text: &str) -> String {
    let encode = |byte: u8| match byte {
        b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => char::from(byte).to_string(),
        other => format!("%{other:02x}"),
    };
    text.bytes().map(encode).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_git_was_seen_to_write() {
        for (text, kind) in [
            (
                "fatal: '/tmp/nope' does not appear to be a git repository\nfatal: Could not read from remote repository.",
                Kind::NoRepository,
            ),
            ("fatal: repository 'http://h/x/' not found", Kind::NoRepository),
            (
                "ERROR: Repository not found.\nfatal: Could not read from remote repository.",
                Kind::NoRepository,
            ),
            ("fatal: unable to access 'http://h/x/': Could not resolve host: h", Kind::UnknownHost),
            ("ssh: Could not resolve hostname h: Name or service not known", Kind::UnknownHost),
            ("fatal: unable to look up h (port 9418) (Name or service not known)", Kind::UnknownHost),
            ("fatal: Authentication failed for 'http://h/x/'", Kind::Unauthenticated),
            (
                "fatal: could not read Username for 'http://h': terminal prompts disabled",
                Kind::Unauthenticated,
            ),
            ("git@h: Permission denied (publickey).", Kind::Unauthenticated),
            ("fatal: unable to access 'http://h/x/': The requested URL returned error: 403", Kind::Denied),
            (
                "fatal: unable to access 'http://h/': Failed to connect to h port 1 after 0 ms: Couldn't connect to server",
                Kind::Unavailable,
            ),
            (
                "fatal: unable to access 'http://h/x/': The requested URL returned error: 503",
                Kind::Unavailable,
            ),
            ("", Kind::Unavailable),
        ] {
            assert_eq!(understand(text, "").kind, kind, "{text}");
        }
    }

    #[test]
    fn credentials_are_cut_out() {
        let text = "fatal: could not read Password for 'https://ghp_token@h': no\nremote: p@ss w p%40ss%20w\u{1b}[1m";
        let complaint = understand(text, "p@ss w");
        assert_eq!(
            complaint.quoted,
            "fatal: could not read Password for 'https://h': no; remote: *** *** [1m"
        );
        assert!(understand(&"x".repeat(10_000), "").quoted.len() <= QUOTED_BYTES);
    }
}
