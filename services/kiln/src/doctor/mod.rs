//! `kiln doctor`: examines an installation's parts, says what it finds and what to do about it.
//!
//! It knows nothing itself: each crate examines what it knows (`inspect` in it), at the same time as the others and for a
//! bounded time; here that is joined and printed.

mod bus;
mod engine;
mod installation;
mod report;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use kiln_domain::finding::{Finding, Verdict};
use kiln_engine_local::inspect::Found;

use self::installation::Installation;
use crate::cli::output::Format;
use crate::config::Config;

/// The longest that any examination may take.
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) const EXAMPLES: &str = "\
Examples:
  kiln doctor --data-dir ~/.local/share/kiln     the installation that `kiln up` keeps there, whether it runs or not
  kiln doctor --config /etc/kiln.json            one of single roles, with their configuration
  kiln doctor --json | jq 'select(.verdict == \"problem\")'

Without options: what `kiln up` keeps in its default data directory, if there is something, else what the KILN_… variables say.
Run it on the engine's host, as the user of the roles: elsewhere it can't see builders and what they left.

Exit codes: 0 no problem (there may be warnings) · 1 there are problems · 2 the options were wrong.";

/// `kiln doctor`
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The JSON file of the services; KILN_… variables lie over it
    #[arg(long, value_name = "FILE", env = "KILN_CONFIG")]
    config: Option<PathBuf>,
    /// The data directory of a `kiln up`
    #[arg(long, value_name = "DIR", env = "KILN_DATA_DIR")]
    data_dir: Option<PathBuf>,
    /// Remove what runs left whose builds are over, or unknown, for more than five minutes
    #[arg(long)]
    fix: bool,
    /// How the answer is written
    #[arg(long = "output", short = 'o', value_name = "FORMAT", value_enum, default_value = "text")]
    format: Format,
    /// The same as --output json: an object for each finding, and a last one that sums up
    #[arg(long)]
    json: bool,
}

/// Examines, prints, and says by the exit status whether there is a problem.
pub(crate) async fn run(options: Options) -> ExitCode {
    let format = if options.json { Format::Json } else { options.format };
    let findings = match Installation::find(options.config.as_deref(), options.data_dir) {
        Ok(installation) => examine(installation, options.fix).await,
        // What is to be examined isn't known.
        Err(finding) => vec![finding],
    };
    // Who stopped reading has seen what they wanted.
    let _unread = report::write(&findings, format);
    match report::worst(&findings) {
        Verdict::Problem => ExitCode::FAILURE,
        Verdict::Ok | Verdict::Unchecked | Verdict::Warning => ExitCode::SUCCESS,
    }
}

async fn examine(installation: Installation, fix: bool) -> Vec<Finding> {
    let Installation { config, runs, away, health, mut findings } = installation;
    let found = engine::look(&config);
    let (mut answer, registries, tools, ready) = tokio::join!(
        ask_bus(&config, &found, away, runs),
        registries(&config, runs),
        engine::tools(&config),
        installation::ready(health, runs),
    );
    findings.extend(ready);
    findings.append(&mut answer.findings);
    findings.extend(registries);
    if answer.elsewhere {
        findings.push(Finding::unchecked(
            "engine",
            "builders run on another host than this one: neither what they need nor what they left was looked at",
            "run this there",
        ));
        return findings;
    }
    findings.extend(tools);
    findings.extend(engine::rooms(&config));
    let stands = |found: &Found| answer.stands(found);
    let found = match found {
        Ok(found) if fix => {
            findings.extend(engine::fix(&config, &found, stands).await);
            // What is there now.
            engine::look(&config)
        }
        found => found,
    };
    findings.extend(engine::leftovers(&config, found, stands));
    findings
}

async fn ask_bus(
    config: &Config,
    found: &Result<Vec<Found>, Finding>,
    away: Option<Finding>,
    runs: bool,
) -> bus::Answer {
    if let Some(away) = away.filter(|_| !runs) {
        return bus::Answer::none(away);
    }
    let runs = found.iter().flatten().map(|found| found.run.build());
    bus::ask(config, runs.collect()).await
}

/// Both repositories, if there is an orchestrator's configuration.
async fn registries(config: &Config, runs: bool) -> Vec<Finding> {
    if !runs {
        return Vec::new();
    }
    let Some(orchestrator) = &config.orchestrator else {
        return vec![Finding::unchecked(
            "registry",
            "where images are pushed to isn't known",
            "give the orchestrator's configuration by --config or KILN_ORCHESTRATOR__… variables",
        )];
    };
    let registries = config.registries(&orchestrator.plain_http);
    let http = || kiln_registry::Config { registries: registries.clone(), ..Default::default() };
    let (base, workspace) = (&orchestrator.base_image_repository, &orchestrator.workspace_image_repository);
    let (base, workspace) = tokio::join!(
        kiln_registry::inspect::repository(http(), base),
        kiln_registry::inspect::repository(http(), workspace),
    );
    vec![base, workspace]
}

/// An examination within its time, or that it took longer.
async fn within<T>(
    part: &str,
    examination: impl Future<Output = Result<T, kiln_bus::BusError>>,
) -> Result<T, Finding> {
    match tokio::time::timeout(PATIENCE, examination).await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(error)) => Err(Finding::problem(
            part,
            error.to_string(),
            "see the log of nats-server, and what is said of streams and buckets here",
        )),
        Err(_) => Err(Finding::problem(
            part,
            format!("NATS did not answer within {} s", PATIENCE.as_secs()),
            "see whether nats-server is overloaded, stopped, or without most of its cluster",
        )),
    }
}
