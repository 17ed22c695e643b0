//! Records of builds, as an orchestrator would make them.

use anyhow::Result;
use kiln_domain::id::{BuildId, ImageKey};
use kiln_domain::record::Record;
use kiln_domain::source::Source;

/// A build of `image` that was accepted and no more: a copy of an image to `registry/workspace:<image>`.
pub fn queued(image: &str, entropy: [u8; 10]) -> Result<Record> {
    let target_ref = format!("registry.test/workspace:{image}");
    let id = BuildId::new(&ImageKey::of(&target_ref), entropy);
    let base_ref = format!("registry.test/base:{image}");
    let source = Source::Image("registry.test/source:1".parse()?);
    Ok(Record {
        base_exists: true,
        timeout_ms: 60_000,
        queue_limit_ms: 60_000,
        ..Record::accepted(id, target_ref, base_ref, source, "ann".into())
    })
}
