//! `kiln ps`: the builds that wait or run, or all that are remembered.

use jiff::Timestamp;
use kiln_proto::kiln_v1::{Build, BuildState, ListBuildsRequest, Step};

use super::connection::{Connection, Gateway, answer};
use super::failure::{Exit, Failure};
use super::json::{BuildJson, reason_word, state_word};
use super::output::{Output, OutputArgs, table};
use super::progress;
use super::time;

pub(super) const EXAMPLES: &str = "\
Examples:
  kiln ps                              what waits and runs
  kiln ps -a --limit 20                the newest twenty, finished ones included
  kiln ps -a --owner alice -o json     one JSON object a build";

/// The API's largest page.
const PAGE: u32 = 1_000;

/// Options of `kiln ps`.
#[derive(Debug, clap::Args)]
pub(crate) struct PsArgs {
    /// Finished builds too
    #[arg(long, short)]
    all: bool,
    /// Only builds of this owner
    #[arg(long, value_name = "NAME")]
    owner: Option<String>,
    /// At most so many
    #[arg(long, short = 'n', value_name = "N", default_value = "100", value_parser = clap::value_parser!(u32).range(1..))]
    limit: u32,
    #[command(flatten)]
    connection: Connection,
    #[command(flatten)]
    output: OutputArgs,
}

pub(super) async fn run(args: PsArgs) -> Result<Exit, Failure> {
    let gateway = Gateway::connect(&args.connection).await?;
    let mut output = Output::new(&args.output);
    let mut builds = Vec::new();
    let mut left = args.limit;
    let mut page_token = String::new();
    loop {
        let page =
            answer("asking for the builds", gateway.builds().list_builds(request(&args, left, page_token)))
                .await?;
        for build in page.builds.into_iter().take(left as usize) {
            left -= 1;
            if output.is_json() {
                output.json(&BuildJson::from(&build)).await?;
            } else {
                builds.push(build);
            }
        }
        if page.next_page_token.is_empty() || left == 0 {
            break;
        }
        page_token = page.next_page_token;
    }
    if !output.is_json() {
        let now = time::now();
        let header = ["ID", "STATE", "AGE", "RAN", "OWNER", "REF"];
        output.line(&table(Some(header), builds.iter().map(|build| row(build, now)))).await?;
    }
    Ok(Exit::Done)
}

fn request(args: &PsArgs, left: u32, page_token: String) -> ListBuildsRequest {
    let active = [BuildState::Queued as i32, BuildState::Running as i32];
    ListBuildsRequest {
        states: if args.all { Vec::new() } else { active.to_vec() },
        owner: args.owner.clone().unwrap_or_default(),
        page_size: left.min(PAGE),
        page_token,
        ..ListBuildsRequest::default()
    }
}

fn row(build: &Build, now: Timestamp) -> [String; 6] {
    let state = match (reason_word(build.reason), &build.current_step) {
        (Some(reason), _) => format!("{} ({reason})", state_word(build.state)),
        (None, Some(step)) => stepping(&state_word(build.state), step, now),
        (None, None) if build.queue_position > 0 => {
            format!("{} · {} ahead", state_word(build.state), build.queue_position)
        }
        (None, None) => state_word(build.state),
    };
    [
        build.id.clone(),
        state,
        time::queued_at(build).map_or_else(String::new, |at| time::age(time::between(at, now))),
        time::run_time(build, now).map_or_else(String::new, time::duration),
        build.owner.clone(),
        short_ref(&build.r#ref),
    ]
}

/// `running [##--------] 3/7 · 23s`
fn stepping(state: &str, step: &Step, now: Timestamp) -> String {
    let of = progress::bar(step).map_or_else(
        || format!("{state} {}", step.number),
        |bar| format!("{state} {bar} {}/{}", step.number, step.of),
    );
    match progress::elapsed(step, now) {
        Some(elapsed) => format!("{of} · {}", time::duration(elapsed)),
        None => of,
    }
}

/// A reference whose tag is a long hash, cut to what a person compares by.
fn short_ref(reference: &str) -> String {
    match reference.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') && tag.len() > 16 => {
            format!("{name}:{}…", tag.chars().take(12).collect::<String>())
        }
        _ => reference.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows() {
        let at = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
        let build = Build {
            id: "id".into(),
            state: 2,
            owner: "alice".into(),
            queued_at: at(100),
            started_at: at(160),
            r#ref: format!("host:5000/x:{}", "a".repeat(64)),
            ..Build::default()
        };
        let step = Step { number: 2, of: 5, started_at: at(277), ..Step::default() };
        let now = time::timestamp(300, 0).unwrap();
        assert_eq!(row(&build, now), ["id", "running", "3m", "2m20s", "alice", "host:5000/x:aaaaaaaaaaaa…"]);
        let unknown = Step { of: 0, started_at: None, ..step.clone() };
        for (step, state) in [(step, "running [##--------] 2/5 · 23s"), (unknown, "running 2")] {
            assert_eq!(row(&Build { current_step: Some(step), ..build.clone() }, now)[1], state);
        }
        let waiting = Build { state: 1, started_at: None, queue_position: 3, ..build.clone() };
        assert_eq!(row(&waiting, now)[1], "queued · 3 ahead");
        assert_eq!(row(&Build { queue_position: 0, ..waiting }, now)[1], "queued");
        let failed = Build { state: 4, reason: 1, finished_at: at(165), ..build };
        assert_eq!(row(&failed, now)[1..4], ["failed (dockerfile)", "3m", "5.0s"]);
    }

    #[test]
    fn only_a_long_tag_is_cut() {
        for reference in ["host:5000/name", "host/name:latest", "name", "größe:日本"] {
            assert_eq!(short_ref(reference), reference);
        }
    }
}
