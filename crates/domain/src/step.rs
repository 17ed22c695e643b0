//! Steps of a Dockerfile, and how a build tool's plain output tells of them.

use std::time::Duration;

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::limits;

/// One step of a build with its time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Step {
    /// From 1.
    pub number: u32,
    /// 0 when it isn't known.
    pub of: u32,
    /// As the build tool prints it, at most [`limits::NAME_BYTES`].
    pub name: String,
    pub started_at: Timestamp,
    /// Absent while it runs.
    pub duration_ms: Option<u64>,
    pub cached: bool,
}

/// The head of a step in a build tool's output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepLine {
    pub number: u32,
    pub of: u32,
    pub name: String,
}

impl StepLine {
    /// Reads buildah's `STEP 3/7: RUN make` (with or without a stage in brackets before the number) from a line
    /// without its line end.
    pub fn parse(line: &str) -> Option<Self> {
        let line = line.trim_start();
        let rest = match line.strip_prefix('[') {
            Some(staged) => staged.split_once("] ")?.1,
            None => line,
        };
        let (count, name) = rest.strip_prefix("STEP ")?.split_once(':')?;
        let (number, of) = match count.split_once('/') {
            Some((number, of)) => (number.parse().ok()?, of.parse().ok()?),
            None => (count.parse().ok()?, 0),
        };
        Some(Self { number, of, name: limits::truncated(name.trim().to_owned(), limits::NAME_BYTES) })
    }
}

/// Collects steps and their times from an output as it comes, in pieces of any size.
#[derive(Debug, Default)]
pub struct StepTimes {
    line: Vec<u8>,
    steps: Vec<Step>,
}

impl StepTimes {
    /// The beginning of a line that is kept while its end hasn't come.
    const LINE_BYTES: usize = 1024;

    /// Takes a piece of the output that came at `now`.
    pub fn push(&mut self, piece: &[u8], now: Timestamp) {
        for byte in piece {
            if *byte == b'\n' {
                let line = std::mem::take(&mut self.line);
                self.line_ended(&String::from_utf8_lossy(&line), now);
            } else if self.line.len() < Self::LINE_BYTES {
                self.line.push(*byte);
            }
        }
    }

    fn line_ended(&mut self, line: &str, now: Timestamp) {
        if let Some(StepLine { number, of, name }) = StepLine::parse(line) {
            self.close(now);
            if self.steps.len() < limits::STEPS {
                self.steps.push(Step { number, of, name, started_at: now, duration_ms: None, cached: false });
            }
        } else if line.starts_with("--> Using cache")
            && let Some(step) = self.steps.last_mut()
        {
            step.cached = true;
        }
    }

    fn close(&mut self, now: Timestamp) {
        if let Some(step) = self.steps.last_mut().filter(|step| step.duration_ms.is_none()) {
            let took = Duration::try_from(now.duration_since(step.started_at)).unwrap_or_default();
            step.duration_ms = Some(u64::try_from(took.as_millis()).unwrap_or(u64::MAX));
        }
    }

    /// The step that runs now.
    pub fn current(&self) -> Option<&Step> {
        self.steps.last().filter(|step| step.duration_ms.is_none())
    }

    /// Ends the last step and gives all of them.
    pub fn finish(mut self, now: Timestamp) -> Vec<Step> {
        self.close(now);
        self.steps
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines() {
        let step = |number, of, name: &str| Some(StepLine { number, of, name: name.into() });
        for (line, expected) in [
            ("STEP 3/7: RUN make", step(3, 7, "RUN make")),
            ("[1/2] STEP 1/4: FROM scratch AS a", step(1, 4, "FROM scratch AS a")),
            ("STEP 2: COPY a b", step(2, 0, "COPY a b")),
            ("a STEP 3/7: RUN make", None),
            ("STEP x/7: RUN", None),
            ("STEP 3/7", None),
        ] {
            assert_eq!(StepLine::parse(line), expected, "{line}");
        }
    }

    #[test]
    fn times_do_not_depend_on_how_the_output_is_cut() {
        let output = b"STEP 1/2: FROM scratch\nSTEP 2/2: RUN x\n--> Using cache abc\nhello\n";
        for size in 1..output.len() {
            let mut times = StepTimes::default();
            for piece in output.chunks(size) {
                times.push(piece, Timestamp::UNIX_EPOCH);
            }
            let steps = times.finish(Timestamp::UNIX_EPOCH + jiff::SignedDuration::from_secs(2));
            let seen: Vec<_> = steps.iter().map(|s| (s.number, s.duration_ms, s.cached)).collect();
            assert_eq!(seen, [(1, Some(0), false), (2, Some(2000), true)], "in pieces of {size}");
        }
    }
}
