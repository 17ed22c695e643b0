//! Identities: image key, build id, run id, instance id. Each is a newtype that can hold only its own form,
//! so that it is safe in a bus subject, a path and a pod's name.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// An identifier that does not have its form.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a valid {what}: expected {expected}")]
pub struct InvalidId {
    pub what: &'static str,
    pub expected: &'static str,
}

macro_rules! string_id {
    ($name:ident, $what:literal, $expected:literal, $valid:expr) => {
        impl $name {
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl FromStr for $name {
            type Err = InvalidId;
            fn from_str(text: &str) -> Result<Self, InvalidId> {
                let valid: fn(&str) -> bool = $valid;
                if valid(text) {
                    Ok(Self(text.to_owned()))
                } else {
                    Err(InvalidId { what: $what, expected: $expected })
                }
            }
        }
        impl TryFrom<String> for $name {
            type Error = InvalidId;
            fn try_from(text: String) -> Result<Self, InvalidId> {
                text.parse()
            }
        }
        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }
    };
}

/// The first 32 hex digits of sha256 of the target reference: one image, one key.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
pub struct ImageKey(String);

string_id!(ImageKey, "image key", "32 hex digits", |text| text.len() == 32 && text.bytes().all(is_hex));

impl ImageKey {
    pub fn of(target_ref: &str) -> Self {
        let mut digits = hex::encode(Sha256::digest(target_ref.as_bytes()));
        digits.truncate(32);
        Self(digits)
    }
}

/// `<image key, first 16>-<image key, last 16>-<10 random characters of a-z0-9>0`: 45 characters, a DNS label
/// that Gitpod's proxies take for a workspace id.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
pub struct BuildId(String);

string_id!(BuildId, "build id", "<16 hex>-<16 hex>-<10 of a-z0-9>0", |text| has_id_form(text)
    && text.ends_with('0'));

impl BuildId {
    /// The id of a new build of an image; `entropy` are ten random bytes.
    pub fn new(key: &ImageKey, entropy: [u8; 10]) -> Self {
        const ALPHABET: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";
        let (first, last) = key.0.split_at(16);
        let random: String = entropy
            .iter()
            .filter_map(|byte| ALPHABET.get(usize::from(*byte) % ALPHABET.len()))
            .map(|byte| char::from(*byte))
            .collect();
        Self(format!("{first}-{last}-{random}0"))
    }

    /// The image that it builds: an id says its own key, so that it is found by a subject's prefix.
    pub fn image_key(&self) -> ImageKey {
        ImageKey(self.0.chars().take(33).filter(|c| *c != '-').collect())
    }
}

/// The build id with its last character replaced by the attempt (1–9): the name of the pod, workspace or
/// folder, so that a start is idempotent and attempt 2 can't adopt what is left of attempt 1.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
pub struct RunId(String);

string_id!(RunId, "run id", "a build id whose last character is the attempt, 1 to 9", |text| {
    has_id_form(text) && text.bytes().last().is_some_and(|last| (b'1'..=b'9').contains(&last))
});

impl RunId {
    /// `attempt` is 1 for the first; above 9 (which [`crate::limits::ATTEMPTS`] rules out) it stays 9.
    pub fn new(build: &BuildId, attempt: u32) -> Self {
        let stem = build.0.strip_suffix('0').unwrap_or(&build.0);
        Self(format!("{stem}{}", attempt.clamp(1, 9)))
    }

    pub fn build(&self) -> BuildId {
        let mut text = self.0.clone();
        text.pop();
        text.push('0');
        BuildId(text)
    }

    pub fn attempt(&self) -> u32 {
        self.0.chars().last().and_then(|last| last.to_digit(10)).unwrap_or(1)
    }
}

/// One life of one process that holds builds or writes logs. A process whose lease lapsed comes back under a
/// new one, without its claims.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
pub struct InstanceId(String);

string_id!(InstanceId, "instance id", "1 to 64 of a-z, 0-9 and '-'", |text| (1..=64).contains(&text.len())
    && text.bytes().all(|b| b == b'-' || b.is_ascii_lowercase() || b.is_ascii_digit()));

impl InstanceId {
    /// `<role>-<16 hex digits of entropy>`.
    pub fn new(role: &str, entropy: u64) -> Result<Self, InvalidId> {
        format!("{role}-{entropy:016x}").parse()
    }

    /// The role that it begins with.
    pub fn role(&self) -> &str {
        self.0.rsplit_once('-').map_or("", |(role, _)| role)
    }
}

/// A hex digit as Kiln and registries write it: lower case.
pub(crate) fn is_hex(byte: u8) -> bool {
    byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte)
}

fn has_id_form(text: &str) -> bool {
    let mut parts = text.split('-');
    let hex16 = |part: Option<&str>| part.is_some_and(|p| p.len() == 16 && p.bytes().all(is_hex));
    hex16(parts.next())
        && hex16(parts.next())
        && parts
            .next()
            .is_some_and(|p| p.len() == 11 && p.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit()))
        && parts.next().is_none()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn an_id_says_its_image_and_its_runs(target in ".{0,80}", entropy: [u8; 10], attempt in 1u32..=9) {
            let key = ImageKey::of(&target);
            let build = BuildId::new(&key, entropy);
            prop_assert_eq!(build.as_str().len(), 45);
            prop_assert_eq!(build.as_str().parse::<BuildId>(), Ok(build.clone()));
            prop_assert_eq!(build.image_key(), key);
            let run = RunId::new(&build, attempt);
            prop_assert_eq!(run.as_str().parse::<RunId>(), Ok(run.clone()));
            prop_assert_eq!(run.build(), build);
            prop_assert_eq!(run.attempt(), attempt);
        }

        #[test]
        fn nothing_but_an_id_parses(text in "[ -~]{0,64}") {
            prop_assume!(!has_id_form(&text));
            prop_assert!(text.parse::<BuildId>().is_err());
        }
    }

    #[test]
    fn what_could_reach_other_subjects_or_paths_is_no_id() {
        for text in ["", "*", ">", "../x", "a.b", &"x".repeat(10_240)] {
            assert!(text.parse::<BuildId>().is_err(), "{text:.20}");
            assert!(text.parse::<RunId>().is_err(), "{text:.20}");
            assert!(text.parse::<ImageKey>().is_err(), "{text:.20}");
        }
        assert!("orchestrator.1".parse::<InstanceId>().is_err());
    }
}
