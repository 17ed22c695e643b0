//! `kiln build`: asks for an image and follows its build to the end.

mod follow;
pub(super) mod registry;
mod request;
mod result;

use std::pin::pin;

use kiln_proto::kiln_v1::BuildImageResponse;
use kiln_proto::kiln_v1::build_image_response::Outcome;
use tokio::signal::unix::{Signal, SignalKind, signal};

use self::follow::Follower;
pub(crate) use self::request::BuildArgs;
use self::result::BuildResult;
use super::connection::{Gateway, answer};
use super::failure::{Exit, Failure};
use super::output::{Output, printable, say};

pub(super) const EXAMPLES: &str = "\
Examples:
  kiln build https://github.com/org/app.git
  kiln build https://github.com/org/app.git --revision v1.2 --file docker/Dockerfile --context .
  kiln build https://github.com/org/app.git --build-arg VERSION=1.2 --target release --label team=web
  kiln build https://git.example.com/private.git --git-username me --git-password-file ~/.git-token
  kiln build --image ubuntu:24.04          make the workspace image as a copy
  id=$(kiln build --detach https://github.com/org/app.git); kiln logs -f \"$id\"
  kiln build -o json URL | tail -n 1       {\"type\":\"result\",\"state\":\"succeeded\",\"ref\":…}

The log goes to standard output, byte for byte; progress and the result to standard error. With --output json
everything is on standard output, as objects whose \"type\" is \"build\", \"log\" or, last, \"result\".
Ctrl-C leaves the build running.";

pub(super) async fn run(args: BuildArgs) -> Result<Exit, Failure> {
    let (detach, output_args) = (args.detach, args.output.clone());
    let connection = args.connection.clone();
    let request = args.into_request()?;
    let gateway = Gateway::connect(&connection).await?;
    // From here on Ctrl-C is ours to answer: a build that was accepted must not be left without a word.
    let mut interrupts = Interrupts::listen()?;
    let mut builds = gateway.builds();
    let question = answer("asking for the build", builds.build_image(request));
    let (response, leaving) = match interrupts.unless_insistent(question).await {
        Some((response, leaving)) => (response?, leaving),
        None => return Ok(Exit::Interrupted),
    };
    let mut output = Output::new(&output_args);
    let BuildImageResponse { outcome, joined } = response;
    let build = match outcome {
        Some(Outcome::Build(build)) => build,
        Some(Outcome::AlreadyBuilt(image)) => {
            return BuildResult::already_built(&image).write(&mut output).await;
        }
        None => {
            let status = tonic::Status::internal("the gateway's answer names neither a build nor an image");
            return Err(Failure::rpc("asking for the build", status));
        }
    };
    let id = build.id.clone();
    if detach || leaving {
        result::accepted(&build, joined, &mut output).await?;
    }
    if leaving {
        come_back(&id);
        return Ok(Exit::Interrupted);
    }
    if detach {
        return Ok(Exit::Done);
    }
    let mut follower = Follower::new(gateway, build, joined, output);
    let ended = tokio::select! {
        ended = follower.run() => Some(ended),
        () = interrupts.next() => None,
    };
    match ended {
        Some(Ok(())) => follower.finish().await,
        Some(Err(failure)) => {
            follower.leave();
            if !failure.is_lost() {
                come_back(&id);
            }
            Err(failure)
        }
        None => {
            follower.leave();
            come_back(&id);
            Ok(Exit::Interrupted)
        }
    }
}

fn come_back(id: &str) {
    say(&format!("the build goes on; come back to it with: kiln logs -f {}", printable(id)));
}

/// Ctrl-C, as events. Once listened to it does not end the process by itself any more.
struct Interrupts(Signal);

impl Interrupts {
    fn listen() -> Result<Self, Failure> {
        signal(SignalKind::interrupt())
            .map(Self)
            .map_err(|error| Failure::Request(format!("can't listen for Ctrl-C: {error}")))
    }

    async fn next(&mut self) {
        if self.0.recv().await.is_none() {
            std::future::pending::<()>().await;
        }
    }

    /// Waits for `work` through a first Ctrl-C, and says whether there was one; none at the second.
    async fn unless_insistent<T>(&mut self, work: impl Future<Output = T>) -> Option<(T, bool)> {
        let mut work = pin!(work);
        let mut interrupted = false;
        loop {
            tokio::select! {
                done = &mut work => return Some((done, interrupted)),
                () = self.next() => {
                    if interrupted {
                        return None;
                    }
                    interrupted = true;
                    say("waiting for the build's id; Ctrl-C again to end at once");
                }
            }
        }
    }
}
