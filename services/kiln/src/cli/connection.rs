//! The way to a gateway: its address, the channel, and a deadline on every question.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use kiln_proto::kiln_v1::builds_client::BuildsClient;
use tonic::transport::{Channel, ClientTlsConfig, Endpoint, Uri};
use tonic::{Response, Status};

use super::failure::Failure;

/// How long a question may go unanswered; also for a stream's first answer.
const DEADLINE: Duration = Duration::from_secs(30);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A peer that is gone without a word is noticed within these two together.
const KEEP_ALIVE: Duration = Duration::from_secs(20);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// The gateway's own limit is 16 MiB; a later one may send more.
const MESSAGE_BYTES: usize = 64 * 1024 * 1024;

/// `--addr`, which every command takes that asks a gateway.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Connection {
    /// The gateway: HOST:PORT, or a URL with http or https
    #[arg(long, value_name = "ADDRESS", env = "KILN_ADDR", default_value = "127.0.0.1:8080")]
    addr: Address,
}

/// A gateway's address.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Address(Uri);

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let url = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
        let uri: Uri = url.parse().map_err(|_| "expected HOST:PORT or a URL".to_owned())?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) {
            return Err("the scheme must be http or https".into());
        }
        if uri.host().is_none_or(str::is_empty) {
            return Err("there is no host in it".into());
        }
        if uri.authority().is_some_and(|authority| authority.as_str().contains('@')) {
            return Err("it must not contain credentials".into());
        }
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err("it must not have a path".into());
        }
        Ok(Self(uri))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.to_string().trim_end_matches('/'))
    }
}

/// A gateway that was reached. Cheap to clone; a connection that breaks is made anew at the next question.
#[derive(Debug, Clone)]
pub(super) struct Gateway {
    channel: Channel,
}

impl Gateway {
    /// Connects, within ten seconds. [`Failure::Unreachable`] says what the operating system said.
    pub(super) async fn connect(connection: &Connection) -> Result<Self, Failure> {
        let Address(uri) = connection.addr.clone();
        let unreachable = |source| Failure::Unreachable { address: connection.addr.to_string(), source };
        let tls = uri.scheme_str() == Some("https");
        let mut endpoint = Endpoint::from(uri)
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE_TIMEOUT);
        if tls {
            endpoint =
                endpoint.tls_config(ClientTlsConfig::new().with_native_roots()).map_err(unreachable)?;
        }
        Ok(Self { channel: endpoint.connect().await.map_err(unreachable)? })
    }

    /// The API's client.
    pub(super) fn builds(&self) -> BuildsClient<Channel> {
        BuildsClient::new(self.channel.clone())
            .max_decoding_message_size(MESSAGE_BYTES)
            .max_encoding_message_size(MESSAGE_BYTES)
    }
}

/// The answer to one question, or to the opening of a stream. `doing` is the question in the user's words.
pub(super) async fn answer<T>(
    doing: &'static str,
    question: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, Failure> {
    match tokio::time::timeout(DEADLINE, question).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(Failure::rpc(doing, status)),
        Err(_) => Err(Failure::NoAnswer { doing, after: DEADLINE }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        for (text, shown) in [
            ("127.0.0.1:8080", "http://127.0.0.1:8080"),
            ("[::1]:80", "http://[::1]:80"),
            ("gateway", "http://gateway"),
            ("http://gateway:8080/", "http://gateway:8080"),
            ("https://kiln.example.com", "https://kiln.example.com"),
        ] {
            assert_eq!(
                text.parse::<Address>().map(|address| address.to_string()),
                Ok(shown.into()),
                "{text}"
            );
        }
        for text in
            ["", ":8080", "ftp://x", "unix:///run/x", "http://", "http://u:p@x", "http://x/path", "a b"]
        {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }
}
