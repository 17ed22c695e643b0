//! Asking a question: one answer, from whichever member of the service is free.

use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::client::RequestErrorKind;
use async_nats::service::{NATS_SERVICE_ERROR, NATS_SERVICE_ERROR_CODE};
use jiff::Timestamp;
use kiln_contract::error::{Code, Refusal};
use kiln_contract::header;
use kiln_contract::question::Question;
use prost::Message as _;

use crate::connection::Bus;
use crate::trace;

/// Unanswered for this long, a question is asked once more: a paused member of the group then costs this much, not
/// the whole deadline. Every question is idempotent.
const ASK_AGAIN_AFTER: Duration = Duration::from_millis(500);

/// While an answer is waited for, the bus itself must answer within this time, or a second time within as much: a machine that
/// is merely busy may miss the first.
const ALIVE_WITHIN: Duration = Duration::from_secs(2);

impl Bus {
    /// Asks and waits for the answer, at most `within`.
    ///
    /// Errors: what the service refused, as it said it; `Unavailable` when nobody serves this or the bus is away (at
    /// once, not after a wait); `DeadlineExceeded` when nobody answered in time.
    #[tracing::instrument(skip_all, fields(question = %Q::subject()))]
    pub async fn ask<Q: Question>(&self, question: &Q, within: Duration) -> Result<Q::Answer, Refusal> {
        self.try_ask(question, within).await?
    }

    /// The same; the inner refusal is the service's answer, the outer one says that there was no answer.
    pub async fn try_ask<Q: Question>(
        &self,
        question: &Q,
        within: Duration,
    ) -> Result<Result<Q::Answer, Refusal>, Refusal> {
        let payload = bytes::Bytes::from(question.encode_to_vec());
        if payload.len() + 1024 > self.max_payload() {
            return Err(Refusal::new(
                Code::InvalidArgument,
                format!(
                    "the request has {} bytes, more than the {} that can be carried",
                    payload.len(),
                    self.max_payload()
                ),
            ));
        }
        let mut headers = HeaderMap::new();
        trace::inject(&mut headers);
        headers.insert(header::DEADLINE, deadline_after(within).to_string().as_str());
        let ask = || {
            let request = async_nats::Request::new()
                .payload(payload.clone())
                .headers(headers.clone())
                .timeout(Some(within));
            self.client.send_request(Q::subject(), request)
        };
        let answers = async {
            let first = ask();
            tokio::pin!(first);
            tokio::select! {
                answer = &mut first => return Some(answer),
                () = tokio::time::sleep(ASK_AGAIN_AFTER) => {}
            }
            let second = ask();
            tokio::pin!(second);
            let alive = async {
                while self.answers(ALIVE_WITHIN).await || self.answers(ALIVE_WITHIN).await {
                    tokio::time::sleep(ALIVE_WITHIN).await;
                }
            };
            // An error of one is no answer while the other may still come: its asker may be at work on it.
            let either = async {
                tokio::select! {
                    answer = &mut first => if answer.is_ok() { answer } else { second.await },
                    answer = &mut second => if answer.is_ok() { answer } else { first.await },
                }
            };
            tokio::select! {
                answer = either => Some(answer),
                () = alive => None,
            }
        };
        let message = tokio::time::timeout(within, self.attend("ask", answers))
            .await
            .map_err(|_| late::<Q>(within))?
            .map_err(|error| unavailable::<Q>(&error.to_string()))?
            .ok_or_else(|| unavailable::<Q>("the bus does not answer"))?
            .map_err(|error| match error.kind() {
                RequestErrorKind::NoResponders => unavailable::<Q>("none of its instances runs"),
                RequestErrorKind::TimedOut => late::<Q>(within),
                _ => unavailable::<Q>(&error.to_string()),
            })?;
        if let Some(refusal) = refusal_of(message.headers.as_ref()) {
            return Ok(Err(refusal));
        }
        Q::Answer::decode(message.payload).map(Ok).map_err(|error| {
            Refusal::new(Code::Internal, format!("the {} answered what can't be read: {error}", Q::SERVICE))
        })
    }
}

/// `within` from now, in milliseconds since the epoch.
#[expect(clippy::disallowed_methods, reason = "a deadline on the wire is a wall-clock time")]
fn deadline_after(within: Duration) -> i64 {
    Timestamp::now().as_millisecond().saturating_add(i64::try_from(within.as_millis()).unwrap_or(i64::MAX))
}

fn unavailable<Q: Question>(why: &str) -> Refusal {
    Refusal::new(Code::Unavailable, format!("the {} can't be asked: {why}", Q::SERVICE))
}

fn late<Q: Question>(within: Duration) -> Refusal {
    Refusal::new(Code::DeadlineExceeded, format!("the {} did not answer within {within:?}", Q::SERVICE))
}

/// The refusal that an answer's headers carry.
fn refusal_of(headers: Option<&HeaderMap>) -> Option<Refusal> {
    let headers = headers?;
    let code = headers
        .get(NATS_SERVICE_ERROR_CODE)?
        .as_str()
        .parse()
        .unwrap_or(usize::from(Code::Internal.number()));
    let message = headers.get(NATS_SERVICE_ERROR).map(ToString::to_string).unwrap_or_default();
    Some(Refusal::new(Code::from_number(code), message))
}
