//! Errors of the bus as gRPC's: the one place where they are mapped.

use kiln_contract::error::{Code, Refusal};
use tonic::Status;

use crate::log::ReadError;
use crate::stopping::Stopping;

/// The gRPC status of a service's refusal; its message stays as it is.
pub(crate) fn of(refusal: &Refusal) -> Status {
    let code = match refusal.code {
        Code::InvalidArgument => tonic::Code::InvalidArgument,
        Code::DeadlineExceeded => tonic::Code::DeadlineExceeded,
        Code::NotFound => tonic::Code::NotFound,
        Code::PermissionDenied => tonic::Code::PermissionDenied,
        Code::ResourceExhausted => tonic::Code::ResourceExhausted,
        Code::FailedPrecondition => tonic::Code::FailedPrecondition,
        Code::Aborted => tonic::Code::Aborted,
        Code::OutOfRange => tonic::Code::OutOfRange,
        Code::Internal => tonic::Code::Internal,
        Code::Unavailable => tonic::Code::Unavailable,
        Code::Unauthenticated => tonic::Code::Unauthenticated,
    };
    Status::new(code, refusal.message.clone())
}

/// An error of the bus itself.
pub(crate) fn of_bus(error: kiln_bus::BusError) -> Status {
    of(&error.into())
}

/// Why a log can't be read, with the field of the request that it is about.
pub(crate) fn of_read(error: ReadError) -> Status {
    let refusal = match error {
        ReadError::UnknownBuild { .. } => return Status::not_found(format!("id: {error}")),
        ReadError::Stopping(stopping) => return stopping.into(),
        ReadError::Log(error) => Refusal::from(error),
        ReadError::Bus(error) => Refusal::from(error),
    };
    let status = of(&refusal);
    match status.code() {
        tonic::Code::OutOfRange => Status::out_of_range(format!("offset: {}", status.message())),
        tonic::Code::NotFound => Status::not_found(format!("id: {}", status.message())),
        _ => status,
    }
}

impl From<Stopping> for Status {
    fn from(stopping: Stopping) -> Self {
        Self::unavailable(stopping.to_string())
    }
}

/// A field of the request that can't be taken.
pub(crate) fn invalid(field: &str, problem: impl std::fmt::Display) -> Status {
    Status::invalid_argument(format!("{field}: {problem}"))
}
