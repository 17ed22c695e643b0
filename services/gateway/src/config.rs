//! What a gateway may be told.

use serde::{Deserialize, Serialize};

/// Settings of the gateway, as they stand in the configuration file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Admits `file://` git remotes; the resolver and the orchestrator must admit them too.
    pub file_remotes: bool,
    /// The registry (`host[:port]`) of base images, which a request of the compatible API allows with `allow_baserep`; empty
    /// for that of `orchestrator.base_image_repository`, where the file has it.
    pub base_registry: String,
    /// The registry of finished images, for `allow_workspacerep`; likewise.
    pub workspace_registry: String,
}
