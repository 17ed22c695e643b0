//! A git remote over HTTP: the real `git http-backend` behind a small server.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex};

use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::Response;
use base64::Engine as _;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;

/// What the server does before it answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Manner {
    Open,
    /// Only to `username:password`.
    Password(String),
    /// Sends everybody to another server.
    Redirect(String),
}

pub(crate) struct HttpGit {
    /// `http://127.0.0.1:port`
    pub(crate) url: String,
    shared: Arc<Shared>,
    _serving: JoinSet<()>,
}

struct Shared {
    root: PathBuf,
    manner: Manner,
    /// Whether answers are held back.
    held: watch::Sender<bool>,
    asked: watch::Sender<usize>,
    shown: Mutex<Vec<String>>,
}

impl HttpGit {
    /// Serves the repositories under `root`.
    pub(crate) async fn start(root: &Path, manner: Manner) -> Self {
        let shared = Arc::new(Shared {
            root: root.to_owned(),
            manner,
            held: watch::Sender::new(false),
            asked: watch::Sender::new(0),
            shown: Mutex::default(),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let router = axum::Router::new().fallback(answer).with_state(shared.clone());
        let mut serving = JoinSet::new();
        serving.spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { url, shared, _serving: serving }
    }

    /// Holds back every answer from now on, or no longer.
    pub(crate) fn hold(&self, held: bool) {
        self.shared.held.send_replace(held);
    }

    /// Returns once it was asked so often.
    pub(crate) async fn asked(&self, times: usize) {
        self.shared.asked.subscribe().wait_for(|asked| *asked >= times).await.unwrap();
    }

    pub(crate) fn count(&self) -> usize {
        *self.shared.asked.borrow()
    }

    /// Every credential that was shown to it.
    pub(crate) fn shown(&self) -> Vec<String> {
        self.shared.shown.lock().unwrap().clone()
    }
}

async fn answer(State(shared): State<Arc<Shared>>, request: Request) -> Response<Body> {
    shared.asked.send_modify(|asked| *asked += 1);
    let shown = request.headers().get("authorization").map(|value| value.to_str().unwrap().to_owned());
    shared.shown.lock().unwrap().extend(shown.clone());
    released(&shared).await;
    let said = |status: u16, name: &str, value: &str| {
        Response::builder().status(status).header(name, value).body(Body::empty()).unwrap()
    };
    match &shared.manner {
        Manner::Open => {}
        Manner::Password(login) => {
            let expected = format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(login));
            if shown.as_ref() != Some(&expected) {
                return said(401, "www-authenticate", "Basic realm=\"test\"");
            }
        }
        Manner::Redirect(to) => return said(302, "location", &format!("{to}{}", request.uri())),
    }
    backend(&shared.root, request).await
}

async fn released(shared: &Shared) {
    shared.held.subscribe().wait_for(|held| !held).await.unwrap();
}

/// As a web server runs a CGI program.
async fn backend(root: &Path, request: Request) -> Response<Body> {
    let (parts, body) = request.into_parts();
    let header = |name| parts.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let mut child = tokio::process::Command::new("git")
        .arg("http-backend")
        .env("GIT_PROJECT_ROOT", root)
        .env("GIT_HTTP_EXPORT_ALL", "1")
        .env("GIT_PROTOCOL", header("git-protocol"))
        .env("CONTENT_TYPE", header("content-type"))
        .env("REQUEST_METHOD", parts.method.as_str())
        .env("PATH_INFO", parts.uri.path())
        .env("QUERY_STRING", parts.uri.query().unwrap_or_default())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let body = to_bytes(body, 1 << 20).await.unwrap();
    let mut input = child.stdin.take().unwrap();
    // It needn't read what it was sent.
    let _ = input.write_all(&body).await;
    drop(input);
    let output = child.wait_with_output().await.unwrap().stdout;
    let end = output.windows(4).position(|window| window == b"\r\n\r\n").unwrap();
    let mut answer = Response::builder();
    for line in std::str::from_utf8(&output[..end]).unwrap().lines() {
        let (name, value) = line.split_once(": ").unwrap();
        answer = match name {
            "Status" => answer.status(value[..3].parse::<u16>().unwrap()),
            _ => answer.header(name, value),
        };
    }
    answer.body(Body::from(output[end + 4..].to_vec())).unwrap()
}
