//! Following a build: its log and its record side by side, until both have ended.

use std::time::Duration;

use futures::StreamExt as _;
use kiln_proto::kiln_v1::{Build, BuildState};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use super::super::connection::Gateway;
use super::super::failure::{Exit, Failure};
use super::super::json::LogJson;
use super::super::output::{Output, printable, say};
use super::super::progress::{self, StatusLine};
use super::super::stream::{self, Item, Piece, Start, is_terminal};
use super::super::time;
use super::result::{self, BuildResult};

/// How often the line below the log is drawn.
const REDRAW: Duration = Duration::from_millis(200);
/// How long the log of a build that is over may bring nothing before it is left incomplete.
const LOG_SILENCE: Duration = Duration::from_secs(30);

/// One build being followed.
pub(super) struct Follower {
    gateway: Gateway,
    /// The newest record.
    build: Build,
    joined: bool,
    output: Output,
    /// Nobody reads standard output any more; the build's end still decides the exit code.
    unread: bool,
    status: StatusLine,
}

impl Follower {
    pub(super) fn new(gateway: Gateway, build: Build, joined: bool, output: Output) -> Self {
        let status = StatusLine::new(!output.is_json());
        Self { gateway, build, joined, output, unread: false, status }
    }

    /// Shows log and progress until the build is over and its log complete.
    pub(super) async fn run(&mut self) -> Result<(), Failure> {
        self.announce().await?;
        let mut log = stream::log(&self.gateway, &self.build.id, Start::Beginning, true);
        let mut records = stream::watch(&self.gateway, &self.build.id);
        let mut redraw = interval(REDRAW);
        redraw.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut log_open = true;
        let mut last_news = Instant::now();
        while log_open || !is_terminal(&self.build) {
            tokio::select! {
                item = log.next(), if log_open => {
                    last_news = Instant::now();
                    log_open = self.log_item(item).await?;
                }
                item = records.next(), if !is_terminal(&self.build) => {
                    last_news = Instant::now();
                    match item {
                        Some(Ok(Item::New(build))) => self.record(build).await?,
                        // The log's stream breaks for the same reason, and says so.
                        Some(Ok(Item::Broken(failure))) if !log_open => self.notice(&format!("{failure}; trying again")),
                        Some(Ok(Item::Broken(_))) => {}
                        Some(Err(failure)) => return Err(failure),
                        None => return Ok(()),
                    }
                }
                _ = redraw.tick(), if self.status.is_enabled() => {
                    self.status.show(progress::line(&self.build, time::now()));
                }
                () = sleep_until(last_news + LOG_SILENCE), if is_terminal(&self.build) => {
                    self.notice("the build is over, but its log isn't complete yet");
                    log_open = false;
                }
            }
        }
        Ok(())
    }

    /// The build's end in words or as JSON.
    pub(super) async fn finish(mut self) -> Result<Exit, Failure> {
        self.status.finish();
        let result = BuildResult::of(&self.build).write(&mut self.output).await;
        match result {
            Err(Failure::OutputClosed) if self.build.state() == BuildState::Succeeded => Ok(Exit::Done),
            Err(Failure::OutputClosed) => Ok(Exit::NotBuilt),
            other => other,
        }
    }

    /// Leaves the terminal as it was found.
    pub(super) fn leave(&mut self) {
        self.status.finish();
    }

    async fn announce(&mut self) -> Result<(), Failure> {
        if self.output.is_json() {
            let written = result::record(&self.build, Some(self.joined), &mut self.output).await;
            return self.unless_unread(written);
        }
        let id = printable(&self.build.id);
        if self.joined {
            say(&format!("joined build {id}, which was there already"));
        } else {
            say(&format!("build {id}"));
        }
        if !self.status.is_enabled() {
            say(&progress::line(&self.build, time::now()));
        }
        Ok(())
    }

    /// Whether the log goes on.
    async fn log_item(&mut self, item: Option<Result<Item<Piece>, Failure>>) -> Result<bool, Failure> {
        match item {
            Some(Ok(Item::New(piece))) => self.piece(&piece).await?,
            Some(Ok(Item::Broken(failure))) => self.notice(&format!("{failure}; trying again")),
            // The build's own end is still to be waited for: the log may be past retention, or never begun.
            Some(Err(failure)) => {
                self.notice(&format!("{failure}; going on without the log"));
                return Ok(false);
            }
            None => return Ok(false),
        }
        Ok(true)
    }

    async fn piece(&mut self, piece: &Piece) -> Result<(), Failure> {
        if self.unread {
            return Ok(());
        }
        let written = if self.output.is_json() {
            self.output.json(&LogJson::from(piece)).await
        } else {
            self.status.make_way(&piece.content);
            self.output.bytes(&piece.content).await
        };
        self.unless_unread(written)
    }

    async fn record(&mut self, build: Build) -> Result<(), Failure> {
        let changed = (build.state, build.attempt) != (self.build.state, self.build.attempt);
        self.build = build;
        if self.output.is_json() && !self.unread {
            let written = result::record(&self.build, None, &mut self.output).await;
            return self.unless_unread(written);
        }
        if changed && !self.status.is_enabled() && !is_terminal(&self.build) && !self.output.is_json() {
            say(&progress::line(&self.build, time::now()));
        }
        Ok(())
    }

    fn notice(&mut self, text: &str) {
        self.status.finish();
        say(text);
    }

    fn unless_unread(&mut self, written: Result<(), Failure>) -> Result<(), Failure> {
        match written {
            Err(Failure::OutputClosed) => {
                self.unread = true;
                Ok(())
            }
            other => other,
        }
    }
}
