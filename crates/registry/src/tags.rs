//! The tags of a repository, for who looks after what lies there: which there are, what each holds, what is given up.
//!
//! All of it is done with the credentials for what is written ([`Access::push_keychain`]).

use http::{Method, header};
use kiln_domain::reference::{Digest, ImageReference};
use serde::Deserialize;
use serde_json::{Value, json};
use url::Url;

use crate::OciRegistry;
use crate::access::Access;
use crate::error::Error;
use crate::http::{body, successful};
use crate::manifest::Manifest;
use crate::repository::Repository;
use crate::retry::Retry;

/// Annotation of a manifest: when that was written, as RFC 3339 has it (OCI image spec, annotations).
const CREATED: &str = "org.opencontainers.image.created";
/// Tags in one answer; a registry may give fewer.
const PAGE: usize = 100;
/// Pages that are read: what has more is not a repository of a cache.
const PAGES: usize = 1000;

/// What a tag holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tagged {
    pub digest: Digest,
    /// Config and layers, as they are moved.
    pub bytes: u64,
    /// When its manifest says that it was written, RFC 3339.
    pub created: Option<String>,
}

#[derive(Deserialize)]
struct Tags {
    tags: Option<Vec<String>>,
}

#[derive(Deserialize)]
struct Sized {
    config: Option<Size>,
    #[serde(default)]
    layers: Vec<Size>,
    #[serde(default)]
    manifests: Vec<Size>,
    #[serde(default)]
    annotations: std::collections::BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Size {
    size: u64,
}

impl OciRegistry {
    /// All tags of the repository that a reference names; none of one that isn't there.
    pub async fn tags(&self, of: &ImageReference, access: &Access) -> Result<Vec<String>, Error> {
        let name = of.name();
        let repository = Repository::target(self, of, None, access)?;
        let all = async {
            let mut tags = Vec::new();
            let mut page = Some(format!("tags/list?n={PAGE}"));
            for _ in 0..PAGES {
                let Some(path) = page else { break };
                let read = repository.again(async || {
                    let request = repository.request(Method::GET, &path, &name)?;
                    let answer = repository.send(request, &name).await?;
                    let answer = successful(answer, &name, repository.registry).await?;
                    let next = next(answer.url(), answer.headers().get(header::LINK));
                    let bytes = body(answer, &name, repository.registry).await?;
                    let read: Tags = serde_json::from_slice(&bytes)
                        .map_err(|error| Error::broken(&name, format!("its tags can't be read: {error}")))?;
                    Ok((read.tags.unwrap_or_default(), next))
                });
                let (read, next) = match read.await {
                    Err(Error::NotFound { .. }) => break,
                    read => read?,
                };
                tags.extend(read);
                page = next;
            }
            Ok(tags)
        };
        access.in_time(of.registry(), all).await
    }

    /// What a tag holds; `None` if there is nothing.
    pub async fn tagged(&self, reference: &ImageReference, access: &Access) -> Result<Option<Tagged>, Error> {
        let repository = Repository::target(self, reference, None, access)?;
        let name = reference.to_string();
        let read = repository.manifest(reference.selector(), &name);
        let manifest = match access.in_time(reference.registry(), read).await {
            Err(Error::NotFound { .. }) => return Ok(None),
            read => read?,
        };
        let sized: Sized = serde_json::from_slice(&manifest.bytes)
            .map_err(|error| Error::broken(&name, error.to_string()))?;
        let sizes = sized.config.iter().chain(&sized.layers).chain(&sized.manifests);
        Ok(Some(Tagged {
            digest: manifest.digest,
            bytes: sizes.map(|part| part.size).fold(0, u64::saturating_add),
            created: sized.annotations.get(CREATED).cloned(),
        }))
    }

    /// Notes in the manifest at a tag when it was written (RFC 3339), and puts it there and at the tags `also`.
    pub async fn mark(
        &self,
        reference: &ImageReference,
        also: &[&str],
        created: &str,
        access: &Access,
    ) -> Result<(), Error> {
        let name = reference.to_string();
        let repository = Repository::target(self, reference, None, access)?;
        let marked = async {
            let manifest = repository.manifest(reference.selector(), &name).await?;
            let mut content: Value = serde_json::from_slice(&manifest.bytes)
                .map_err(|error| Error::broken(&name, error.to_string()))?;
            let annotations = content
                .as_object_mut()
                .map(|content| content.entry("annotations").or_insert_with(|| json!({})));
            if let Some(annotations) = annotations.and_then(Value::as_object_mut) {
                annotations.insert(CREATED.to_owned(), created.into());
            }
            let bytes = bytes::Bytes::from(content.to_string());
            let manifest = Manifest { digest: Digest::of(&bytes), bytes, ..manifest };
            for tag in std::iter::once(reference.selector()).chain(also.iter().copied()) {
                let mut retry = Retry::of_request(access, repository.registry);
                while let Err(failure) = repository.put_manifest(tag, &manifest, &name).await {
                    retry.wait(failure).await?;
                }
            }
            Ok(())
        };
        access.in_time(reference.registry(), marked).await
    }

    /// Removes a manifest, and so every tag that holds it. `reference` names it by its digest. One that isn't there is removed
    /// already.
    pub async fn delete(&self, reference: &ImageReference, access: &Access) -> Result<(), Error> {
        let name = reference.to_string();
        let repository = Repository::keeper(self, reference, access)?;
        let deleted = repository.again(async || {
            let path = format!("manifests/{}", reference.selector());
            let request = repository.request(Method::DELETE, &path, &name)?;
            let answer = repository.send(request, &name).await?;
            successful(answer, &name, repository.registry).await.map(drop)
        });
        match access.in_time(reference.registry(), deleted).await {
            Err(Error::NotFound { .. }) => Ok(()),
            other => other,
        }
    }
}

/// The path and query of the next page, from its `Link: <…>; rel="next"`: of that URL only the query counts, as it must be of
/// the same repository.
fn next(asked: &Url, link: Option<&http::HeaderValue>) -> Option<String> {
    let link = link?.to_str().ok()?;
    let (url, relation) = link.trim().strip_prefix('<')?.split_once('>')?;
    let url = asked.join(url).ok().filter(|_| relation.contains("next"))?;
    Some(format!("tags/list?{}", url.query()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_page() {
        let asked: Url = "https://r.test/v2/a/tags/list?n=2".parse().unwrap();
        for (link, expected) in [
            (r#"</v2/a/tags/list?last=b&n=2>; rel="next""#, Some("tags/list?last=b&n=2")),
            (r#"<https://evil.test/x?last=b>; rel="next""#, Some("tags/list?last=b")),
            (r#"</v2/a/tags/list?last=b>; rel="prev""#, None),
            ("nonsense", None),
        ] {
            assert_eq!(next(&asked, Some(&link.parse().unwrap())).as_deref(), expected, "{link}");
        }
        assert_eq!(next(&asked, None), None);
    }
}
