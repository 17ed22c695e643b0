//! A front before a registry: it counts what it is asked, and answers as a test says, or as the registry does.

use std::sync::{Arc, Mutex};

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::Response;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;

pub(crate) struct Front {
    pub(crate) address: String,
    shared: Arc<Shared>,
    _serving: JoinSet<()>,
}

struct Shared {
    registry: String,
    client: reqwest::Client,
    asked: Mutex<Vec<String>>,
    says: Mutex<Option<(u16, Option<u64>)>>,
    held: watch::Sender<Held>,
}

/// An answer that is held back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Held {
    None,
    Next,
    /// The registry has given it.
    Waits,
}

impl Front {
    pub(crate) async fn before(registry: &str) -> Self {
        let client = reqwest::Client::builder().no_proxy().tls_certs_only([]).build().unwrap();
        let shared = Arc::new(Shared {
            registry: registry.into(),
            client,
            asked: Mutex::default(),
            says: Mutex::default(),
            held: watch::Sender::new(Held::None),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let router = axum::Router::new().fallback(answer).with_state(shared.clone());
        let mut serving = JoinSet::new();
        serving.spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { address, shared, _serving: serving }
    }

    /// From now on it answers with this status, and `Retry-After`; `None`: as the registry does.
    pub(crate) fn say(&self, says: Option<(u16, Option<u64>)>) {
        *self.shared.says.lock().unwrap() = says;
    }

    /// The registry's next answer is held back, until [`Front::release`].
    pub(crate) fn hold_next(&self) {
        self.shared.held.send_replace(Held::Next);
    }

    /// Returns once the registry has given the answer that is held back.
    pub(crate) async fn holds(&self) {
        self.shared.held.subscribe().wait_for(|held| *held == Held::Waits).await.unwrap();
    }

    pub(crate) fn release(&self) {
        self.shared.held.send_replace(Held::None);
    }

    /// `METHOD path` of every request so far, but for the question whether it is a registry at all.
    pub(crate) fn asked(&self) -> Vec<String> {
        self.shared.asked.lock().unwrap().iter().filter(|asked| *asked != "GET /v2/").cloned().collect()
    }
}

async fn answer(State(shared): State<Arc<Shared>>, request: Request) -> Response<Body> {
    let path = request.uri().path().to_owned();
    shared.asked.lock().unwrap().push(format!("{} {path}", request.method()));
    if let Some((status, retry_after)) = *shared.says.lock().unwrap() {
        let mut answer = Response::builder().status(status);
        if let Some(seconds) = retry_after {
            answer = answer.header("retry-after", seconds.to_string());
        }
        return answer.body(Body::empty()).unwrap();
    }
    let mut headers = request.headers().clone();
    headers.remove("host");
    let url = format!("http://{}{path}", shared.registry);
    let said = shared.client.request(request.method().clone(), url).headers(headers).send().await.unwrap();
    let holds = |held: &mut Held| {
        let holds = *held == Held::Next;
        if holds {
            *held = Held::Waits;
        }
        holds
    };
    if shared.held.send_if_modified(holds) {
        released(&shared).await;
    }
    let mut answer = Response::builder().status(said.status());
    for name in ["content-type", "content-length", "docker-content-digest"] {
        if let Some(value) = said.headers().get(name) {
            answer = answer.header(name, value);
        }
    }
    answer.body(Body::from(said.bytes().await.unwrap())).unwrap()
}

async fn released(shared: &Shared) {
    shared.held.subscribe().wait_for(|held| *held == Held::None).await.unwrap();
}
