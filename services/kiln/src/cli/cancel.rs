//! `kiln cancel`: asks that a build stop.

use kiln_proto::kiln_v1::CancelBuildRequest;

use super::connection::{Connection, Gateway, answer};
use super::failure::{Exit, Failure};
use super::id;
use super::json::{BuildJson, state_word};
use super::output::{Output, OutputArgs, printable};
use super::stream::is_terminal;

pub(super) const EXAMPLES: &str = "\
Examples:
  kiln cancel 4f45d02e
  kiln cancel 4f45d02e --reason 'wrong branch'

A build that several wait for is stopped for all of them. One that is over already is shown as it is.";

/// Options of `kiln cancel`.
#[derive(Debug, clap::Args)]
pub(crate) struct CancelArgs {
    /// A build's id, or so much of its beginning as no other shares
    id: String,
    /// Why, for the record
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    reason: String,
    #[command(flatten)]
    connection: Connection,
    #[command(flatten)]
    output: OutputArgs,
}

pub(super) async fn run(args: CancelArgs) -> Result<Exit, Failure> {
    let gateway = Gateway::connect(&args.connection).await?;
    let id = id::find(&gateway, &args.id).await?;
    let request = CancelBuildRequest { id, reason: args.reason };
    let build = answer("cancelling the build", gateway.builds().cancel_build(request)).await?;
    let mut output = Output::new(&args.output);
    if output.is_json() {
        output.json(&BuildJson::from(&build)).await?;
    } else if is_terminal(&build) {
        output.line(&format!("{} {}", printable(&build.id), state_word(build.state))).await?;
    } else {
        output.line(&format!("{} {}, asked to stop", printable(&build.id), state_word(build.state))).await?;
    }
    Ok(Exit::Done)
}
