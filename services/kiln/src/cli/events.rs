//! `kiln events`: the builds' events as any subscriber of the bus sees them.

use std::path::{Path, PathBuf};

use futures::StreamExt as _;
use kiln_bus::events::{Event, From, subscribe};
use serde::Serialize;

use super::failure::{Exit, Failure};
use super::output::{Output, OutputArgs, printable};

pub(super) const EXAMPLES: &str = "\
Examples:
  kiln events --data-dir ~/.local/share/kiln     of the installation that `kiln up` runs there, from now on
  kiln events --nats-url nats://subscriber:PASSWORD@127.0.0.1:4222 --all
  kiln events --after 4711 -o json               each event with the build's whole record

Give the URL by KILN_NATS_URL rather than as an option where others may see your processes.";

/// Options of `kiln events`.
#[derive(Debug, clap::Args)]
pub(crate) struct EventsArgs {
    /// The bus, with the read-only user: nats://subscriber:PASSWORD@HOST:PORT
    #[arg(
        long,
        value_name = "URL",
        env = "KILN_NATS_URL",
        hide_env_values = true,
        conflicts_with = "data_dir"
    )]
    nats_url: Option<String>,
    /// The data directory of a `kiln up`, whose endpoints.json has the URL
    #[arg(long, value_name = "DIR", env = "KILN_DATA_DIR")]
    data_dir: Option<PathBuf>,
    /// Begin with the oldest event that is kept
    #[arg(long, conflicts_with = "after")]
    all: bool,
    /// Begin after the event with this sequence
    #[arg(long, value_name = "SEQUENCE")]
    after: Option<u64>,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Serialize)]
struct EventJson<'a> {
    r#type: &'a str,
    build: &'a str,
    sequence: u64,
    time: String,
    data: &'a serde_json::Value,
}

pub(super) async fn run(args: EventsArgs) -> Result<Exit, Failure> {
    let url = match (&args.nats_url, &args.data_dir) {
        (Some(url), _) => url.clone(),
        (None, Some(folder)) => url_of(folder)?,
        (None, None) => {
            return Err(Failure::Request(
                "say where the bus is: --nats-url, KILN_NATS_URL or --data-dir".into(),
            ));
        }
    };
    let from = match (args.all, args.after) {
        (true, _) => From::Beginning,
        (false, Some(sequence)) => From::After(sequence),
        (false, None) => From::Now,
    };
    let bus = |error: kiln_bus::BusError| Failure::Bus(error);
    let mut events = std::pin::pin!(subscribe(&url, from).await.map_err(bus)?);
    let mut output = Output::new(&args.output);
    while let Some(event) = events.next().await {
        let event = event.map_err(bus)?;
        if output.is_json() {
            output.json(&json(&event)).await?;
        } else {
            output.line(&line(&event)).await?;
        }
    }
    Err(Failure::StreamEnded { doing: "following the events" })
}

/// The read-only user's URL of the installation in a data directory.
fn url_of(folder: &Path) -> Result<String, Failure> {
    let path = folder.join("endpoints.json");
    let unreadable =
        |problem: &dyn std::fmt::Display| Failure::Request(format!("{}: {problem}", path.display()));
    let text = std::fs::read_to_string(&path).map_err(|error| unreadable(&error))?;
    let endpoints: serde_json::Value = serde_json::from_str(&text).map_err(|error| unreadable(&error))?;
    endpoints
        .get("nats")
        .and_then(serde_json::Value::as_str)
        .map(ToOwned::to_owned)
        .ok_or_else(|| unreadable(&"has no \"nats\""))
}

fn json(event: &Event) -> EventJson<'_> {
    EventJson {
        r#type: &event.kind,
        build: &event.build,
        sequence: event.sequence,
        time: event.time.to_string(),
        data: &event.data,
    }
}

fn line(event: &Event) -> String {
    let text = |name: &str| event.data.get(name).and_then(serde_json::Value::as_str).unwrap_or_default();
    let what = event.kind.trim_start_matches("dev.kiln.build.").trim_end_matches(".v1");
    let line = format!(
        "{} {} {} {what} {} {}",
        event.sequence,
        event.time,
        event.build,
        text("state"),
        text("message")
    );
    printable(line.trim_end()).into_owned()
}
