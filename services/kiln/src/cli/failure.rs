//! What can go wrong for a command, in plain words, and the exit code that says whose fault it was.

use std::error::Error;
use std::io;
use std::time::Duration;

use tonic::{Code, Status};

use super::output::printable;

/// How a command ended when nothing went wrong with the asking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Exit {
    Done,
    /// The build failed or was cancelled.
    NotBuilt,
    /// By Ctrl-C; the build goes on.
    Interrupted,
}

/// Why a command could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// The caller's: an argument, a file of theirs, an id.
    #[error("{0}")]
    Request(String),
    #[error("{doing}: {}", plain_words(status))]
    Rpc { doing: &'static str, status: Box<Status> },
    #[error("{doing}: no answer from the gateway within {} s", after.as_secs())]
    NoAnswer { doing: &'static str, after: Duration },
    #[error("can't reach the gateway at {address}: {}", printable(&innermost(source)))]
    Unreachable { address: String, source: tonic::transport::Error },
    #[error("{doing}: the stream ended before its time")]
    StreamEnded { doing: &'static str },
    #[error("{doing}: bytes {expected} to {got} are missing from what the gateway sent")]
    Gap { doing: &'static str, expected: u64, got: u64 },
    /// Who reads our standard output has gone; not a failure to the user.
    #[error("standard output was closed")]
    OutputClosed,
    #[error("{0}")]
    Bus(#[source] kiln_bus::BusError),
    #[error("can't write to standard output: {0}")]
    Output(#[source] io::Error),
}

impl Failure {
    pub(super) fn rpc(doing: &'static str, status: Status) -> Self {
        Self::Rpc { doing, status: Box::new(status) }
    }

    /// 2: the request was wrong. 3: the service could not be reached, or isn't able now. 4: it is able, and has no room
    /// for this now.
    pub(super) fn exit_code(&self) -> u8 {
        match self {
            Self::OutputClosed => 0,
            Self::Request(_) | Self::Output(_) => 2,
            Self::Rpc { status, .. } => exit_code_of(status.code()),
            Self::Bus(_)
            | Self::NoAnswer { .. }
            | Self::Unreachable { .. }
            | Self::StreamEnded { .. }
            | Self::Gap { .. } => 3,
        }
    }

    /// Whether a stream that ended so is worth asking for again: all but a refusal of the request itself, and a build that
    /// the service has lost.
    pub(super) fn may_pass(&self) -> bool {
        self.exit_code() >= 3 && !self.is_lost()
    }

    /// The service knew the build, and has lost it.
    pub(super) fn is_lost(&self) -> bool {
        matches!(self, Self::Rpc { status, .. } if status.code() == Code::DataLoss)
    }
}

fn exit_code_of(code: Code) -> u8 {
    match code {
        Code::Ok => 0,
        Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::FailedPrecondition
        | Code::OutOfRange
        | Code::PermissionDenied
        | Code::Unauthenticated
        | Code::Unimplemented => 2,
        Code::ResourceExhausted => 4,
        Code::Unavailable
        | Code::DeadlineExceeded
        | Code::Aborted
        | Code::Cancelled
        | Code::Internal
        | Code::Unknown
        | Code::DataLoss => 3,
    }
}

/// A status as a sentence: what its code means, then the service's own message.
fn plain_words(status: &Status) -> String {
    let meaning = match status.code() {
        Code::Ok => "done",
        Code::InvalidArgument => "the request is not valid",
        Code::NotFound => "not found",
        Code::AlreadyExists => "it exists already",
        Code::FailedPrecondition => "not possible as things stand",
        Code::OutOfRange => "out of range",
        Code::PermissionDenied => "not allowed",
        Code::Unauthenticated => "credentials are missing or were refused",
        Code::Unimplemented => "this gateway doesn't offer that",
        Code::Unavailable => "the service isn't able now, try again later",
        Code::DeadlineExceeded => "the service didn't answer in time",
        Code::ResourceExhausted => "a limit of the service is reached, try again later",
        Code::Aborted => "another change came first, try again",
        Code::Cancelled => "the connection was given up",
        Code::Internal => "the service failed",
        Code::Unknown => "the connection or the service failed",
        Code::DataLoss => "the service has lost data",
    };
    // A status that this side made of a transport error has the cause as its source, and says little itself.
    let detail = status.source().map_or_else(|| status.message().to_owned(), innermost);
    if detail.is_empty() { meaning.to_owned() } else { format!("{meaning}: {}", printable(&detail)) }
}

/// The cause of causes: what the operating system or the peer said.
fn innermost(error: &(dyn Error + 'static)) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exit_code_says_whose_fault_it_was() {
        for (code, exit) in [
            (Code::InvalidArgument, 2),
            (Code::NotFound, 2),
            (Code::FailedPrecondition, 2),
            (Code::OutOfRange, 2),
            (Code::PermissionDenied, 2),
            (Code::Unauthenticated, 2),
            (Code::Unimplemented, 2),
            (Code::Unavailable, 3),
            (Code::DeadlineExceeded, 3),
            (Code::ResourceExhausted, 4),
            (Code::Internal, 3),
            (Code::Unknown, 3),
        ] {
            let failure = Failure::rpc("asking", Status::new(code, "x"));
            assert_eq!((failure.exit_code(), failure.may_pass()), (exit, exit >= 3), "{code:?}");
        }
        let lost = Failure::rpc("watching", Status::data_loss("x"));
        assert_eq!((lost.exit_code(), lost.may_pass()), (3, false));
        assert_eq!(Failure::Request("x".into()).exit_code(), 2);
        assert_eq!(Failure::OutputClosed.exit_code(), 0);
    }

    #[test]
    fn a_message_is_plain_and_has_no_control_characters() {
        let status = Status::invalid_argument("source.dockerfile.path: must\x1b[31m be relative\n");
        assert_eq!(
            Failure::rpc("asking for the build", status).to_string(),
            "asking for the build: the request is not valid: source.dockerfile.path: must\\u{1b}[31m be relative\\n"
        );
        assert_eq!(Failure::rpc("asking", Status::not_found("")).to_string(), "asking: not found");
    }
}
