//! Steps of a Dockerfile, and how a build tool's plain output tells of them.

use std::collections::BTreeMap;
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

impl Step {
    /// ``step 3/7 `RUN make` ``, as it stands in a sentence.
    pub fn label(&self) -> String {
        let Self { number, of, name, .. } = self;
        if *of == 0 { format!("step {number} `{name}`") } else { format!("step {number}/{of} `{name}`") }
    }
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

/// What a line of BuildKit's plain output tells of the vertex that it begins with (`#5 `). A line that a step itself
/// wrote has a time there, so that it can't be taken for one of these.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VertexLine {
    /// `#5 [build 2/3] RUN make`, with or without stage and platform. Vertexes that are no step of the Dockerfile
    /// (`[internal] …`, `exporting to image`) are not told of.
    Begun(StepLine),
    Cached,
    Done,
    Failed,
    /// Ended because another failed, or the build was cancelled.
    Cancelled,
}

impl VertexLine {
    /// The vertex's number and what is told of it.
    pub fn parse(line: &str) -> Option<(u32, Self)> {
        let (vertex, rest) = line.strip_prefix('#')?.split_once(' ')?;
        let told = match rest.split(' ').next()? {
            "CACHED" => Self::Cached,
            "DONE" => Self::Done,
            "ERROR:" => Self::Failed,
            "CANCELED" => Self::Cancelled,
            _ => {
                let (place, name) = rest.strip_prefix('[')?.split_once("] ")?;
                let (number, of) = place.rsplit(' ').next()?.split_once('/')?;
                let name = limits::truncated(name.trim().to_owned(), limits::NAME_BYTES);
                Self::Begun(StepLine { number: number.parse().ok()?, of: of.parse().ok()?, name })
            }
        };
        Some((vertex.parse().ok()?, told))
    }
}

/// Collects steps and their times from an output as it comes, in pieces of any size.
#[derive(Debug, Default)]
pub struct StepTimes {
    line: Vec<u8>,
    steps: Vec<Step>,
    /// BuildKit's vertexes that are steps, each with its place among them: they run at the same time.
    vertexes: BTreeMap<u32, usize>,
    failed: Option<usize>,
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
        } else if let Some((vertex, told)) = VertexLine::parse(line) {
            self.vertex(vertex, told, now);
        } else if line.starts_with("--> Using cache")
            && let Some(step) = self.steps.last_mut()
        {
            step.cached = true;
        }
    }

    fn vertex(&mut self, vertex: u32, told: VertexLine, now: Timestamp) {
        if let VertexLine::Begun(StepLine { number, of, name }) = told {
            if self.steps.len() < limits::STEPS && !self.vertexes.contains_key(&vertex) {
                self.vertexes.insert(vertex, self.steps.len());
                self.steps.push(Step { number, of, name, started_at: now, duration_ms: None, cached: false });
            }
            return;
        }
        let Some(&place) = self.vertexes.get(&vertex) else { return };
        let Some(step) = self.steps.get_mut(place) else { return };
        // A vertex may end more than once: an image is found, and later fetched.
        step.duration_ms = Some(milliseconds(step.started_at, now));
        step.cached |= told == VertexLine::Cached;
        if told == VertexLine::Failed {
            self.failed.get_or_insert(place);
        }
    }

    fn close(&mut self, now: Timestamp) {
        for step in self.steps.iter_mut().filter(|step| step.duration_ms.is_none()) {
            step.duration_ms = Some(milliseconds(step.started_at, now));
        }
    }

    /// The step that runs now; of several, the one that began last.
    pub fn current(&self) -> Option<&Step> {
        self.steps.iter().rev().find(|step| step.duration_ms.is_none())
    }

    /// The step that was told to have failed first.
    pub fn failed(&self) -> Option<&Step> {
        self.steps.get(self.failed?)
    }

    /// Ends the last step and gives all of them.
    pub fn finish(mut self, now: Timestamp) -> Vec<Step> {
        self.close(now);
        self.steps
    }
}

fn milliseconds(from: Timestamp, to: Timestamp) -> u64 {
    let took = Duration::try_from(to.duration_since(from)).unwrap_or_default();
    u64::try_from(took.as_millis()).unwrap_or(u64::MAX)
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
    fn lines_of_vertexes() {
        let begun = |vertex, number, of, name: &str| {
            Some((vertex, VertexLine::Begun(StepLine { number, of, name: name.into() })))
        };
        for (line, expected) in [
            ("#5 [2/3] RUN make", begun(5, 2, 3, "RUN make")),
            ("#6 [linux/arm64 build 1/2] COPY [a] /", begun(6, 1, 2, "COPY [a] /")),
            ("#6 CACHED", Some((6, VertexLine::Cached))),
            ("#6 DONE 0.1s", Some((6, VertexLine::Done))),
            ("#6 ERROR: process \"x\" did not complete successfully", Some((6, VertexLine::Failed))),
            ("#6 CANCELED", Some((6, VertexLine::Cancelled))),
            ("#1 [internal] load build context", None),
            ("#6 0.123 #7 [2/3] RUN a step's own words", None),
            ("#x DONE", None),
            ("# 5", None),
        ] {
            assert_eq!(VertexLine::parse(line), expected, "{line}");
        }
    }

    #[test]
    fn vertexes_run_side_by_side() {
        let at = |seconds| Timestamp::UNIX_EPOCH + jiff::SignedDuration::from_secs(seconds);
        let mut times = StepTimes::default();
        times.push(
            b"#1 [internal] load .dockerignore\n#1 DONE 0.0s\n#2 [a 1/1] RUN x\n#3 [b 1/2] RUN y\n",
            at(0),
        );
        times.push(b"#4 [b 2/2] COPY z\n#4 CACHED\n#2 0.2 #3 ERROR: no\n", at(1));
        assert_eq!(times.current().map(|step| step.name.as_str()), Some("RUN y"));
        assert_eq!(times.failed(), None);
        times.push(b"#3 ERROR: exit code: 1\n#2 CANCELED\n", at(2));
        assert_eq!(times.failed().map(|step| step.name.as_str()), Some("RUN y"));
        let seen: Vec<_> = times.finish(at(9)).iter().map(|s| (s.number, s.duration_ms, s.cached)).collect();
        assert_eq!(seen, [(1, Some(2000), false), (1, Some(2000), false), (2, Some(0), true)]);
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
