//! An HTTP proxy: it makes tunnels (CONNECT), to wherever a test says that a host is, and remembers for which.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// Gone on drop, its tunnels with it.
pub struct Proxy {
    /// `http://127.0.0.1:port`.
    pub url: String,
    asked: Arc<Mutex<Vec<String>>>,
    _accepting: JoinSet<()>,
}

impl Proxy {
    /// Every tunnel leads to `upstream`, whatever its host.
    pub async fn start(upstream: String) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let url = format!("http://{}", listener.local_addr()?);
        let asked = Arc::new(Mutex::new(Vec::new()));
        let log = asked.clone();
        let mut accepting = JoinSet::new();
        accepting.spawn(async move {
            let mut tunnels = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (upstream, log) = (upstream.clone(), log.clone());
                tunnels.spawn(async move {
                    // Who goes away is no failure of the proxy.
                    let _ = tunnel(stream, &upstream, &log).await;
                });
            }
        });
        Ok(Self { url, asked, _accepting: accepting })
    }

    /// `host:port` of every tunnel so far.
    pub fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

async fn tunnel(stream: TcpStream, upstream: &str, log: &Mutex<Vec<String>>) -> io::Result<()> {
    let mut stream = BufReader::new(stream);
    let mut first = String::new();
    stream.read_line(&mut first).await?;
    let mut line = first.clone();
    while !line.trim().is_empty() {
        line.clear();
        if stream.read_line(&mut line).await? == 0 {
            return Ok(());
        }
    }
    let mut words = first.split(' ');
    let (Some("CONNECT"), Some(host)) = (words.next(), words.next()) else {
        return stream.write_all(b"HTTP/1.1 405 Method Not Allowed\r\ncontent-length: 0\r\n\r\n").await;
    };
    log.lock().unwrap_or_else(PoisonError::into_inner).push(host.to_owned());
    let mut to = TcpStream::connect(upstream).await?;
    stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await?;
    copy_bidirectional(&mut stream, &mut to).await.map(|_| ())
}
