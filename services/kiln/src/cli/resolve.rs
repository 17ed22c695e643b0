//! `kiln resolve`: a reference to its immutable form, and whose word that is.

use std::time::Duration;

use kiln_proto::kiln_v1::{ResolveBaseImageRequest, ResolveBaseImageResponse};
use serde_json::json;

use super::build::registry::RegistryArgs;
use super::connection::{Connection, Gateway, answer};
use super::failure::{Exit, Failure};
use super::output::{Output, OutputArgs, printable, say};
use super::time;

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
        output.json(&json_of(&answer)).await?;
        return Ok(Exit::Done);
    }
    output.line(&printable(&answer.r#ref)).await?;
    say(&printable(&origin(&answer)));
    if answer.stale {
        say("this answer is an old one: the registry could not be asked");
    }
    Ok(Exit::Done)
}

fn age(answer: &ResolveBaseImageResponse) -> Duration {
    answer.age.and_then(|age| age.try_into().ok()).unwrap_or_default()
}

/// `for linux/amd64, from the cache: the registry said so 12s ago`
fn origin(answer: &ResolveBaseImageResponse) -> String {
    let (platform, age) = (&answer.platform, time::age(age(answer)));
    let who = if answer.mirror.is_empty() {
        "the registry".to_owned()
    } else {
        format!("mirror {}", answer.mirror)
    };
    if answer.cached {
        format!("for {platform}, from the cache: {who} said so {age} ago")
    } else {
        format!("for {platform}, from {who}")
    }
}

fn json_of(answer: &ResolveBaseImageResponse) -> serde_json::Value {
    json!({
        "ref": answer.r#ref,
        "platform": answer.platform,
        "stale": answer.stale,
        "age_ms": u64::try_from(age(answer).as_millis()).unwrap_or(u64::MAX),
        "cached": answer.cached,
        "mirror": answer.mirror,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whose_word_it_is() {
        for (cached, mirror, told) in [
            (false, "", "for linux/amd64, from the registry"),
            (false, "m.test:5000", "for linux/amd64, from mirror m.test:5000"),
            (true, "", "for linux/amd64, from the cache: the registry said so 12s ago"),
            (true, "m.test", "for linux/amd64, from the cache: mirror m.test said so 12s ago"),
        ] {
            let answer = ResolveBaseImageResponse {
                platform: "linux/amd64".into(),
                age: Some(prost_types::Duration { seconds: 12, nanos: 0 }),
                cached,
                mirror: mirror.into(),
                ..ResolveBaseImageResponse::default()
            };
            assert_eq!(origin(&answer), told);
            assert_eq!(json_of(&answer)["age_ms"], 12_000);
        }
    }
}
