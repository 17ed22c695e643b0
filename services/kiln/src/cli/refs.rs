//! `kiln refs`: the images whose answers are kept warm.

use std::time::Duration;

use jiff::Timestamp;
use kiln_proto::kiln_v1::{ListWarmImagesRequest, WarmImage};
use serde_json::json;

use super::connection::{Connection, Gateway, answer};
use super::failure::{Exit, Failure};
use super::output::{Output, OutputArgs, table};
use super::time;

pub(super) const EXAMPLES: &str = "\
Examples:
  kiln refs                  those of the cache-warmer's list first, then the most used ones
  kiln refs -o json          one JSON object an image";

/// Options of `kiln refs`.
#[derive(Debug, clap::Args)]
pub(crate) struct RefsArgs {
    #[command(flatten)]
    connection: Connection,
    #[command(flatten)]
    output: OutputArgs,
}

pub(super) async fn run(args: RefsArgs) -> Result<Exit, Failure> {
    let gateway = Gateway::connect(&args.connection).await?;
    let request = ListWarmImagesRequest {};
    let list =
        answer("asking which images are kept warm", gateway.builds().list_warm_images(request)).await?;
    let mut output = Output::new(&args.output);
    if output.is_json() {
        for image in &list.images {
            output.json(&json_of(image)).await?;
        }
        return Ok(Exit::Done);
    }
    let now = time::now();
    let header = ["REF", "AGE", "KEPT FOR", "BUILDS", "LAST USED", "DIGEST"];
    output.line(&table(Some(header), list.images.iter().map(|image| row(image, now)))).await?;
    Ok(Exit::Done)
}

fn row(image: &WarmImage, now: Timestamp) -> [String; 6] {
    let digest = image.resolved.rsplit_once('@').map(|(_, digest)| digest).unwrap_or_default();
    let short: String = digest.chars().take("sha256:".len() + 12).collect();
    [
        image.r#ref.clone(),
        resolved_age(image).map_or_else(String::new, time::age),
        if image.configured { "the list".into() } else { "builds".into() },
        image.builds.to_string(),
        last_used(image).map_or_else(String::new, |at| time::age(time::between(at, now))),
        if image.trouble.is_empty() { short } else { image.trouble.clone() },
    ]
}

fn json_of(image: &WarmImage) -> serde_json::Value {
    json!({
        "ref": image.r#ref,
        "resolved": image.resolved,
        "age_ms": resolved_age(image).map(|age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX)),
        "configured": image.configured,
        "builds": image.builds,
        "last_used_at": last_used(image).map(|at| at.to_string()),
        "trouble": image.trouble,
    })
}

/// None while it was never resolved.
fn resolved_age(image: &WarmImage) -> Option<Duration> {
    image.age.filter(|_| !image.resolved.is_empty()).and_then(|age| age.try_into().ok())
}

fn last_used(image: &WarmImage) -> Option<Timestamp> {
    image.last_used_at.and_then(|at| time::timestamp(at.seconds, at.nanos))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows() {
        let image = WarmImage {
            r#ref: "r.io/a:1".into(),
            resolved: format!("r.io/a@sha256:{}", "ab".repeat(32)),
            age: Some(prost_types::Duration { seconds: 12, nanos: 0 }),
            configured: true,
            builds: 3,
            last_used_at: Some(prost_types::Timestamp { seconds: 100, nanos: 0 }),
            trouble: String::new(),
        };
        let now = time::timestamp(220, 0).unwrap();
        assert_eq!(row(&image, now), ["r.io/a:1", "12s", "the list", "3", "2m", "sha256:abababababab"]);
        let never = WarmImage {
            resolved: String::new(),
            configured: false,
            builds: 0,
            last_used_at: None,
            trouble: "not found".into(),
            ..image
        };
        assert_eq!(row(&never, now), ["r.io/a:1", "", "builds", "0", "", "not found"]);
        assert_eq!(json_of(&never)["age_ms"], serde_json::Value::Null);
    }
}
