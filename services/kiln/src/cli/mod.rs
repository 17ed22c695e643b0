//! The command line: what a person or a script asks of a gateway. Each command is one file; none of them
//! knows anything of the services but the public API.
//!
//! Standard output carries the answer (a log's bytes, a table, JSON); everything that Kiln itself has to say
//! goes to standard error.

mod build;
mod cancel;
mod completions;
mod connection;
mod events;
mod failure;
mod id;
mod json;
mod logs;
pub(crate) mod output;
mod progress;
mod ps;
mod refs;
mod resolve;
mod status;
mod stream;
mod time;

use std::process::ExitCode;

use failure::{Exit, Failure};

const EXIT_CODES: &str = "Exit codes: 0 done · 1 the build failed or was cancelled · 2 the request was wrong · \
                          3 the service could not be reached, or isn't able now · 4 it has no room now, as the queue is \
                          full · 130 left by Ctrl-C.";

/// The commands that talk to a gateway, and `completions`.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Build an image from a Dockerfile in a git repository, or copy one, and follow its log
    #[command(after_help = build::EXAMPLES, after_long_help = format!("{}\n\n{EXIT_CODES}", build::EXAMPLES))]
    Build(Box<build::BuildArgs>),
    /// Show a build's log, byte for byte
    #[command(after_help = logs::EXAMPLES)]
    Logs(logs::LogsArgs),
    /// List builds, newest first
    #[command(after_help = ps::EXAMPLES)]
    Ps(ps::PsArgs),
    /// Show one build: its state, image and steps
    #[command(after_help = status::EXAMPLES)]
    Status(status::StatusArgs),
    /// Ask that a build stop
    #[command(after_help = cancel::EXAMPLES)]
    Cancel(cancel::CancelArgs),
    /// Show the immutable form of an image reference
    #[command(after_help = resolve::EXAMPLES)]
    Resolve(resolve::ResolveArgs),
    /// List the images whose answers are kept warm
    #[command(after_help = refs::EXAMPLES)]
    Refs(refs::RefsArgs),
    /// Follow the builds' events on the bus
    #[command(after_help = events::EXAMPLES)]
    Events(events::EventsArgs),
    /// Write a completion script for a shell
    #[command(after_help = completions::EXAMPLES)]
    Completions(completions::CompletionsArgs),
}

/// Runs a command to its end and says on standard error what went wrong. `program` is the whole command line
/// as clap knows it, for `completions`.
pub(crate) async fn run(command: Command, program: clap::Command) -> ExitCode {
    let result = match command {
        Command::Build(args) => build::run(*args).await,
        Command::Logs(args) => logs::run(args).await,
        Command::Ps(args) => ps::run(args).await,
        Command::Status(args) => status::run(args).await,
        Command::Cancel(args) => cancel::run(args).await,
        Command::Resolve(args) => resolve::run(args).await,
        Command::Refs(args) => refs::run(args).await,
        Command::Events(args) => events::run(args).await,
        Command::Completions(args) => completions::run(&args, program).await,
    };
    match result {
        Ok(Exit::Done) => ExitCode::SUCCESS,
        Ok(Exit::NotBuilt) => ExitCode::from(1),
        // The runtime would wait for a write that a stopped reader holds up; who pressed Ctrl-C does not want to.
        Ok(Exit::Interrupted) => std::process::exit(130),
        // Whoever read our output has what it wanted (`kiln logs | head`).
        Err(Failure::OutputClosed) => ExitCode::SUCCESS,
        Err(failure) => {
            output::say(&failure.to_string());
            ExitCode::from(failure.exit_code())
        }
    }
}
