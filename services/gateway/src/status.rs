//! Errors of the bus as gRPC's: the one place where they are mapped.

use kiln_contract::error::{Code, Refusal};
use kiln_domain::id::BuildId;
use tonic::Status;

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

/// A build that was known, and that the journal has lost.
pub(crate) fn lost(id: &BuildId) -> Status {
    Status::data_loss(format!(
        "id: build {id} is lost: the journal was deleted, emptied or restored; its builder is ended, ask for the image again"
    ))
}

/// A field of the request that can't be taken.
pub(crate) fn invalid(field: &str, problem: impl std::fmt::Display) -> Status {
    Status::invalid_argument(format!("{field}: {problem}"))
}
