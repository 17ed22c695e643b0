//! One connection of one process to NATS.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use async_nats::client::RequestErrorKind;
use async_nats::jetstream;
use async_nats::{Client, ConnectOptions, Event};
use kiln_contract::{bucket, subject};
use secrecy::{ExposeSecret as _, SecretString};

use crate::error::BusError;
use crate::trouble::Troubles;

/// How long an end waits for the bus.
pub(crate) const PATIENCE: Duration = Duration::from_secs(2);

/// What is to be done where nothing is taken.
pub(crate) const DISK: &str = "the disk under it may be full: make room, then restart nats-server";
/// A write is taken within this long, or the disk is in trouble.
const TAKEN: Duration = Duration::from_secs(5);
/// What is written to see that something is: no instance's name.
const PROBE: &str = "probe";
/// A connection that is lost is mostly back within this time; a call waits no longer for it.
const BLIP: Duration = Duration::from_millis(250);
/// How often a call that waits for its answer looks whether the connection stands.
const LOOK: Duration = Duration::from_millis(50);

/// Where the bus is and who we are to it.
#[derive(Clone, Debug)]
pub struct Connect {
    /// `nats://host:port`, or several with commas between; without credentials.
    pub url: String,
    pub user: Option<String>,
    pub password: Option<SecretString>,
    /// Shown by the server for this connection.
    pub name: String,
}

/// A connection to the bus; clones share it.
#[derive(Clone)]
pub struct Bus {
    pub(crate) client: Client,
    pub(crate) js: jetstream::Context,
    errors: Arc<Errors>,
    pub(crate) troubles: Troubles,
}

/// What the client tells only by the way: a refused permission shows as nothing but a missing answer.
#[derive(Debug, Default)]
struct Errors {
    slow_consumer: AtomicU64,
    server: AtomicU64,
    disconnects: AtomicU64,
    /// The connection is lost, which was said.
    away: AtomicBool,
}

impl Connect {
    /// Connects, and goes on connecting whenever the connection is lost. The first connection must succeed.
    pub async fn connect(&self) -> Result<Bus, BusError> {
        let errors = Arc::new(Errors::default());
        let seen = errors.clone();
        let mut options = ConnectOptions::new()
            .name(&self.name)
            // Apart from the inboxes that other users of the account may subscribe to.
            .custom_inbox_prefix("_KILN_INBOX")
            .ping_interval(Duration::from_secs(10))
            .request_timeout(Some(Duration::from_secs(5)))
            .event_callback(move |event| {
                let seen = seen.clone();
                async move { seen.note(&event) }
            });
        if let (Some(user), Some(password)) = (&self.user, &self.password) {
            options = options.user_and_password(user.clone(), password.expose_secret().to_owned());
        }
        let unreachable = |error: &dyn std::fmt::Display| BusError::Unavailable {
            operation: "connect",
            detail: format!("{}: {error}", self.url),
        };
        let servers: Vec<async_nats::ServerAddr> = self
            .url
            .split(',')
            .map(|server| server.trim().parse())
            .collect::<Result<_, _>>()
            .map_err(|error: std::io::Error| unreachable(&error))?;
        let client = options.connect(servers).await.map_err(|error| unreachable(&error))?;
        let info = client.server_info();
        if !client.is_server_compatible(2, 11, 0) {
            return Err(BusError::Refused {
                operation: "connect",
                detail: format!("nats-server {} is too old: 2.11 or newer is needed", info.version),
            });
        }
        if !info.jetstream {
            return Err(BusError::Refused {
                operation: "connect",
                detail: "JetStream is not enabled on this server".into(),
            });
        }
        let js =
            jetstream::context::ContextBuilder::new().timeout(Duration::from_secs(5)).build(client.clone());
        Ok(Bus { client, js, errors, troubles: Troubles::default() })
    }
}

impl Errors {
    fn note(&self, event: &Event) {
        match event {
            Event::SlowConsumer(_) => {
                // Healed by the readers' sequence check; counted, not logged: a storm of them would be its own fault.
                self.slow_consumer.fetch_add(1, Ordering::Relaxed);
            }
            Event::Disconnected => {
                self.disconnects.fetch_add(1, Ordering::Relaxed);
                self.away.store(true, Ordering::Relaxed);
                tracing::warn!("the connection to the bus is lost; connecting again");
            }
            Event::Connected => {
                self.away.store(false, Ordering::Relaxed);
                tracing::info!("connected to the bus");
            }
            Event::ServerError(error) => {
                self.server.fetch_add(1, Ordering::Relaxed);
                tracing::error!("the bus refuses something that Kiln needs: {error}");
            }
            Event::ClientError(error) => {
                self.server.fetch_add(1, Ordering::Relaxed);
                // A try to connect again: one line said that it is tried.
                if self.away.load(Ordering::Relaxed) {
                    tracing::debug!("bus client: {error}");
                } else {
                    tracing::warn!("bus client: {error}");
                }
            }
            Event::LameDuckMode | Event::Draining | Event::Closed => {}
        }
    }
}

impl Bus {
    /// Whether the connection stands now.
    pub fn is_connected(&self) -> bool {
        self.client.connection_state() == async_nats::connection::State::Connected
    }

    /// Runs a call to the bus, which sets its own time limit. Without a connection it isn't begun, and when the connection
    /// is lost on the way its answer isn't waited for: `Unavailable` within [`BLIP`], when it may have happened all the same.
    pub(crate) async fn attend<T>(
        &self,
        operation: &'static str,
        call: impl Future<Output = T>,
    ) -> Result<T, BusError> {
        self.present(operation).await?;
        tokio::select! {
            biased;
            answer = call => Ok(answer),
            () = self.away() => {
                Err(BusError::unavailable(operation, "the connection was lost before the answer came"))
            }
        }
    }

    /// The same for a call each of whose errors says no more than that the bus could not do it now.
    pub(crate) async fn call<T, E: std::fmt::Display>(
        &self,
        operation: &'static str,
        call: impl Future<Output = Result<T, E>>,
    ) -> Result<T, BusError> {
        self.attend(operation, call).await?.map_err(|error| BusError::unavailable(operation, error))
    }

    /// `Unavailable` while the connection is down, and not back within [`BLIP`].
    pub async fn present(&self, operation: &'static str) -> Result<(), BusError> {
        let back = async {
            while !self.is_connected() {
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::time::timeout(BLIP, back)
            .await
            .map_err(|_| BusError::unavailable(operation, "the bus is away"))
    }

    /// Returns once the connection has been down for longer than [`BLIP`].
    async fn away(&self) {
        let mut since = None;
        loop {
            if self.is_connected() {
                since = None;
            } else if since.get_or_insert_with(tokio::time::Instant::now).elapsed() >= BLIP {
                return;
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Whether the server answers: a connection may stand while nobody is behind it.
    pub async fn answers(&self, within: Duration) -> bool {
        let request = async_nats::Request::new().timeout(Some(within));
        let answer = self.client.send_request(subject::NOBODY, request);
        // That nobody is there to answer is the server's own answer.
        let alive = |error: &async_nats::RequestError| error.kind() == RequestErrorKind::NoResponders;
        self.is_connected()
            && matches!(tokio::time::timeout(within, answer).await, Ok(Err(error)) if alive(&error))
    }

    /// Whether a write is taken: a stream that met a full disk leaves all unanswered, and shows it in no other way. It is
    /// written where leases are, which are written all the time.
    pub(crate) async fn probe(&self) -> Result<(), BusError> {
        const WRITE: &str = "write to the bus";
        let write = async {
            let store = self.call(WRITE, self.js.get_key_value(bucket::HOLDERS)).await?;
            self.call(WRITE, store.put(PROBE, "".into())).await
        };
        let late = |_| BusError::unavailable(WRITE, "no answer");
        tokio::time::timeout(TAKEN, write).await.map_err(late)?.map(|_| ())
    }

    /// How often the connection was lost. A consumer that was made before the last time may be gone, which it finds out only
    /// by missed heartbeats, half a minute later.
    pub(crate) fn times_lost(&self) -> u64 {
        self.errors.disconnects.load(Ordering::Relaxed)
    }

    /// The largest message that the server takes, in bytes.
    pub fn max_payload(&self) -> usize {
        self.client.max_payload()
    }

    /// Messages dropped because a subscription here was full; errors of the server; lost connections.
    pub fn counts(&self) -> [(&'static str, u64); 3] {
        [
            ("slow_consumer", self.errors.slow_consumer.load(Ordering::Relaxed)),
            ("server_error", self.errors.server.load(Ordering::Relaxed)),
            ("disconnected", self.errors.disconnects.load(Ordering::Relaxed)),
        ]
    }

    /// Sends what is queued and closes the connection. A bus that is away isn't waited for.
    pub async fn close(self) {
        let closing = async {
            self.client.flush().await.map_err(|error| error.to_string())?;
            self.client.drain().await.map_err(|error| error.to_string())
        };
        let closed = match self.is_connected() {
            true => tokio::time::timeout(PATIENCE, closing).await.unwrap_or_else(|_| Err("no answer".into())),
            false => Err("it is away".into()),
        };
        if let Err(error) = closed {
            tracing::warn!("the last messages to the bus may be lost: {error}");
        }
    }
}
