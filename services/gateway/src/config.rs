//! What a gateway may be told.

use serde::{Deserialize, Serialize};

/// Settings of the gateway, as they stand in the configuration file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Admits `file://` git remotes; the resolver and the orchestrator must admit them too.
    pub file_remotes: bool,
}
