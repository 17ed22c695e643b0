//! A TCP proxy that can be cut, frozen, or made deaf in one direction: what a network does to a connection.

use std::sync::Arc;

use anyhow::Result;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

/// What happens to what passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Whole,
    /// Every connection is closed, and new ones at once.
    Cut,
    /// What the client sends arrives; no answer does.
    AnswersLost,
    /// Nothing arrives on either side, nothing is lost and no connection is closed.
    Frozen,
}

/// A proxy to one address, on a free port of 127.0.0.1. It ends on drop.
#[derive(Debug)]
pub struct Wire {
    address: String,
    state: Arc<watch::Sender<State>>,
    _stop: DropGuard,
}

impl Wire {
    /// A whole wire to `target` (`host:port`).
    pub async fn to(target: &str) -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let address = listener.local_addr()?.to_string();
        let (state, stop, tasks) =
            (Arc::new(watch::Sender::new(State::Whole)), CancellationToken::new(), TaskTracker::new());
        let (target, kept) = (target.to_owned(), state.clone());
        let (stopped, connections) = (stop.clone(), tasks.clone());
        tasks.spawn(stopped.clone().run_until_cancelled_owned(async move {
            while let Ok((near, _)) = listener.accept().await {
                if *kept.borrow() == State::Cut {
                    continue;
                }
                let (target, state) = (target.clone(), kept.subscribe());
                connections.spawn(stopped.clone().run_until_cancelled_owned(async move {
                    if let Ok(far) = TcpStream::connect(&target).await {
                        carry(near, far, state).await;
                    }
                }));
            }
        }));
        Ok(Self { address, state, _stop: stop.drop_guard() })
    }

    /// `127.0.0.1:port`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Closes every connection; new ones are closed at once.
    pub fn cut(&self) {
        self.state.send_replace(State::Cut);
    }

    /// From now on what the client sends arrives, and no answer does.
    pub fn lose_answers(&self) {
        self.state.send_replace(State::AnswersLost);
    }

    /// From now on nothing arrives on either side, until the wire is whole again: then all of it does.
    pub fn freeze(&self) {
        self.state.send_replace(State::Frozen);
    }

    /// Whole again. A connection whose answers were lost is closed: it would go on in the middle of one.
    pub fn restore(&self) {
        self.state.send_replace(State::Whole);
    }
}

async fn carry(near: TcpStream, far: TcpStream, mut state: watch::Receiver<State>) {
    let ((near_read, near_write), (far_read, far_write)) = (near.into_split(), far.into_split());
    let (questions, answers) = (state.clone(), state.clone());
    tokio::select! {
        () = pass(near_read, far_write, questions, false) => {}
        () = pass(far_read, near_write, answers, true) => {}
        () = broken(&mut state) => {}
    }
}

/// Returns once this connection can't be used any more.
async fn broken(state: &mut watch::Receiver<State>) {
    let mut before = *state.borrow_and_update();
    while state.changed().await.is_ok() {
        let now = *state.borrow_and_update();
        if now == State::Cut || (before == State::AnswersLost && now == State::Whole) {
            return;
        }
        before = now;
    }
}

async fn pass(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut state: watch::Receiver<State>,
    answers: bool,
) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        let Ok(now) = state.wait_for(|state| *state != State::Frozen).await.map(|state| *state) else {
            return;
        };
        if answers && now == State::AnswersLost {
            continue;
        }
        let piece = buffer.get(..read).unwrap_or_default();
        if to.write_all(piece).await.is_err() {
            return;
        }
    }
}
