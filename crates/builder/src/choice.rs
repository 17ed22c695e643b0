//! Which build tool a builder uses.

use std::path::Path;

use kiln_domain::run_folder::{Builder, Settings};
use rustix::process::geteuid;

use crate::programs;

/// A build tool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tool {
    Buildkit,
    Buildah,
}

impl Tool {
    pub fn name(self) -> &'static str {
        match self {
            Self::Buildkit => "buildkit",
            Self::Buildah => "buildah",
        }
    }
}

/// The tool that these settings mean on this host; the error says what is missing for it.
pub fn choose(settings: &Settings) -> Result<Tool, String> {
    match (settings.builder, missing(settings)) {
        (Builder::Buildah, _) | (Builder::Auto, Some(_)) => Ok(Tool::Buildah),
        (Builder::Buildkit | Builder::Auto, None) => Ok(Tool::Buildkit),
        (Builder::Buildkit, Some(program)) => Err(format!(
            "the configuration asks for BuildKit, and `{program}` is not on the PATH: `scripts/bootstrap --buildkit` brings it"
        )),
    }
}

/// What BuildKit needs and is not there.
pub fn missing(settings: &Settings) -> Option<&'static str> {
    let own = settings.buildkit.addresses.is_empty();
    let needed: &[&str] = match (own, geteuid().is_root()) {
        (false, _) => &["buildctl"],
        (true, true) => &["buildctl", "buildkitd", "runc"],
        (true, false) => &["buildctl", "buildkitd", "runc", "rootlesskit", "newuidmap"],
    };
    let folder: Option<&Path> = settings.programs.as_deref();
    needed.iter().find(|program| programs::find(program, folder).is_none()).copied()
}
