//! `kiln`: one binary, a role each. This is the table of roles; what a role does stands elsewhere.

mod check_config;
mod cli;
mod config;
mod doctor;
mod mk3_config;
mod process;
mod roles;
mod up;

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};

use crate::config::Role;

/// Builds container images from Dockerfiles.
#[derive(Debug, Parser)]
#[command(name = "kiln", version, max_term_width = 110)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    #[command(flatten)]
    Client(cli::Command),
    /// Run all of Kiln on this machine
    Up(Box<up::Options>),
    /// Run a gateway: the gRPC API
    Gateway(roles::Options),
    /// Run a resolver: what references and revisions are now
    Resolver(roles::Options),
    /// Run an orchestrator: decides about builds and sees them to their end
    Orchestrator(roles::Options),
    /// Run a log-relay: the builders' output into the logs
    LogRelay(roles::Options),
    /// Run a cache-warmer: keeps chosen references fresh
    CacheWarmer(roles::Options),
    /// Say what is wrong with a configuration file
    CheckConfig(check_config::Options),
    /// Examine an installation, and say what to do about what is found
    #[command(after_help = doctor::EXAMPLES)]
    Doctor(doctor::Options),
    /// Work on one run: an engine starts this
    #[command(hide = true)]
    Builder(roles::builder::Options),
    /// Keep a BuildKit daemon for as long as builders use it: a builder starts this
    #[command(hide = true)]
    KeepBuildkitd(roles::keep_buildkitd::Options),
    /// Bring a build's layers into the registry's cache: a builder starts this
    #[command(hide = true)]
    ExportLayers(roles::export_layers::Options),
    /// Become a program that ends with its parent: `kiln up` starts this
    #[command(hide = true)]
    Supervise(roles::supervise::Options),
}

fn main() -> ExitCode {
    kiln_registry::install_crypto_provider();
    match Arguments::parse().command {
        Command::Client(command) => process::command(cli::run(command, Arguments::command())),
        Command::Up(options) => process::run(|stop| up::run(*options, stop)),
        Command::Gateway(options) => process::run(|stop| roles::run(options, Role::Gateway, stop)),
        Command::Resolver(options) => process::run(|stop| roles::run(options, Role::Resolver, stop)),
        Command::Orchestrator(options) => process::run(|stop| roles::run(options, Role::Orchestrator, stop)),
        Command::LogRelay(options) => process::run(|stop| roles::run(options, Role::LogRelay, stop)),
        Command::CacheWarmer(options) => process::run(|stop| roles::run(options, Role::CacheWarmer, stop)),
        Command::CheckConfig(options) => check_config::run(&options),
        Command::Doctor(options) => process::command(doctor::run(options)),
        Command::Builder(options) => roles::builder::run(&options),
        Command::KeepBuildkitd(options) => roles::keep_buildkitd::run(&options),
        Command::ExportLayers(options) => roles::export_layers::run(&options),
        Command::Supervise(options) => roles::supervise::run(&options),
    }
}
