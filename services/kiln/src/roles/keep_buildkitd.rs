//! `kiln keep-buildkitd`: keeps Kiln's own BuildKit daemon. A builder starts it.

use std::path::PathBuf;
use std::process::ExitCode;

/// `kiln keep-buildkitd --folder DIR [--detach]`
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The daemon's folder: its cache, its socket, and what it is told
    #[arg(long, value_name = "DIR")]
    folder: PathBuf,
    /// Start another process that does it, and return
    #[arg(long)]
    detach: bool,
}

/// Returns when the daemon has ended.
pub(crate) fn run(options: &Options) -> ExitCode {
    kiln_builder::keep_buildkitd(&options.folder, options.detach)
}
