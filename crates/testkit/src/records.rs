//! Records of builds, as an orchestrator would make them.

use std::collections::BTreeMap;

use anyhow::Result;
use kiln_domain::id::{BuildId, ImageKey};
use kiln_domain::record::{Record, State};
use kiln_domain::source::Source;

/// A build of `image` that was accepted and no more: a copy of an image to `registry/workspace:<image>`.
pub fn queued(image: &str, entropy: [u8; 10]) -> Result<Record> {
    let target_ref = format!("registry.test/workspace:{image}");
    Ok(Record {
        id: BuildId::new(&ImageKey::of(&target_ref), entropy),
        target_ref,
        base_ref: format!("registry.test/base:{image}"),
        source: Source::Image("registry.test/source:1".parse()?),
        commit: None,
        base_exists: true,
        digest_before: None,
        state: State::Queued,
        reason: None,
        message: String::new(),
        owner: "ann".into(),
        joined_by: Vec::new(),
        requests: Vec::new(),
        labels: BTreeMap::new(),
        no_cache: false,
        timeout_ms: 60_000,
        queue_limit_ms: 60_000,
        attempt: 1,
        claims: 0,
        claimed_by: None,
        handle: None,
        engine: String::new(),
        build_tool: String::new(),
        cancel: None,
        queued_at: None,
        started_at: None,
        attempt_started_at: None,
        finished_at: None,
        digest: None,
        steps: Vec::new(),
        bases: Vec::new(),
        traceparent: String::new(),
        unknown: BTreeMap::new(),
    })
}
