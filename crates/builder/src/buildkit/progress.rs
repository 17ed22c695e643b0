//! buildctl's progress events (`--progress=rawjson`) as the lines that `docker build --progress=plain` prints.
//!
//! A line of a step's own begins with its vertex's number and a time; what BuildKit says of the vertex begins with the
//! number alone. So no step can write what looks like the build's own words.

use std::collections::HashMap;

use base64::Engine as _;
use jiff::Timestamp;
use serde::Deserialize;

/// The beginning of a line that is kept while its end hasn't come.
const LINE_BYTES: usize = 1 << 20;
/// Of what is no event, what is kept.
const WORDS_BYTES: usize = 64 * 1024;

/// One event: any of its lists may be absent.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Event {
    vertexes: Vec<Vertex>,
    statuses: Vec<Status>,
    logs: Vec<Log>,
    warnings: Vec<Warning>,
}

#[derive(Deserialize)]
struct Vertex {
    digest: String,
    #[serde(default)]
    name: String,
    started: Option<Timestamp>,
    completed: Option<Timestamp>,
    #[serde(default)]
    cached: bool,
    #[serde(default)]
    error: String,
}

/// A part of a vertex's work: a transfer, an export.
#[derive(Deserialize)]
struct Status {
    id: String,
    vertex: String,
    #[serde(default)]
    current: u64,
    started: Option<Timestamp>,
    completed: Option<Timestamp>,
}

#[derive(Deserialize)]
struct Log {
    vertex: String,
    /// Base64.
    #[serde(default)]
    data: String,
    timestamp: Timestamp,
}

#[derive(Deserialize)]
struct Warning {
    vertex: String,
    /// Base64.
    #[serde(default)]
    short: String,
}

/// What is known of a vertex that was told of.
struct Known {
    number: usize,
    started: Timestamp,
    /// When it ended last, where it isn't at work again.
    completed: Option<Timestamp>,
    /// Of its output: a line whose end hasn't come.
    line: Vec<u8>,
}

/// Makes plain text of events as they come. What is no event is passed on as it is.
#[derive(Default)]
pub(crate) struct Plain {
    vertexes: HashMap<String, Known>,
    /// What of buildctl's output is a line that isn't ended.
    rest: Vec<u8>,
    text: Vec<u8>,
    /// What was no event: buildctl's own last words.
    words: String,
}

impl Plain {
    /// Takes a piece of buildctl's output; the text that it makes.
    pub(crate) fn push(&mut self, piece: &[u8]) -> Vec<u8> {
        for part in piece.split_inclusive(|byte| *byte == b'\n') {
            self.rest.extend_from_slice(part);
            if part.ends_with(b"\n") {
                let line = std::mem::take(&mut self.rest);
                self.line(&line);
            }
        }
        std::mem::take(&mut self.text)
    }

    /// The output has ended: what is left of it, as text.
    pub(crate) fn finish(&mut self) -> Vec<u8> {
        let line = std::mem::take(&mut self.rest);
        if !line.is_empty() {
            self.line(&line);
        }
        let mut open: Vec<_> = self.vertexes.values_mut().filter(|known| !known.line.is_empty()).collect();
        open.sort_by_key(|known| known.number);
        for known in open {
            say_line(&mut self.text, known.number, None, &std::mem::take(&mut known.line));
        }
        std::mem::take(&mut self.text)
    }

    /// What buildctl said besides events: why it failed.
    pub(crate) fn words(&self) -> &str {
        &self.words
    }

    fn line(&mut self, line: &[u8]) {
        match serde_json::from_slice::<Event>(line) {
            Ok(event) if line.starts_with(b"{") => self.event(event),
            _ => {
                self.text.extend_from_slice(line);
                if self.words.len() < WORDS_BYTES {
                    self.words.push_str(&String::from_utf8_lossy(line));
                }
            }
        }
    }

    fn event(&mut self, event: Event) {
        // Of a vertex that an event names more than once, the last is how it stands.
        let last: HashMap<_, _> =
            event.vertexes.iter().enumerate().map(|(at, vertex)| (vertex.digest.as_str(), at)).collect();
        let vertexes = event.vertexes.iter().enumerate();
        let vertexes: Vec<_> = vertexes
            .filter(|(at, vertex)| last.get(vertex.digest.as_str()) == Some(at))
            .map(|(_, vertex)| vertex)
            .collect();
        for vertex in &vertexes {
            self.begin(vertex);
        }
        for status in event.statuses {
            self.status(&status);
        }
        for log in event.logs {
            self.log(&log);
        }
        for warning in event.warnings {
            self.warning(&warning);
        }
        // What a vertex said comes before its end, also where one event tells of both.
        for vertex in vertexes {
            self.end(vertex);
        }
    }

    fn begin(&mut self, vertex: &Vertex) {
        let Some(started) = vertex.started else { return };
        let number = self.vertexes.len() + 1;
        match self.vertexes.get_mut(&vertex.digest) {
            Some(known) => {
                if vertex.completed.is_none() {
                    (known.started, known.completed) = (started, None);
                }
            }
            None => {
                let known = Known { number, started, completed: None, line: Vec::new() };
                self.vertexes.insert(vertex.digest.clone(), known);
                let name = vertex.name.replace(['\n', '\r'], " ");
                self.text.extend_from_slice(format!("#{number} {name}\n").as_bytes());
            }
        }
    }

    fn end(&mut self, vertex: &Vertex) {
        let (Some(known), Some(completed)) = (self.vertexes.get_mut(&vertex.digest), vertex.completed) else {
            return;
        };
        if known.completed == Some(completed) {
            return;
        }
        known.completed = Some(completed);
        let number = known.number;
        let line = std::mem::take(&mut known.line);
        if !line.is_empty() {
            say_line(&mut self.text, number, Some(seconds(known.started, completed)), &line);
        }
        let told = if vertex.error.ends_with("context canceled") {
            "CANCELED".to_owned()
        } else if !vertex.error.is_empty() {
            format!("ERROR: {}", vertex.error.replace('\n', " "))
        } else if vertex.cached {
            "CACHED".to_owned()
        } else {
            format!("DONE {:.1}s", seconds(vertex.started.unwrap_or(known.started), completed))
        };
        self.text.extend_from_slice(format!("#{number} {told}\n").as_bytes());
    }

    fn status(&mut self, status: &Status) {
        let (Some(known), Some(completed)) = (self.vertexes.get(&status.vertex), status.completed) else {
            return;
        };
        let mut line = format!("#{} {}", known.number, status.id);
        if status.current > 0 {
            line.push_str(&format!(" {}", size(status.current)));
        }
        let took = seconds(status.started.unwrap_or(completed), completed);
        self.text.extend_from_slice(format!("{line} {took:.1}s done\n").as_bytes());
    }

    fn log(&mut self, log: &Log) {
        let Some(known) = self.vertexes.get_mut(&log.vertex) else { return };
        let Ok(data) = base64::engine::general_purpose::STANDARD.decode(&log.data) else { return };
        let after = seconds(known.started, log.timestamp);
        for part in data.split_inclusive(|byte| *byte == b'\n') {
            known.line.extend_from_slice(part);
            if part.ends_with(b"\n") || known.line.len() >= LINE_BYTES {
                say_line(&mut self.text, known.number, Some(after), &known.line);
                known.line.clear();
            }
        }
    }

    fn warning(&mut self, warning: &Warning) {
        let number = self.vertexes.get(&warning.vertex).map_or(0, |known| known.number);
        let Ok(short) = base64::engine::general_purpose::STANDARD.decode(&warning.short) else { return };
        let short = String::from_utf8_lossy(&short).replace('\n', " ");
        self.text.extend_from_slice(format!("#{number} WARN: {short}\n").as_bytes());
    }
}

fn say_line(text: &mut Vec<u8>, number: usize, after: Option<f64>, line: &[u8]) {
    text.extend_from_slice(format!("#{number} {:.3} ", after.unwrap_or_default()).as_bytes());
    text.extend_from_slice(line);
    if !line.ends_with(b"\n") {
        text.push(b'\n');
    }
}

fn seconds(from: Timestamp, to: Timestamp) -> f64 {
    to.duration_since(from).as_secs_f64().max(0.0)
}

fn size(bytes: u64) -> String {
    let of = |unit: u64| bytes as f64 / unit as f64;
    match bytes {
        0..1_000 => format!("{bytes}B"),
        1_000..1_000_000 => format!("{:.2}kB", of(1_000)),
        1_000_000..1_000_000_000 => format!("{:.2}MB", of(1_000_000)),
        _ => format!("{:.2}GB", of(1_000_000_000)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const T: &str = "2026-11-24T13:43:0";

    fn plain(events: &str) -> String {
        let mut plain = Plain::default();
        let mut text = plain.push(events.as_bytes());
        text.extend(plain.finish());
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn events_as_text() {
        let begun = format!(r#"{{"vertexes":[{{"digest":"a","name":"[1/2] RUN x","started":"{T}1Z"}}]}}"#);
        let log = |at: &str, text: &str| {
            let data = base64::engine::general_purpose::STANDARD.encode(text);
            format!(r#"{{"logs":[{{"vertex":"a","stream":1,"data":"{data}","timestamp":"{T}{at}Z"}}]}}"#)
        };
        let ended = |rest: &str| {
            format!(
                r#"{{"vertexes":[{{"digest":"a","name":"[1/2] RUN x","started":"{T}1Z","completed":"{T}2.5Z"{rest}}}]}}"#
            )
        };
        let (one, two) = (log("1.25", "one\ntw"), log("1.5", "o\nlast"));
        for (events, expected) in [
            (vec![&*begun, &*ended("")], "#1 [1/2] RUN x\n#1 DONE 1.5s\n"),
            (vec![&*ended(""), &*ended("")], "#1 [1/2] RUN x\n#1 DONE 1.5s\n"),
            (vec![&*ended(r#","cached":true"#)], "#1 [1/2] RUN x\n#1 CACHED\n"),
            (
                vec![&*begun, &*one, &*two, &*ended(r#","error":"exit\ncode: 9""#)],
                "#1 [1/2] RUN x\n#1 0.250 one\n#1 0.500 two\n#1 1.500 last\n#1 ERROR: exit code: 9\n",
            ),
            (vec![&*ended(r#","error":"x: context canceled""#)], "#1 [1/2] RUN x\n#1 CANCELED\n"),
            (vec![&*begun, &*two], "#1 [1/2] RUN x\n#1 0.500 o\n#1 0.000 last\n"),
            // What isn't begun, or of a vertex that isn't known, says nothing.
            (vec![r#"{"vertexes":[{"digest":"b","name":"later"}]}"#, &*one], ""),
            (
                vec!["f1:2", "{no event", "error: failed to solve: x"],
                "f1:2\n{no event\nerror: failed to solve: x",
            ),
        ] {
            assert_eq!(plain(&events.join("\n")).trim_end(), expected.trim_end(), "{events:?}");
        }
    }

    #[test]
    fn parts_of_the_work() {
        let status = |id: &str, rest: &str| {
            format!(
                r#"{{"statuses":[{{"id":"{id}","vertex":"a","current":1982653,"timestamp":"{T}2Z","started":"{T}1Z"{rest}}}]}}"#
            )
        };
        let events = [
            format!(
                r#"{{"vertexes":[{{"digest":"a","name":"[internal] load build context","started":"{T}1Z"}}]}}"#
            ),
            status("transferring context:", ""),
            status("transferring context:", &format!(r#","completed":"{T}2Z""#)),
            r#"{"warnings":[{"vertex":"a","level":1,"short":"b2RkIG5hbWU="}]}"#.to_owned(),
        ];
        assert_eq!(
            plain(&events.join("\n")),
            "#1 [internal] load build context\n#1 transferring context: 1.98MB 1.0s done\n#1 WARN: odd name\n"
        );
    }

    #[test]
    fn the_text_does_not_depend_on_how_the_events_are_cut() {
        let events = format!(
            "{{\"vertexes\":[{{\"digest\":\"a\",\"name\":\"n\",\"started\":\"{T}1Z\"}}]}}\nfailed: ü\nto the end"
        );
        let whole = plain(&events);
        for size in 1..events.len() {
            let mut plain = Plain::default();
            let mut text: Vec<u8> =
                events.as_bytes().chunks(size).flat_map(|piece| plain.push(piece)).collect();
            text.extend(plain.finish());
            assert_eq!(String::from_utf8_lossy(&text), whole, "in pieces of {size}");
            assert_eq!(plain.words(), "failed: ü\nto the end");
        }
    }
}
