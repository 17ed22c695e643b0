//! `kiln check-config FILE`: what is wrong with a configuration file, by key; of an image-builder-mk3's also what is ignored.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use kiln_chassis::config::Error;

use crate::config::{Loaded, Role};

/// `kiln check-config`
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The JSON file of the services; KILN_… variables lie over it, as they do when it is used
    file: PathBuf,
    /// Also check what a process of these roles needs, where the file has no section of theirs
    #[arg(long = "for", value_name = "ROLE")]
    roles: Vec<Role>,
}

/// Prints every problem, a line each. Status 0 where there is none, 2 else. A key of mk3's that has no meaning here is none.
pub(crate) fn run(options: &Options) -> ExitCode {
    let (lines, status) = match Loaded::checked(Some(&options.file), &options.roles) {
        Ok(loaded) => (loaded.ignored, ExitCode::SUCCESS),
        Err(error) => match error.downcast_ref::<Error>() {
            Some(Error::Wrong(problems)) => {
                (problems.iter().map(ToString::to_string).collect(), ExitCode::from(2))
            }
            _ => (vec![format!("{error:#}")], ExitCode::from(2)),
        },
    };
    let mut out = std::io::stdout().lock();
    for line in &lines {
        // Who stopped reading has seen what they wanted.
        let _unread = writeln!(out, "{line}");
    }
    status
}
