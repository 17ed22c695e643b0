//! `kiln status`: one build's record.

use jiff::Timestamp;
use kiln_proto::kiln_v1::{Build, BuildStatusRequest, BuiltImage, Step};

use super::connection::{Connection, Gateway, answer};
use super::failure::{Exit, Failure};
use super::id;
use super::json::{BuildJson, reason_word, state_word, step_duration};
use super::output::{Output, OutputArgs, table};
use super::progress;
use super::stream::is_terminal;
use super::time;

pub(super) const EXAMPLES: &str = "\
Examples:
  kiln status 4f45d02e                 the build whose id begins so
  kiln status -o json 4f45d02e         its whole record";

/// Options of `kiln status`.
#[derive(Debug, clap::Args)]
pub(crate) struct StatusArgs {
    /// A build's id, or so much of its beginning as no other shares
    id: String,
    #[command(flatten)]
    connection: Connection,
    #[command(flatten)]
    output: OutputArgs,
}

pub(super) async fn run(args: StatusArgs) -> Result<Exit, Failure> {
    let gateway = Gateway::connect(&args.connection).await?;
    let id = id::find(&gateway, &args.id).await?;
    let request = BuildStatusRequest { id };
    let build = answer("asking for the build", gateway.builds().build_status(request)).await?;
    let mut output = Output::new(&args.output);
    if output.is_json() {
        output.json(&BuildJson::from(&build)).await?;
    } else {
        output.line(&describe(&build, time::now())).await?;
    }
    Ok(Exit::Done)
}

/// The record as a table of what is known, then the steps.
fn describe(build: &Build, now: Timestamp) -> String {
    let when = |at: Option<Timestamp>| {
        at.map_or_else(String::new, |at| format!("{at:.0} ({} ago)", time::age(time::between(at, now))))
    };
    let mut labels: Vec<String> =
        build.labels.iter().map(|(name, value)| format!("{name}={value}")).collect();
    labels.sort();
    let state = if is_terminal(build) { state_word(build.state) } else { progress::line(build, now) };
    let facts = [
        ("id", build.id.clone()),
        ("state", state),
        ("reason", reason_word(build.reason).unwrap_or_default()),
        ("message", build.message.clone()),
        ("ref", build.r#ref.clone()),
        ("digest", build.digest.clone()),
        ("base ref", build.base_ref.clone()),
        ("commit", build.commit.clone()),
        ("owner", build.owner.clone()),
        ("labels", labels.join(" ")),
        ("engine", build.engine.clone()),
        ("build tool", build.build_tool.clone()),
        ("attempt", if build.attempt > 0 { build.attempt.to_string() } else { String::new() }),
        ("queued", when(time::queued_at(build))),
        ("started", when(time::started_at(build))),
        ("finished", when(time::finished_at(build))),
        ("ran", time::run_time(build, now).map_or_else(String::new, time::duration)),
    ];
    let known = facts
        .into_iter()
        .filter(|(_, value)| !value.is_empty())
        .map(|(name, value)| [name.to_owned(), value]);
    let mut text = table(None, known);
    if !build.images.is_empty() {
        text.push_str("\n\n");
        text.push_str(&table(Some(["PLATFORM", "BYTES", "DIGEST"]), build.images.iter().map(image_row)));
    }
    if !build.steps.is_empty() {
        text.push_str("\n\n");
        text.push_str(&table(Some(["STEP", "TIME", "NAME"]), build.steps.iter().map(step_row)));
    }
    text
}

fn image_row(image: &BuiltImage) -> [String; 3] {
    [image.platform.clone(), image.bytes.to_string(), image.digest.clone()]
}

fn step_row(step: &Step) -> [String; 3] {
    let number = if step.of > 0 { format!("{}/{}", step.number, step.of) } else { step.number.to_string() };
    let time = if step.cached {
        "cached".into()
    } else {
        step_duration(step).map_or_else(String::new, time::duration)
    };
    [number, time, step.name.clone()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_as_a_table() {
        let at = |seconds| Some(prost_types::Timestamp { seconds, nanos: 999_000_000 });
        let step = |number, name: &str, seconds, cached| Step {
            number,
            of: 2,
            name: name.into(),
            duration: Some(prost_types::Duration { seconds, nanos: 500_000_000 }),
            cached,
            ..Step::default()
        };
        let build = Build {
            id: "id".into(),
            r#ref: "host/x:y".into(),
            state: 4,
            reason: 1,
            message: "step 2 exited\nwith 7".into(),
            attempt: 1,
            queued_at: at(0),
            started_at: at(1),
            finished_at: at(4),
            labels: [("b".to_owned(), "2".to_owned()), ("a".to_owned(), "1".to_owned())].into(),
            steps: vec![step(1, "FROM scratch", 0, true), step(2, "RUN false", 2, false)],
            ..Build::default()
        };
        assert_eq!(
            describe(&build, time::timestamp(64, 0).unwrap()),
            "\
id        id
state     failed
reason    dockerfile
message   step 2 exited\\nwith 7
ref       host/x:y
labels    a=1 b=2
attempt   1
queued    1970-01-01T00:00:00Z (1m ago)
started   1970-01-01T00:00:01Z (1m ago)
finished  1970-01-01T00:00:04Z (59s ago)
ran       3.0s

STEP  TIME    NAME
1/2   cached  FROM scratch
2/2   2.5s    RUN false"
        );
    }
}
