//! Logs: a build's log from its first byte to its end.

use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt as _, stream};
use kiln_bus::logs::{Chunk, Start};
use kiln_domain::id::{BuildId, ImageKey};
use kiln_domain::mask::{Masker, Patterns, Piece};
use kiln_domain::record::Record;
use kiln_domain::reference::ImageReference;
use kiln_proto::builder as api;
use tonic::Status;

use crate::builds::Answers;
use crate::compat::ImageBuilderApi;
use crate::log::ReadError;
use crate::status;

impl ImageBuilderApi {
    pub(crate) async fn log(&self, request: api::LogsRequest) -> Result<Answers<api::LogsResponse>, Status> {
        let (id, record) = self.build_of(&request).await?;
        let chunks = self.builds.build_logs.open(&id).await.map_err(unreadable)?.read(Start::Beginning, true);
        let mut masker = match (request.censored, record) {
            (true, Some(record)) => Some(Masker::new(references(&record)?)),
            (true, None) => return Err(not_found()),
            (false, _) => None,
        };
        let contents = chunks
            .map(Some)
            .chain(stream::once(async { None }))
            .map(move |chunk| shown(&mut masker, chunk).transpose())
            .filter_map(futures::future::ready)
            .map(|bytes| bytes.map(|bytes| api::LogsResponse { content: bytes.to_vec() }));
        Ok(Box::pin(contents))
    }

    /// The build that a request names: by its id, or the newest one of an image.
    async fn build_of(&self, request: &api::LogsRequest) -> Result<(BuildId, Option<Record>), Status> {
        for name in [&request.build_id, &request.build_ref] {
            if let Ok(id) = name.parse::<BuildId>() {
                let record = self.builds.entry(&id).await.ok().map(|entry| entry.record);
                return Ok((id, record));
            }
            if !name.is_empty() {
                let key = ImageKey::of(name);
                let newest = self.builds.journal.last_of_image(&key).await.map_err(status::of_bus)?;
                if let Some(entry) = newest {
                    return Ok((entry.record.id.clone(), Some(entry.record)));
                }
            }
        }
        Err(not_found())
    }
}

/// What of the next chunk is certain to be no reference; of the end (`None`), what was held back.
fn shown(
    masker: &mut Option<Masker>,
    chunk: Option<Result<Chunk, ReadError>>,
) -> Result<Option<Bytes>, Status> {
    let chunk = chunk.transpose().map_err(unreadable)?;
    let bytes = match (masker, chunk) {
        (None, chunk) => chunk.map(|chunk| chunk.bytes).unwrap_or_default(),
        (Some(masker), Some(chunk)) => joined(&masker.push(&chunk.bytes)),
        (Some(masker), None) => joined(&masker.finish()),
    };
    Ok((!bytes.is_empty()).then_some(bytes))
}

fn joined(pieces: &[Piece]) -> Bytes {
    pieces.iter().flat_map(Piece::shown).copied().collect()
}

/// The image's names: base and target, whole, and as a build tool shows them without the tag.
fn references(record: &Record) -> Result<Arc<Patterns>, Status> {
    let mut hidden = Vec::new();
    for reference in [&record.target_ref, &record.base_ref] {
        hidden.push(reference.clone());
        hidden.extend(reference.parse::<ImageReference>().map(|parsed| parsed.name()));
    }
    let patterns = Patterns::of(hidden.iter().map(String::as_bytes));
    patterns.map(Arc::new).map_err(|error| Status::internal(error.to_string()))
}

fn not_found() -> Status {
    Status::not_found("build not found")
}

fn unreadable(error: ReadError) -> Status {
    match status::of_read(error) {
        status if status.code() == tonic::Code::NotFound => not_found(),
        status => status,
    }
}

#[cfg(test)]
mod tests {
    use kiln_domain::source::Source;

    use super::*;

    #[test]
    fn references_are_masked_wherever_the_log_is_cut() {
        let id = BuildId::new(&ImageKey::of("r.test/workspace:abc"), [1; 10]);
        let (target, base) = ("r.test/workspace:abc", "r.test/base:def");
        let source = Source::Image("r.test/x:1".parse().unwrap());
        let record = Record::accepted(id, target.into(), base.into(), source, "ann".into());
        let log = format!("pushing {base}\npushing {target}\nCOMMIT r.test/base\nFROM r.test/other:1\n");
        for cut in 1..log.len() {
            let mut masker = Some(Masker::new(references(&record).unwrap()));
            let mut text = Vec::new();
            let chunks = log.as_bytes().chunks(cut).map(|bytes| {
                Some(Ok(Chunk { offset: 0, bytes: Bytes::copy_from_slice(bytes), complete: false }))
            });
            for chunk in chunks.chain([None]) {
                text.extend(shown(&mut masker, chunk).unwrap().unwrap_or_default());
            }
            let text = String::from_utf8(text).unwrap();
            assert_eq!(text, "pushing ***\npushing ***\nCOMMIT ***\nFROM r.test/other:1\n", "cut at {cut}");
        }
    }
}
