//! Errors of the bus as gRPC's: the one place where they are mapped.

use kiln_bus::logs::LogError;
use kiln_contract::error::{Code, Refusal};
use tonic::Status;

use crate::cut::Cut;
use crate::log::ReadError;

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
    match error {
        ReadError::UnknownBuild { .. } | ReadError::NotBegun { .. } | ReadError::Expired { .. } => {
            Status::not_found(format!("id: {error}"))
        }
        ReadError::Log(error @ (LogError::Discarded { .. } | LogError::Beyond { .. })) => {
            Status::out_of_range(format!("offset: {error}"))
        }
        ReadError::Log(error) => of(&error.into()),
        ReadError::Bus(error) => of_bus(error),
        ReadError::Cut(cut) => cut.into(),
    }
}

impl From<Cut> for Status {
    fn from(cut: Cut) -> Self {
        match cut {
            Cut::Stopping | Cut::BusAway(_) => Self::unavailable(cut.to_string()),
            Cut::Lost(_) => Self::data_loss(format!("id: {cut}")),
        }
    }
}

/// A field of the request that can't be taken.
pub(crate) fn invalid(field: &str, problem: impl std::fmt::Display) -> Status {
    Status::invalid_argument(format!("{field}: {problem}"))
}
