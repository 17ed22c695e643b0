//! A fake supervisor after the protocol of Gitpod's, with its quirks: it is not there at first, its task's terminal has no name
//! at first, a new reader is given the last 256 KiB again, and errors come within the stream.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Result;
use axum::Router;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

/// What a new reader is given again.
pub const RING: usize = 256 * 1024;
const PIECE: usize = 4096;
/// The proxies in between say 404 so often.
const NOT_THERE: u32 = 2;
/// And the terminal has no name so often.
const NAMELESS: u32 = 1;

/// The supervisors of all workspaces, on one port.
#[derive(Clone)]
pub struct Supervisors {
    pub address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    /// `host:port` in URLs, if it isn't our own address.
    reached_at: Mutex<Option<String>>,
    terminals: Mutex<HashMap<String, Terminal>>,
    changed: watch::Sender<()>,
    cuts: watch::Sender<u32>,
}

struct Terminal {
    owner_token: String,
    output: Vec<u8>,
    exit_code: Option<i32>,
    asked: u32,
}

impl Supervisors {
    pub async fn start(tasks: &TaskTracker) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let shared = Arc::new(Shared::default());
        let app = Router::new()
            .route("/{id}/_supervisor/v1/status/tasks", get(status))
            .route("/{id}/_supervisor/v1/terminal/listen/{alias}", get(listen))
            .with_state(shared.clone());
        let address = listener.local_addr()?;
        tasks.spawn(async move { axum::serve(listener, app).await });
        Ok(Self { address, shared })
    }

    /// A workspace's supervisor; its URL.
    pub fn add(&self, id: &str, owner_token: &str) -> String {
        let terminal =
            Terminal { owner_token: owner_token.into(), output: Vec::new(), exit_code: None, asked: 0 };
        self.shared.terminals().insert(id.to_owned(), terminal);
        let reached_at = self.shared.reached_at.lock().unwrap_or_else(PoisonError::into_inner);
        match &*reached_at {
            Some(address) => format!("http://{address}/{id}"),
            None => format!("http://{}/{id}", self.address),
        }
    }

    /// URLs of supervisors that are yet to come name this `host:port`: a wire to here.
    pub fn reach_at(&self, address: &str) {
        let mut reached_at = self.shared.reached_at.lock().unwrap_or_else(PoisonError::into_inner);
        *reached_at = Some(address.to_owned());
    }

    pub fn write(&self, id: &str, bytes: &[u8]) {
        self.change(id, |terminal| terminal.output.extend_from_slice(bytes));
    }

    /// All that was written so far.
    pub fn output(&self, id: &str) -> Vec<u8> {
        self.shared.terminals().get(id).map(|terminal| terminal.output.clone()).unwrap_or_default()
    }

    /// The task ends.
    pub fn exit(&self, id: &str, code: i32) {
        self.change(id, |terminal| terminal.exit_code = Some(code));
    }

    /// The workspace is gone, and its supervisor with it.
    pub fn remove(&self, id: &str) {
        self.shared.terminals().remove(id);
        self.shared.changed.send_replace(());
    }

    /// Cuts every reader off, with an error within its stream.
    pub fn cut(&self) {
        self.shared.cuts.send_modify(|cuts| *cuts += 1);
        self.shared.changed.send_replace(());
    }

    fn change(&self, id: &str, change: impl FnOnce(&mut Terminal)) {
        if let Some(terminal) = self.shared.terminals().get_mut(id) {
            change(terminal);
        }
        self.shared.changed.send_replace(());
    }
}

impl Shared {
    fn terminals(&self) -> MutexGuard<'_, HashMap<String, Terminal>> {
        self.terminals.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn refused(terminal: &Terminal, headers: &HeaderMap) -> bool {
    let token = headers.get("x-gitpod-owner-token").and_then(|value| value.to_str().ok());
    token != Some(terminal.owner_token.as_str())
}

async fn status(State(shared): State<Arc<Shared>>, Path(id): Path<String>, headers: HeaderMap) -> Response {
    let mut terminals = shared.terminals();
    let Some(terminal) = terminals.get_mut(&id) else { return StatusCode::NOT_FOUND.into_response() };
    if refused(terminal, &headers) {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    terminal.asked += 1;
    match terminal.asked {
        asked if asked <= NOT_THERE => StatusCode::NOT_FOUND.into_response(),
        asked if asked <= NOT_THERE + NAMELESS => {
            r#"{"result":{"tasks":[{"id":"0","state":"opening"}]}}"#.into_response()
        }
        _ => format!(r#"{{"result":{{"tasks":[{{"id":"0","state":"running","terminal":"t {id}"}}]}}}}"#)
            .into_response(),
    }
}

async fn listen(
    State(shared): State<Arc<Shared>>,
    Path((id, alias)): Path<(String, String)>,
    headers: HeaderMap,
) -> Response {
    let begin = {
        let terminals = shared.terminals();
        let Some(terminal) = terminals.get(&id).filter(|_| alias == format!("t {id}")) else {
            return StatusCode::NOT_FOUND.into_response();
        };
        if refused(terminal, &headers) {
            return StatusCode::UNAUTHORIZED.into_response();
        }
        terminal.output.len().saturating_sub(RING)
    };
    let cuts = *shared.cuts.borrow();
    let reader = Reader { changed: shared.changed.subscribe(), shared, id, at: begin, cuts, over: false };
    let messages = futures::stream::unfold(reader, async |mut reader| {
        let message = reader.next().await?;
        Some((Ok::<_, std::io::Error>(Bytes::from(message)), reader))
    });
    Body::from_stream(messages).into_response()
}

struct Reader {
    shared: Arc<Shared>,
    changed: watch::Receiver<()>,
    id: String,
    at: usize,
    cuts: u32,
    over: bool,
}

impl Reader {
    async fn next(&mut self) -> Option<String> {
        while !self.over {
            if *self.shared.cuts.borrow() != self.cuts {
                self.over = true;
                return Some(r#"{"error":{"code":14,"message":"transport is closing"}}"#.into());
            }
            {
                let terminals = self.shared.terminals();
                let terminal = terminals.get(&self.id)?;
                let rest = terminal.output.get(self.at..).unwrap_or_default();
                let piece = rest.get(..rest.len().min(PIECE)).unwrap_or_default();
                if !piece.is_empty() {
                    self.at += piece.len();
                    return Some(format!(r#"{{"result":{{"data":"{}"}}}}"#, STANDARD.encode(piece)));
                }
                if let Some(code) = terminal.exit_code {
                    self.over = true;
                    return Some(format!(r#"{{"result":{{"exitCode":{code}}}}}"#));
                }
            }
            self.changed.changed().await.ok()?;
        }
        None
    }
}
