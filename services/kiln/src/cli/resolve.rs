//! `kiln resolve`: a reference to its immutable form.

use kiln_proto::kiln_v1::ResolveBaseImageRequest;
use serde_json::json;

use super::build::registry::RegistryArgs;
use super::connection::{Connection, Gateway, answer};
use super::failure::{Exit, Failure};
use super::output::{Output, OutputArgs, printable, say};

pub(super) const EXAMPLES: &str = "\
Examples:
  kiln resolve ubuntu:24.04
  kiln resolve ghcr.io/org/app --platform linux/arm64 --refresh
  kiln resolve registry.example.com/app --registry-auth-file ~/.docker/config.json";

/// Options of `kiln resolve`.
#[derive(Debug, clap::Args)]
pub(crate) struct ResolveArgs {
    /// An image reference, as Docker writes it
    #[arg(value_name = "REF")]
    reference: String,
    /// For which platform, as os/arch[/variant] [default: linux/amd64]
    #[arg(long, value_name = "PLATFORM", default_value = "", hide_default_value = true)]
    platform: String,
    /// Ask the registry even where the answer is known
    #[arg(long)]
    refresh: bool,
    #[command(flatten)]
    registry: RegistryArgs,
    #[command(flatten)]
    connection: Connection,
    #[command(flatten)]
    output: OutputArgs,
}

pub(super) async fn run(args: ResolveArgs) -> Result<Exit, Failure> {
    let auth = args.registry.auth()?;
    let gateway = Gateway::connect(&args.connection).await?;
    let request = ResolveBaseImageRequest {
        r#ref: args.reference,
        auth,
        platform: args.platform,
        refresh: args.refresh,
    };
    let answer = answer("resolving the reference", gateway.builds().resolve_base_image(request)).await?;
    let mut output = Output::new(&args.output);
    if output.is_json() {
        output.json(&json!({ "ref": answer.r#ref, "stale": answer.stale })).await?;
        return Ok(Exit::Done);
    }
    output.line(&printable(&answer.r#ref)).await?;
    if answer.stale {
        say("this answer is an old one: the registry could not be asked");
    }
    Ok(Exit::Done)
}
