//! A front before a registry (or a token service, or what else speaks HTTP): it answers as a test says, or hands a request
//! on to a real one, and remembers what it was asked and what it was shown.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Asked {
    pub method: String,
    pub target: String,
    pub headers: HashMap<String, String>,
    pub body: Vec<u8>,
}

impl Asked {
    /// Whether it is of that method, and its target contains `part`.
    pub fn is(&self, method: &str, part: &str) -> bool {
        self.method == method && self.target.contains(part)
    }

    /// What it bore to say who asks.
    pub fn authorization(&self) -> Option<&str> {
        self.headers.get("authorization").map(String::as_str)
    }
}

/// What to do with a request.
pub enum Reply {
    Answer {
        status: u16,
        headers: Vec<(&'static str, String)>,
        body: Vec<u8>,
    },
    /// 200, and bytes without end.
    Endless,
    /// No answer at all: the connection is closed.
    Hangup,
    /// No answer at all: the connection stays open.
    Silence,
    /// What a real registry says to it.
    Forward(String),
    /// The same, but not before this is true; also where the client does not wait for it.
    ForwardOnce(watch::Receiver<bool>, String),
    /// No answer at all, and the connection is closed once this is true.
    HangupOnce(watch::Receiver<bool>),
    /// The same as `Forward`, but only so many bytes of it.
    ForwardCut(String, usize),
}

impl Reply {
    pub fn status(status: u16) -> Self {
        Self::Answer { status, headers: Vec::new(), body: Vec::new() }
    }

    pub fn json(body: impl Into<Vec<u8>>) -> Self {
        Self::status(200).header("content-type", "application/json").body(body)
    }

    pub fn header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        if let Self::Answer { headers, .. } = &mut self {
            headers.push((name, value.into()));
        }
        self
    }

    pub fn body(mut self, content: impl Into<Vec<u8>>) -> Self {
        if let Self::Answer { body, .. } = &mut self {
            *body = content.into();
        }
        self
    }
}

pub struct Front {
    /// `127.0.0.1:port`.
    pub address: String,
    asked: Arc<Mutex<Vec<Asked>>>,
    _accepting: JoinSet<()>,
}

impl Front {
    /// On a free port of 127.0.0.1; gone on drop.
    pub async fn start(reply: impl Fn(&Asked) -> Reply + Send + Sync + 'static) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?.to_string();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (reply, log) = (Arc::new(reply), asked.clone());
        let mut accepting = JoinSet::new();
        accepting.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (reply, log) = (reply.clone(), log.clone());
                connections.spawn(async move {
                    // A client that goes away is no failure of the front.
                    let _ = serve(stream, &*reply, &log).await;
                });
            }
        });
        Ok(Self { address, asked, _accepting: accepting })
    }

    /// All requests so far.
    pub fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How many requests [are](Asked::is) so.
    pub fn count(&self, method: &str, part: &str) -> usize {
        self.asked().iter().filter(|asked| asked.is(method, part)).count()
    }
}

/// One request a connection.
async fn serve(
    mut stream: TcpStream,
    reply: &(impl Fn(&Asked) -> Reply + Send + Sync),
    log: &Mutex<Vec<Asked>>,
) -> io::Result<()> {
    let mut bytes = Vec::new();
    let head = loop {
        if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            break end;
        }
        if stream.read_buf(&mut bytes).await? == 0 {
            return Ok(());
        }
    };
    let mut body = bytes.split_off(head + 4);
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let mut lines = text.split("\r\n");
    let mut words = lines.next().unwrap_or_default().split(' ').map(str::to_owned);
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let mut headers: HashMap<String, String> = HashMap::new();
    for (name, value) in lines.filter_map(|line| line.split_once(':')) {
        // A header that comes several times is a list (RFC 9110, section 5.3).
        let known = headers.entry(name.to_ascii_lowercase()).or_default();
        if !known.is_empty() {
            known.push_str(", ");
        }
        known.push_str(value.trim());
    }
    let length: usize = headers.get("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    while body.len() < length {
        if stream.read_buf(&mut body).await? == 0 {
            return Ok(());
        }
    }
    let asked = Asked { method, target, headers, body };
    let reply = reply(&asked);
    log.lock().unwrap_or_else(PoisonError::into_inner).push(asked.clone());
    match reply {
        Reply::Answer { status, headers, body } => {
            let mut head =
                format!("HTTP/1.1 {status} Said\r\nconnection: close\r\ncontent-length: {}\r\n", body.len());
            for (name, value) in headers {
                head.push_str(&format!("{name}: {value}\r\n"));
            }
            stream.write_all(format!("{head}\r\n").as_bytes()).await?;
            if asked.method != "HEAD" {
                stream.write_all(&body).await?;
            }
            stream.shutdown().await
        }
        Reply::Endless => {
            stream.write_all(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n").await?;
            loop {
                stream.write_all(&[b' '; 65536]).await?;
            }
        }
        Reply::Hangup => Ok(()),
        Reply::HangupOnce(mut allowed) => {
            let _ = allowed.wait_for(|allowed| *allowed).await;
            Ok(())
        }
        Reply::Silence => std::future::pending().await,
        Reply::Forward(upstream) => forward(stream, &asked, &upstream, u64::MAX).await,
        Reply::ForwardOnce(mut allowed, upstream) => {
            let _ = allowed.wait_for(|allowed| *allowed).await;
            forward(stream, &asked, &upstream, u64::MAX).await
        }
        Reply::ForwardCut(upstream, bytes) => forward(stream, &asked, &upstream, bytes as u64).await,
    }
}

async fn forward(mut stream: TcpStream, asked: &Asked, upstream: &str, most: u64) -> io::Result<()> {
    let mut to = TcpStream::connect(upstream).await?;
    let mut head = format!("{} {} HTTP/1.1\r\nconnection: close\r\n", asked.method, asked.target);
    for (name, value) in asked.headers.iter().filter(|(name, _)| *name != "connection") {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    to.write_all(format!("{head}\r\n").as_bytes()).await?;
    to.write_all(&asked.body).await?;
    tokio::io::copy(&mut to.take(most), &mut stream).await?;
    stream.shutdown().await
}
