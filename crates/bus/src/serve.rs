//! Answering questions, as a NATS micro service (`$SRV.PING`, `INFO` and `STATS` answer).

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use async_nats::service::{Service, ServiceExt as _};
use futures::StreamExt as _;
use jiff::Timestamp;
use kiln_contract::error::{Code, Refusal};
use kiln_contract::header;
use kiln_contract::question::Question;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use prost::Message as _;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument as _;

use crate::connection::{Bus, PATIENCE};
use crate::error::BusError;
use crate::trace;

/// Answers the questions of one service until it is drained.
pub struct Server {
    bus: Bus,
    service: Service,
    tasks: TaskTracker,
    stop: CancellationToken,
    metrics: Metrics,
}

/// How long a question without a deadline may take.
const LONGEST: Duration = Duration::from_secs(300);
/// Questions that one endpoint answers at once; more wait in the subscription.
const AT_ONCE: usize = 256;

impl Server {
    /// Registers the service; its endpoints are added by [`Server::answer`].
    pub async fn start(bus: &Bus, service: &'static str, metrics: &mut Registry) -> Result<Self, BusError> {
        let started = bus
            .client
            .service_builder()
            .description(format!("Kiln {service}"))
            .start(format!("kiln-{service}"), env!("CARGO_PKG_VERSION"))
            .await
            .map_err(|error| BusError::refused("start service", error))?;
        Ok(Self {
            bus: bus.clone(),
            service: started,
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
            metrics: Metrics::register(metrics),
        })
    }

    /// Answers one question from now on. A handler whose question's deadline has passed isn't begun, and is dropped where it
    /// passes on the way: what was asked for late must not happen later still.
    pub async fn answer<Q, F, Fut>(&self, handler: F) -> Result<(), BusError>
    where
        Q: Question,
        F: Fn(Q) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Q::Answer, Refusal>> + Send + 'static,
    {
        let endpoint = self
            .service
            .endpoint_builder()
            .name(Q::VERB)
            .add(Q::subject())
            .await
            .map_err(|error| BusError::refused("add endpoint", error))?;
        // Only once the server has the subscription can somebody ask. A flush doesn't wait for that; an answer to what was
        // sent later does, also that nobody is there.
        let _ = self.bus.client.request(self.bus.client.new_inbox(), bytes::Bytes::new()).await;
        let (stop, tasks, metrics) = (self.stop.clone(), self.tasks.clone(), self.metrics.clone());
        let (handler, free) = (Arc::new(handler), Arc::new(Semaphore::new(AT_ONCE)));
        self.tasks.spawn(async move {
            let mut endpoint = std::pin::pin!(endpoint.take_until(stop.cancelled()));
            while let Some(request) = endpoint.next().await {
                let Ok(permit) = free.clone().acquire_owned().await else { break };
                let (handler, metrics) = (handler.clone(), metrics.clone());
                let span = tracing::info_span!("answer", question = %Q::subject());
                trace::adopt(&span, request.message.headers.as_ref());
                tasks.spawn(
                    async move {
                        let begun = tokio::time::Instant::now();
                        let answer = answer_one(&*handler, &request.message).await;
                        let code = answer.as_ref().err().map_or("ok", |refusal| refusal.code.as_str());
                        metrics.observe::<Q>(code, begun.elapsed());
                        let answer = answer.map_err(|refusal| async_nats::service::error::Error {
                            code: usize::from(refusal.code.number()),
                            status: one_line(&refusal.message),
                        });
                        if let Err(error) = request.respond(answer).await {
                            tracing::warn!("an answer could not be sent: {error}");
                        }
                        drop(permit);
                    }
                    .instrument(span),
                );
            }
        });
        Ok(())
    }

    /// Takes no further question, and waits (bounded) for the answers under way.
    pub async fn drain(self) {
        self.stop.cancel();
        match tokio::time::timeout(PATIENCE, self.service.stop()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!("the service did not stop cleanly: {error}"),
            Err(_) => tracing::warn!("the service did not stop cleanly: the bus does not answer"),
        }
        self.tasks.close();
        if tokio::time::timeout(Duration::from_secs(10), self.tasks.wait()).await.is_err() {
            tracing::warn!("some questions were not answered in time at the end");
        }
        // A bus that is away isn't waited for: the answers would come too late.
        let _ = tokio::time::timeout(PATIENCE, self.bus.client.flush()).await;
    }
}

async fn answer_one<Q, F, Fut>(handler: &F, message: &async_nats::Message) -> Result<bytes::Bytes, Refusal>
where
    Q: Question,
    F: Fn(Q) -> Fut,
    Fut: Future<Output = Result<Q::Answer, Refusal>>,
{
    let late = |why| Refusal::new(Code::DeadlineExceeded, why);
    let left = time_left(message).unwrap_or(LONGEST);
    if left.is_zero() {
        return Err(late("the question came after its deadline"));
    }
    let question = Q::decode(message.payload.clone())
        .map_err(|error| Refusal::new(Code::Internal, format!("the question can't be read: {error}")))?;
    let answer = tokio::time::timeout(left, handler(question)).await;
    answer.map_err(|_| late("the answer was not there in time"))?.map(|answer| answer.encode_to_vec().into())
}

#[expect(clippy::disallowed_methods, reason = "a deadline on the wire is a wall-clock time")]
fn time_left(message: &async_nats::Message) -> Option<Duration> {
    let deadline: i64 = message.headers.as_ref()?.get(header::DEADLINE)?.as_str().parse().ok()?;
    let left = deadline.saturating_sub(Timestamp::now().as_millisecond());
    Some(Duration::from_millis(u64::try_from(left).unwrap_or(0)))
}

/// A header value can't hold a line end.
fn one_line(message: &str) -> String {
    message.replace(['\r', '\n'], " ")
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct QuestionLabels {
    question: String,
    code: &'static str,
}

#[derive(Clone)]
struct Metrics {
    answered: Family<QuestionLabels, Counter>,
    seconds: Family<QuestionLabels, Histogram, fn() -> Histogram>,
}

impl Metrics {
    fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            answered: Family::default(),
            seconds: Family::new_with_constructor(|| {
                Histogram::new([0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0])
            }),
        };
        registry.register(
            "questions_answered",
            "Questions answered on the bus, by code",
            metrics.answered.clone(),
        );
        registry.register("question_seconds", "Time to answer a question", metrics.seconds.clone());
        metrics
    }

    fn observe<Q: Question>(&self, code: &'static str, took: Duration) {
        let labels = QuestionLabels { question: format!("{}.{}", Q::SERVICE, Q::VERB), code };
        self.answered.get_or_create(&labels).inc();
        self.seconds.get_or_create(&labels).observe(took.as_secs_f64());
    }
}
