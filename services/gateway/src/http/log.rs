//! `GET /v1/builds/{id}/log`: a log as its bytes.

use axum::body::Body;
use axum::extract::{Path, RawQuery, State};
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use futures::{Stream, StreamExt as _, stream};
use http::response::Builder;
use http::{HeaderMap, HeaderName, Method, StatusCode, header};
use kiln_bus::logs::{Chunk, Extent, LogError, Start};
use kiln_domain::id::BuildId;

use super::accept::wants_events;
use super::events;
use super::problem::Problem;
use super::request::{Query, Range, Resume};
use crate::cut::Cut;
use crate::log::{BuildLog, BuildLogs, ReadError};

/// On every answer with bytes: the offset of the first of them in the log.
const OFFSET: HeaderName = HeaderName::from_static("kiln-log-offset");
/// Whether the log had ended when the answer began.
const COMPLETE: HeaderName = HeaderName::from_static("kiln-log-complete");

/// Answers GET and HEAD.
pub(super) async fn read(
    State(logs): State<BuildLogs>,
    Path(id): Path<String>,
    RawQuery(query): RawQuery,
    method: Method,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let id: BuildId = id.parse().map_err(|error| Problem::invalid("id", error))?;
    let query = Query::parse(query.as_deref().unwrap_or_default())?;
    if wants_events(&headers) {
        let resume = Resume::asked(&headers)?;
        if resume == Some(Resume::Ended) {
            // At which a browser gives up connecting anew.
            return Ok(StatusCode::NO_CONTENT.into_response());
        }
        let start = match resume {
            Some(Resume::At(offset)) => Start::Offset(offset),
            _ => query.start.unwrap_or(Start::Beginning),
        };
        let log = logs.open(&id).await?;
        let (start, there) = place(&log, start, true).await?;
        let read_all = |there: Extent| !there.complete && start == Start::Offset(there.end);
        if !log.is_known && there.is_some_and(read_all) {
            // Nobody writes it on, and a browser would come back for more for ever.
            return Err(ReadError::Cut(Cut::Lost(id)).into());
        }
        let chunks = begun(log, start, true).await?;
        return Ok(events::answer(logs, id, chunks));
    }
    let range = Range::asked(&headers);
    let log = logs.open(&id).await?;
    let answer = match range {
        Some(_) if query.follow => {
            return Err(Problem::invalid(
                "Range",
                "the end of a log that is followed isn't known: begin at `?offset=N` or `?tail=N`",
            ));
        }
        Some(_) if query.start.is_some() => {
            return Err(Problem::invalid("Range", "stands beside `offset` or `tail`: one of them"));
        }
        Some(range) => Answer::range(&log, range).await?,
        None => Answer::whole(&log, query).await?,
    };
    answer.respond(log, &method).await
}

/// What is answered, before any of it is read.
struct Answer {
    status: StatusCode,
    start: Start,
    follow: bool,
    there: Option<Extent>,
    /// Known unless the log is followed and has not ended.
    bytes: Option<(u64, u64)>,
}

impl Answer {
    async fn range(log: &BuildLog, range: Range) -> Result<Self, Problem> {
        let there = log.extent().await?.ok_or_else(|| log.missing())?;
        let Some((first, end)) = range.within(there) else {
            let detail = format!("Range: the log ends at byte {}", there.end);
            return Err(Problem::unsatisfiable(detail, there.end));
        };
        check(log, first, there)?;
        Ok(Self {
            status: StatusCode::PARTIAL_CONTENT,
            start: Start::Offset(first),
            follow: false,
            there: Some(there),
            bytes: Some((first, end)),
        })
    }

    async fn whole(log: &BuildLog, query: Query) -> Result<Self, Problem> {
        let (start, there) = place(log, query.start.unwrap_or(Start::Beginning), query.follow).await?;
        let bytes = match (start, there) {
            (Start::Offset(first), Some(there)) if there.complete || !query.follow => {
                Some((first, there.end))
            }
            _ => None,
        };
        Ok(Self { status: StatusCode::OK, start, follow: query.follow, there, bytes })
    }

    async fn respond(self, log: BuildLog, method: &Method) -> Result<Response, Problem> {
        let mut answer = Response::builder()
            .status(self.status)
            // Bytes are bytes: no charset is promised, and a browser must not guess a page in them.
            .header(header::CONTENT_TYPE, "text/plain")
            .header(header::X_CONTENT_TYPE_OPTIONS, "nosniff")
            .header(header::ACCEPT_RANGES, "bytes")
            .header(header::CACHE_CONTROL, "no-store")
            .header(header::VARY, "Accept")
            .header(COMPLETE, self.there.is_some_and(|there| there.complete).to_string());
        if let Start::Offset(offset) = self.start {
            answer = answer.header(OFFSET, offset);
        }
        let Some((first, end)) = self.bytes else {
            if method == Method::HEAD {
                return with(answer, Body::empty());
            }
            let chunks = begun(log, self.start, self.follow).await?;
            return with(answer, Body::from_stream(chunks.map(|chunk| chunk.map(|chunk| chunk.bytes))));
        };
        answer = answer.header(header::CONTENT_LENGTH, end - first);
        if self.status == StatusCode::PARTIAL_CONTENT {
            let length = match self.there {
                Some(there) if there.complete => there.end.to_string(),
                _ => "*".into(),
            };
            answer = answer.header(header::CONTENT_RANGE, format!("bytes {first}-{}/{length}", end - 1));
        }
        if method == Method::HEAD || first == end {
            return with(answer, Body::empty());
        }
        // The log may grow meanwhile: no more than was promised.
        let chunks = begun(log, self.start, false).await?;
        with(answer, Body::from_stream(limited(chunks, end - first)))
    }
}

fn with(answer: Builder, body: Body) -> Result<Response, Problem> {
    // Every header is ours, so that this can't be.
    answer
        .body(body)
        .map_err(|error| Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", error.to_string()))
}

/// Where to begin, as an offset as far as anything is there, which is checked.
async fn place(log: &BuildLog, start: Start, follow: bool) -> Result<(Start, Option<Extent>), Problem> {
    let Some(there) = log.extent().await? else {
        // One that is not begun is waited for.
        return if follow { Ok((start, None)) } else { Err(log.missing().into()) };
    };
    let offset = match start {
        Start::Beginning => there.first,
        Start::Offset(offset) => offset,
        Start::Tail(bytes) => there.end.saturating_sub(bytes).max(there.first),
    };
    check(log, offset, there)?;
    Ok((Start::Offset(offset), Some(there)))
}

fn check(log: &BuildLog, wanted: u64, there: Extent) -> Result<(), ReadError> {
    let (id, Extent { first, end, .. }) = (log.id().clone(), there);
    if wanted < first {
        return Err(ReadError::Log(LogError::Discarded { id, wanted, first }));
    }
    if wanted > end {
        return Err(ReadError::Log(LogError::Beyond { id, wanted, end }));
    }
    Ok(())
}

type Chunks = stream::BoxStream<'static, Result<Chunk, ReadError>>;

/// The log's chunks. Of one that may not come any more the first is waited for, so that its error can still be told.
async fn begun(log: BuildLog, start: Start, follow: bool) -> Result<Chunks, ReadError> {
    let wait = log.is_over || !follow;
    let mut chunks = log.read(start, follow).boxed();
    if !wait {
        return Ok(chunks);
    }
    let first = chunks.next().await.transpose()?;
    Ok(stream::iter(first.map(Ok)).chain(chunks).boxed())
}

/// The first `length` bytes. If they end before, so does the connection: the client must not take it for all.
fn limited(chunks: Chunks, length: u64) -> impl Stream<Item = Result<Bytes, ReadError>> {
    stream::unfold((chunks, length), async |(mut chunks, left)| {
        if left == 0 {
            return None;
        }
        let chunk = chunks.next().await?;
        let bytes = chunk.map(|Chunk { mut bytes, .. }| {
            bytes.truncate(usize::try_from(left).unwrap_or(usize::MAX));
            bytes
        });
        let taken = bytes.as_ref().map_or(left, |bytes| bytes.len() as u64);
        Some((bytes, (chunks, left - taken)))
    })
}
