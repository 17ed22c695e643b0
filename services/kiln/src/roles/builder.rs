//! `kiln builder`: works on one run. An engine starts it in the run's folder.

use std::path::PathBuf;
use std::process::ExitCode;

/// `kiln builder --run-dir DIR`
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[arg(long, value_name = "DIR")]
    run_dir: PathBuf,
}

/// Returns when the run has ended.
pub(crate) fn run(options: &Options) -> ExitCode {
    kiln_builder::run(&options.run_dir).into()
}
