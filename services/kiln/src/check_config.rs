//! `kiln check-config FILE`: what is wrong with a configuration file, by key.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use kiln_chassis::config::Error;

use crate::config::{Config, Role};

/// `kiln check-config`
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The JSON file of the services; KILN_… variables lie over it, as they do when it is used
    file: PathBuf,
    /// Also check what a process of these roles needs, where the file has no section of theirs
    #[arg(long = "for", value_name = "ROLE")]
    roles: Vec<Role>,
}

/// Prints every problem, a line each. Status 0 where there is none, 2 else.
pub(crate) fn run(options: &Options) -> ExitCode {
    let lines = match Config::load(Some(&options.file), &options.roles) {
        Ok(_) => Vec::new(),
        Err(Error::Wrong(problems)) => problems.iter().map(ToString::to_string).collect(),
        Err(other) => vec![format!("{:#}", anyhow::Error::from(other))],
    };
    let mut out = std::io::stdout().lock();
    for line in &lines {
        // Who stopped reading has seen what they wanted.
        let _unread = writeln!(out, "{line}");
    }
    if lines.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(2) }
}
