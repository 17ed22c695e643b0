//! A log as Server-Sent Events, as a browser's EventSource takes them.
//!
//! An event's `data` is one JSON object: `{"offset":0,"length":6,"text":"hello\n"}`. `text` is for reading; where the
//! bytes aren't UTF-8 it has U+FFFD in their place, and `base64` has the exact ones. Its `id` is the offset of the byte after
//! it, from which a client that was cut off goes on by `Last-Event-ID`. The last event is called `end`, and so is its id: a
//! client that comes back with that one is told that there is nothing more.

use std::convert::Infallible;
use std::time::Duration;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::{Bytes, BytesMut};
use futures::{FutureExt as _, Stream, StreamExt as _, stream};
use http::{HeaderName, HeaderValue, header};
use kiln_bus::logs::Chunk;
use kiln_domain::id::BuildId;
use kiln_domain::record::State;
use serde::Serialize;
use serde_json::{Value, json};

use crate::log::{BuildLogs, ReadError};

/// The name of the last event, and its id.
pub(super) const END: &str = "end";
/// A comment after so long a silence: a connection that is dead shows by it, and proxies don't close one that lives.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// A client that was cut off waits for this long.
const RETRY: Duration = Duration::from_secs(1);
/// Asks nginx not to hold events back.
const UNBUFFERED: HeaderName = HeaderName::from_static("x-accel-buffering");

/// A log's chunks as an answer.
pub(super) fn answer(
    logs: BuildLogs,
    id: BuildId,
    chunks: impl Stream<Item = Result<Chunk, ReadError>> + Send + 'static,
) -> Response {
    let state = async move { logs.final_state(&id).await.map(State::as_str) };
    let events = events(chunks, state);
    let mut answer = Sse::new(events).keep_alive(KeepAlive::new().interval(HEARTBEAT)).into_response();
    let headers = answer.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::VARY, HeaderValue::from_static("Accept"));
    headers.insert(UNBUFFERED, HeaderValue::from_static("no"));
    answer
}

/// An error ends them without the last event: the client comes back with where it was, and is told then what is wrong.
fn events(
    chunks: impl Stream<Item = Result<Chunk, ReadError>> + Send + 'static,
    state: impl Future<Output = Option<&'static str>> + Send + 'static,
) -> impl Stream<Item = Result<Event, Infallible>> + Send {
    let retry = stream::once(async { Event::default().retry(RETRY) });
    let begun = (chunks.boxed(), Text::default(), state.boxed());
    let told = stream::unfold(begun, async |(mut chunks, mut text, mut state)| {
        let Chunk { offset, bytes, complete } = chunks.next().await?.ok()?;
        let mut events = Vec::new();
        let ready = text.push(offset, bytes, complete);
        if !ready.is_empty() {
            events.push(text.event(&ready));
        }
        if complete {
            let end = json!({ "complete": true, "length": text.next, "state": (&mut state).await });
            events.push(event(END, END, &end));
        }
        Some((stream::iter(events), (chunks, text, state)))
    });
    retry.chain(told.flatten()).map(Ok)
}

fn event(name: &str, id: &str, data: &Value) -> Event {
    // JSON has no line ends of its own.
    Event::default().event(name).id(id).data(data.to_string())
}

/// A part of the log.
#[derive(Serialize)]
struct Part {
    offset: u64,
    length: usize,
    text: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    base64: Option<String>,
}

/// The log's bytes as text: a character that two chunks share comes whole, with the second.
#[derive(Default)]
struct Text {
    held: Bytes,
    /// The offset of the byte after the last one that was given.
    next: u64,
}

impl Text {
    /// What can be given now; with `all` nothing is held back.
    fn push(&mut self, offset: u64, bytes: Bytes, all: bool) -> Bytes {
        let mut ready = if self.held.is_empty() {
            self.next = offset;
            bytes
        } else {
            let mut joined = BytesMut::from(self.held.as_ref());
            joined.extend_from_slice(&bytes);
            joined.freeze()
        };
        let held = if all { 0 } else { begun_character(&ready) };
        self.held = ready.split_off(ready.len() - held);
        ready
    }

    fn event(&mut self, bytes: &Bytes) -> Event {
        let exact = str::from_utf8(bytes).is_ok();
        let part = Part {
            offset: self.next,
            length: bytes.len(),
            text: String::from_utf8_lossy(bytes).into_owned(),
            base64: (!exact).then(|| STANDARD.encode(bytes)),
        };
        self.next += bytes.len() as u64;
        event("log", &self.next.to_string(), &json!(part))
    }
}

/// How many bytes at the end are the begin of a character that may yet become whole.
fn begun_character(bytes: &[u8]) -> usize {
    let from = bytes.len().saturating_sub(3);
    let last = bytes.get(from..).unwrap_or_default();
    (0..last.len())
        .filter_map(|at| last.get(at..))
        .find(|tail| {
            // An error without a length is an end that came too soon.
            str::from_utf8(tail).is_err_and(|error| error.error_len().is_none() && error.valid_up_to() == 0)
        })
        .map_or(0, <[u8]>::len)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn told(chunks: Vec<Result<Chunk, ReadError>>) -> String {
        let events = events(stream::iter(chunks), async { Some("FAILED") });
        let answer = Sse::new(events).into_response();
        let body = axum::body::to_bytes(answer.into_body(), usize::MAX).await.unwrap();
        String::from_utf8(body.to_vec()).unwrap()
    }

    fn chunks(pieces: &[&'static [u8]]) -> Vec<Result<Chunk, ReadError>> {
        let mut offset = 10;
        let mut chunks = Vec::new();
        for (at, piece) in pieces.iter().enumerate() {
            let complete = at + 1 == pieces.len();
            chunks.push(Ok(Chunk { offset, bytes: Bytes::from_static(piece), complete }));
            offset += piece.len() as u64;
        }
        chunks
    }

    #[tokio::test]
    async fn each_event_says_where_to_go_on_and_the_last_that_nothing_follows() {
        assert_eq!(
            told(chunks(&[b"a\r\n\nb", b""])).await,
            "retry: 1000\n\n\
             event: log\nid: 15\ndata: {\"length\":5,\"offset\":10,\"text\":\"a\\r\\n\\nb\"}\n\n\
             event: end\nid: end\ndata: {\"complete\":true,\"length\":15,\"state\":\"FAILED\"}\n\n"
        );
    }

    #[tokio::test]
    async fn an_error_ends_the_events_without_an_end() {
        let mut some = chunks(&[b"a", b"b"]);
        some.truncate(1);
        some.push(Err(crate::cut::Cut::Stopping.into()));
        assert!(told(some).await.ends_with("\"text\":\"a\"}\n\n"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_silence_is_filled() {
        let answer = Sse::new(events(stream::pending(), async { None }))
            .keep_alive(KeepAlive::new().interval(HEARTBEAT))
            .into_response();
        let mut body = answer.into_body().into_data_stream();
        assert_eq!(body.next().await.unwrap().unwrap(), "retry: 1000\n\n");
        for _ in 0..3 {
            let before = tokio::time::Instant::now();
            assert_eq!(body.next().await.unwrap().unwrap(), ":\n\n");
            assert_eq!(before.elapsed().as_secs(), HEARTBEAT.as_secs());
        }
    }

    /// Joins what the events carry, and counts those that needed `base64`.
    fn carried(told: &str) -> (Vec<u8>, usize) {
        let (mut bytes, mut inexact) = (Vec::new(), 0);
        for line in told.lines().filter_map(|line| line.strip_prefix("data: ")) {
            let data: Value = serde_json::from_str(line).unwrap();
            let Some(text) = data["text"].as_str() else { continue };
            assert_eq!(data["offset"], 10 + bytes.len());
            match data["base64"].as_str() {
                Some(base64) => {
                    inexact += 1;
                    bytes.extend(STANDARD.decode(base64).unwrap());
                }
                None => bytes.extend(text.as_bytes()),
            }
        }
        (bytes, inexact)
    }

    #[tokio::test]
    async fn every_byte_is_carried_however_the_log_is_cut() {
        for (pieces, inexact) in [
            // A character of two, three and four bytes, cut at each byte.
            (&[b"\xc3".as_slice(), b"\xa9", b""][..], 0),
            (&[b"x\xe2", b"\x82", b"\xac!", b""], 0),
            (&[b"\xf0\x9f", b"\x94\xa5", b""], 0),
            // The begin of one that never ends, and bytes that begin none.
            (&[b"a\xe2\x82", b"b", b""], 1),
            (&[b"a\xe2\x82", b""], 1),
            (&[b"\xff\xfe", b"\0\x1b[2J", b"\x80"], 2),
            (&[b"\xe2\x82\xac\xe2"], 1),
        ] {
            assert_eq!(carried(&told(chunks(pieces)).await), (pieces.concat(), inexact), "{pieces:?}");
        }
    }
}
