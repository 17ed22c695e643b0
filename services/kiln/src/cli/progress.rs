//! A build's progress: one line in words, and the line that stands below the log on a terminal.

use std::io::IsTerminal as _;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use jiff::Timestamp;
use kiln_proto::kiln_v1::{Build, BuildState, Step};

use super::json::state_word;
use super::output::{printable, say_raw};
use super::time::{self, between, duration, timestamp};

/// `queued · 3 ahead · 12s`, `[##--------] step 3/7 · RUN apt-get update · 12s (1m04s in all)`.
pub(super) fn line(build: &Build, now: Timestamp) -> String {
    let mut line = match build.state() {
        BuildState::Queued => {
            let ahead = if build.queue_position > 0 {
                format!(" · {} ahead", build.queue_position)
            } else {
                String::new()
            };
            let waited = time::queued_at(build)
                .map_or_else(String::new, |at| format!(" · {}", duration(between(at, now))));
            format!("queued{ahead}{waited}")
        }
        BuildState::Running => running(build, now),
        _ => state_word(build.state),
    };
    if build.attempt > 1 {
        line.push_str(&format!(" · attempt {}", build.attempt));
    }
    line
}

/// `[####------]`: how many of the steps are done. None where it isn't known how many there are.
pub(super) fn bar(step: &Step) -> Option<String> {
    const WIDTH: u32 = 10;
    let before = u64::from(step.number.saturating_sub(1).min(step.of));
    let done = (before * u64::from(WIDTH)).checked_div(u64::from(step.of))?;
    let cells: String = (0..u64::from(WIDTH)).map(|cell| if cell < done { '#' } else { '-' }).collect();
    Some(format!("[{cells}]"))
}

/// How long a step has run.
pub(super) fn elapsed(step: &Step, now: Timestamp) -> Option<Duration> {
    let at = step.started_at.as_ref().and_then(|at| timestamp(at.seconds, at.nanos))?;
    Some(between(at, now))
}

fn running(build: &Build, now: Timestamp) -> String {
    let whole = time::run_time(build, now).map(duration);
    let Some(step) = &build.current_step else {
        return whole.map_or_else(|| "running".into(), |whole| format!("running · {whole}"));
    };
    let mut line = match bar(step) {
        Some(bar) => format!("{bar} step {}/{} · {}", step.number, step.of, printable(&step.name)),
        None => format!("step {} · {}", step.number, printable(&step.name)),
    };
    if let Some(elapsed) = elapsed(step, now) {
        line.push_str(&format!(" · {}", duration(elapsed)));
    }
    if let Some(whole) = whole {
        line.push_str(&format!(" ({whole} in all)"));
    }
    line
}

/// The line below the log, on standard error. It is there only while the log's last line is a whole one, and
/// not at all where standard error is no terminal.
#[derive(Debug)]
pub(super) struct StatusLine {
    bar: Option<ProgressBar>,
    enabled: bool,
    /// Standard output is a terminal too, and mostly the same one.
    shares: bool,
    at_line_start: bool,
}

impl StatusLine {
    /// With `wanted` false it never shows.
    pub(super) fn new(wanted: bool) -> Self {
        Self {
            bar: None,
            enabled: wanted && std::io::stderr().is_terminal(),
            shares: std::io::stdout().is_terminal(),
            at_line_start: true,
        }
    }

    pub(super) fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// Draws `text`, if there is room for a line now.
    pub(super) fn show(&mut self, text: String) {
        if !self.enabled || !self.at_line_start {
            return;
        }
        let bar = self.bar.get_or_insert_with(|| {
            let style = ProgressStyle::with_template("{spinner} {wide_msg}");
            ProgressBar::new_spinner().with_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()))
        });
        bar.set_message(text);
        bar.tick();
    }

    /// Takes the line away before `log` is written; the next [`Self::show`] brings it back.
    pub(super) fn make_way(&mut self, log: &[u8]) {
        self.clear();
        if self.shares
            && let Some(last) = log.last()
        {
            self.at_line_start = *last == b'\n';
        }
    }

    /// Takes the line away, and ends the log's last line if it isn't, so that words of ours begin a new one.
    pub(super) fn finish(&mut self) {
        self.clear();
        if !self.at_line_start {
            say_raw("\n");
            self.at_line_start = true;
        }
    }

    /// Takes the line away, for other words on standard error.
    pub(super) fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_shows_the_steps_that_are_done() {
        for (number, of, expected) in [
            (1, 7, Some("[----------]")),
            (7, 7, Some("[########--]")),
            (2, 2, Some("[#####-----]")),
            (1, 1, Some("[----------]")),
            // A tool that counts otherwise.
            (9, 2, Some("[##########]")),
            (0, 3, Some("[----------]")),
            (u32::MAX, u32::MAX, Some("[#########-]")),
            (3, 0, None),
        ] {
            let step = Step { number, of, ..Step::default() };
            assert_eq!(bar(&step).as_deref(), expected, "{number}/{of}");
        }
    }

    #[test]
    fn a_line_says_where_a_build_is() {
        let at = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
        let queued = Build { state: 1, queued_at: at(100), queue_position: 3, ..Build::default() };
        let running =
            Build { state: 2, queued_at: at(100), started_at: at(110), attempt: 1, ..Build::default() };
        let step = Step {
            number: 3,
            of: 7,
            name: "RUN echo \x1b[2J".into(),
            started_at: at(152),
            ..Step::default()
        };
        let stepping = Build { current_step: Some(step.clone()), ..running.clone() };
        let unknown = Step { of: 0, started_at: None, name: "COPY . /".into(), ..step };
        for (build, expected) in [
            (queued.clone(), "queued · 3 ahead · 1m15s"),
            (Build { queue_position: 0, ..queued }, "queued · 1m15s"),
            (Build { attempt: 2, ..running.clone() }, "running · 1m05s · attempt 2"),
            (running.clone(), "running · 1m05s"),
            (stepping, "[##--------] step 3/7 · RUN echo \\u{1b}[2J · 23s (1m05s in all)"),
            (Build { current_step: Some(unknown), ..running }, "step 3 · COPY . / (1m05s in all)"),
            (Build { state: 3, ..Build::default() }, "succeeded"),
            (Build { state: 77, ..Build::default() }, "state-77"),
        ] {
            assert_eq!(line(&build, timestamp(175, 0).unwrap()), expected);
        }
    }
}
