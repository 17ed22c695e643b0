//! `kiln completions`: a script for a shell.

use clap_complete::Shell;

use super::failure::{Exit, Failure};
use super::output::Output;

pub(super) const EXAMPLES: &str = "\
Examples:
  kiln completions bash > ~/.local/share/bash-completion/completions/kiln
  kiln completions zsh > ~/.zfunc/_kiln
  kiln completions fish > ~/.config/fish/completions/kiln.fish";

/// Options of `kiln completions`.
#[derive(Debug, clap::Args)]
pub(crate) struct CompletionsArgs {
    /// The shell
    shell: Shell,
}

pub(super) async fn run(args: &CompletionsArgs, mut program: clap::Command) -> Result<Exit, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut program, "kiln", &mut script);
    Output::text().bytes(&script).await?;
    Ok(Exit::Done)
}
