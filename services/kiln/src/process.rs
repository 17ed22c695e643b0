//! What runs a role as a process: logs, runtime, signals, exit status.

use std::process::ExitCode;

use anyhow::Context as _;
use kiln_chassis::shutdown::Signals;
use kiln_chassis::telemetry::{self, Settings};
use tokio_util::sync::CancellationToken;

/// Runs a role until it ends or a signal asks it to. Status 0 for an end that was asked for, 1 for any other.
pub(crate) fn run<F>(role: impl FnOnce(CancellationToken) -> F) -> ExitCode
where
    F: Future<Output = anyhow::Result<()>>,
{
    let run = || {
        telemetry::install(&Settings::of_process()?)?;
        let runtime =
            tokio::runtime::Builder::new_multi_thread().enable_all().build().context("no runtime")?;
        runtime.block_on(async {
            let stop = CancellationToken::new();
            let _signals = Signals::listen(stop.clone()).context("can't listen for signals")?;
            role(stop).await
        })
    };
    report(run())
}

/// Runs a command of the command line, which says itself what went wrong.
pub(crate) fn command(run: impl Future<Output = ExitCode>) -> ExitCode {
    match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(run),
        Err(error) => report(Err(error.into())),
    }
}

fn report(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Plainly, whatever the logs' format: most often somebody has just typed the command.
            eprintln!("kiln: {error:#}");
            ExitCode::FAILURE
        }
    }
}
