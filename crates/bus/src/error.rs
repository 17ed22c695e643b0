//! What can go wrong with the bus itself.

use contract::error::{Code, Refusal};
use kiln_contract as contract;

/// The bus could not do what it was asked. None of these says anything of a build.
#[derive(Debug, Clone, thiserror::Error)]
pub enum BusError {
    /// Not reached, or no answer in time: it may have happened all the same.
    #[error("{operation}: the bus could not be reached or did not answer in time: {detail}")]
    Unavailable { operation: &'static str, detail: String },
    /// A stream is at its size limit, or the disk is full.
    #[error("{operation}: the bus has no room: {detail}")]
    Full { operation: &'static str, detail: String },
    /// It refused; trying again won't help.
    #[error("{operation}: the bus refused: {detail}")]
    Refused { operation: &'static str, detail: String },
    /// What was read can't be understood.
    #[error("{operation}: a message can't be understood: {detail}")]
    Malformed { operation: &'static str, detail: String },
}

impl BusError {
    pub(crate) fn unavailable(operation: &'static str, error: impl std::fmt::Display) -> Self {
        Self::Unavailable { operation, detail: error.to_string() }
    }

    pub(crate) fn refused(operation: &'static str, error: impl std::fmt::Display) -> Self {
        Self::Refused { operation, detail: error.to_string() }
    }

    pub(crate) fn malformed(operation: &'static str, error: impl std::fmt::Display) -> Self {
        Self::Malformed { operation, detail: error.to_string() }
    }
}

impl From<BusError> for Refusal {
    fn from(error: BusError) -> Self {
        let code = match error {
            BusError::Unavailable { .. } | BusError::Full { .. } => Code::Unavailable,
            BusError::Refused { .. } | BusError::Malformed { .. } => Code::Internal,
        };
        Refusal::new(code, error.to_string())
    }
}
