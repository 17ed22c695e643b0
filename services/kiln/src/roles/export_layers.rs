//! `kiln export-layers`: brings the layers of a build that is over into the registry's cache. A builder starts it.

use std::path::PathBuf;
use std::process::ExitCode;

/// `kiln export-layers --folder DIR [--detach]`
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// What the builder put aside; it is removed
    #[arg(long, value_name = "DIR")]
    folder: PathBuf,
    /// Start another process that does it, and return
    #[arg(long)]
    detach: bool,
}

pub(crate) fn run(options: &Options) -> ExitCode {
    kiln_builder::export_layers(&options.folder, options.detach)
}
