//! The errors that cross services: a closed set of codes, and a sentence for the user.

/// What kind of error an answer is. The numbers stand on the wire; they are gRPC's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Code {
    InvalidArgument = 3,
    DeadlineExceeded = 4,
    NotFound = 5,
    PermissionDenied = 7,
    ResourceExhausted = 8,
    FailedPrecondition = 9,
    Aborted = 10,
    OutOfRange = 11,
    Internal = 13,
    Unavailable = 14,
    Unauthenticated = 16,
}

impl Code {
    const ALL: [Self; 11] = [
        Self::InvalidArgument,
        Self::DeadlineExceeded,
        Self::NotFound,
        Self::PermissionDenied,
        Self::ResourceExhausted,
        Self::FailedPrecondition,
        Self::Aborted,
        Self::OutOfRange,
        Self::Internal,
        Self::Unavailable,
        Self::Unauthenticated,
    ];

    pub fn number(self) -> u16 {
        self as u16
    }

    /// A number of another release is `Internal`.
    pub fn from_number(number: usize) -> Self {
        Self::ALL.into_iter().find(|code| usize::from(code.number()) == number).unwrap_or(Self::Internal)
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Self::InvalidArgument => "invalid_argument",
            Self::DeadlineExceeded => "deadline_exceeded",
            Self::NotFound => "not_found",
            Self::PermissionDenied => "permission_denied",
            Self::ResourceExhausted => "resource_exhausted",
            Self::FailedPrecondition => "failed_precondition",
            Self::Aborted => "aborted",
            Self::OutOfRange => "out_of_range",
            Self::Internal => "internal",
            Self::Unavailable => "unavailable",
            Self::Unauthenticated => "unauthenticated",
        }
    }
}

/// An answer that is an error. Its message is for the user: it names what was wrong, and holds no secret.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    pub code: Code,
    pub message: String,
}

impl Refusal {
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

impl From<kiln_domain::source::InvalidField> for Refusal {
    fn from(error: kiln_domain::source::InvalidField) -> Self {
        Self::new(Code::InvalidArgument, error.to_string())
    }
}
