//! The supervisor in a workspace: its HTTP API, as far as an output is read from it.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::{Buf as _, Bytes, BytesMut};
use serde::Deserialize;
use serde_json::error::Category;

/// For the head of an answer.
const ANSWER: Duration = Duration::from_secs(10);
/// The largest JSON value that is taken: a supervisor's are some 6 KiB.
const LARGEST: usize = 1 << 20;

/// The header that says that a reader may read.
pub(crate) const OWNER_TOKEN: &str = "x-gitpod-owner-token";

/// Who asks which supervisor.
#[derive(Clone)]
pub(crate) struct Supervisor {
    pub(crate) http: reqwest::Client,
    pub(crate) url: String,
    pub(crate) owner_token: String,
}

/// Why there is no output, now.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Trouble {
    #[error("there is no terminal yet")]
    NotYet,
    #[error("the supervisor can't be asked: {0}")]
    Unreachable(#[from] reqwest::Error),
    #[error("the supervisor says: {0}")]
    Refused(String),
    #[error("the supervisor's answer can't be read: {0}")]
    Unreadable(String),
}

/// One message about a terminal.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    Data(Bytes),
    /// The task ended: nothing follows.
    Exit,
}

/// The gateway in front of its gRPC API frames every message so, errors included.
#[derive(Deserialize)]
struct Frame<T> {
    result: Option<T>,
    error: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct Tasks {
    #[serde(default)]
    tasks: Vec<Task>,
}

#[derive(Deserialize)]
struct Task {
    #[serde(default)]
    terminal: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Listen {
    #[serde(default)]
    data: Option<String>,
    #[serde(default)]
    exit_code: Option<i64>,
}

impl Supervisor {
    /// Listens to the first task's terminal: from the beginning of its ring, and then on.
    pub(crate) async fn listen(&self) -> Result<Messages, Trouble> {
        let tasks = self.get("status/tasks").await?;
        let mut tasks = Messages::new(tasks);
        let first: Option<Tasks> = tasks.next_frame().await?;
        let alias = first.and_then(|tasks| tasks.tasks.into_iter().next()).map(|task| task.terminal);
        let alias = alias.filter(|alias| !alias.is_empty()).ok_or(Trouble::NotYet)?;
        let path = format!("terminal/listen/{}", urlencode(&alias));
        Ok(Messages::new(self.get(&path).await?))
    }

    async fn get(&self, path: &str) -> Result<reqwest::Response, Trouble> {
        let url = format!("{}/_supervisor/v1/{path}", self.url.trim_end_matches('/'));
        let request = self.http.get(url).header(OWNER_TOKEN, &self.owner_token).send();
        let response = tokio::time::timeout(ANSWER, request).await.map_err(|_| Trouble::NotYet)??;
        match response.status() {
            status if status.is_success() => Ok(response),
            // The proxies in between learn of a new workspace a moment later.
            reqwest::StatusCode::NOT_FOUND => Err(Trouble::NotYet),
            status => Err(Trouble::Refused(status.to_string())),
        }
    }
}

fn urlencode(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => char::from(byte).to_string(),
            other => format!("%{other:02X}"),
        })
        .collect()
}

/// JSON values, one after another, cut anywhere.
pub(crate) struct Messages {
    response: reqwest::Response,
    buffer: BytesMut,
}

impl Messages {
    fn new(response: reqwest::Response) -> Self {
        Self { response, buffer: BytesMut::new() }
    }

    /// The next message; `None` where the stream ends.
    pub(crate) async fn next(&mut self) -> Result<Option<Heard>, Trouble> {
        loop {
            let Some(listen) = self.next_frame::<Listen>().await? else { return Ok(None) };
            if let Some(data) = listen.data {
                let data = STANDARD.decode(data).map_err(|error| Trouble::Unreadable(error.to_string()))?;
                return Ok(Some(Heard::Data(data.into())));
            }
            if listen.exit_code.is_some() {
                return Ok(Some(Heard::Exit));
            }
            // A title.
        }
    }

    async fn next_frame<T: serde::de::DeserializeOwned>(&mut self) -> Result<Option<T>, Trouble> {
        loop {
            if let Some(frame) = take::<Frame<T>>(&mut self.buffer)? {
                return match frame {
                    Frame { error: Some(error), .. } => Err(Trouble::Refused(error.to_string())),
                    Frame { result, .. } => Ok(result),
                };
            }
            match self.response.chunk().await? {
                Some(chunk) => self.buffer.extend_from_slice(&chunk),
                None => return Ok(None),
            }
        }
    }
}

/// The first whole value of a buffer, taken out.
fn take<T: serde::de::DeserializeOwned>(buffer: &mut BytesMut) -> Result<Option<T>, Trouble> {
    let mut values = serde_json::Deserializer::from_slice(buffer).into_iter::<T>();
    let value = match values.next() {
        None => return Ok(None),
        Some(Err(error)) if error.classify() == Category::Eof && buffer.len() < LARGEST => return Ok(None),
        Some(Err(error)) => return Err(Trouble::Unreadable(error.to_string())),
        Some(Ok(value)) => value,
    };
    let read = values.byte_offset();
    buffer.advance(read);
    Ok(Some(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_read_however_they_are_cut() {
        let text = r#"{"result":{"data":"aGVsbG8="}} {"result":{"title":"x"}}{"error":{"code":14}}"#;
        for cut in 1..text.len() {
            let mut buffer = BytesMut::new();
            let mut seen = Vec::new();
            for piece in text.as_bytes().chunks(cut) {
                buffer.extend_from_slice(piece);
                while let Some(frame) = take::<Frame<Listen>>(&mut buffer).unwrap() {
                    seen.push((frame.result.and_then(|listen| listen.data), frame.error.is_some()));
                }
            }
            assert_eq!(seen, [(Some("aGVsbG8=".into()), false), (None, false), (None, true)], "{cut}");
        }
        assert!(take::<Frame<Listen>>(&mut BytesMut::from("<html>")).is_err());
    }
}
