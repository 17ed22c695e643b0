//! A platform, `os/arch[/variant]`.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `os/arch[/variant]`, as an image index names it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
pub struct Platform {
    pub os: String,
    pub architecture: String,
    pub variant: Option<String>,
}

/// A text that is not `os/arch[/variant]`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a platform: expected os/arch or os/arch/variant, e.g. linux/amd64")]
pub struct InvalidPlatform(String);

impl Default for Platform {
    fn default() -> Self {
        Self { os: "linux".into(), architecture: "amd64".into(), variant: None }
    }
}

impl FromStr for Platform {
    type Err = InvalidPlatform;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let part = |part: &str| {
            let fits = (1..=32).contains(&part.len())
                && part
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_' || b == b'-');
            fits.then(|| part.to_owned())
        };
        let invalid = || InvalidPlatform(crate::limits::truncated(text.to_owned(), 64));
        let mut parts = text.split('/');
        let os = parts.next().and_then(part).ok_or_else(invalid)?;
        let architecture = parts.next().and_then(part).ok_or_else(invalid)?;
        let variant = parts.next().map(|v| part(v).ok_or_else(invalid)).transpose()?;
        if parts.next().is_some() {
            return Err(invalid());
        }
        Ok(Self { os, architecture, variant })
    }
}

impl TryFrom<String> for Platform {
    type Error = InvalidPlatform;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Platform> for String {
    fn from(platform: Platform) -> String {
        platform.to_string()
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant.as_ref().map_or(Ok(()), |variant| write!(f, "/{variant}"))
    }
}
