//! What an examination of an installation finds, in the words of whoever is to mend it. Each crate examines what it knows;
//! `kiln doctor` joins what they found.

use std::time::Duration;

use serde::Serialize;

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at: `nats`, `stream KILN_BUILDS`, `git`.
    pub part: String,
    pub verdict: Verdict,
    /// How it is.
    pub says: String,
    /// What to do, or when it goes away by itself. None where all is well.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

/// How bad it is; the worse, the greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    Ok,
    /// It could not be looked at from here, which says nothing of it.
    Unchecked,
    /// Builds are made all the same, for now.
    Warning,
    /// Builds fail, wait or are lost for it.
    Problem,
}

impl Finding {
    pub fn ok(part: impl Into<String>, says: impl Into<String>) -> Self {
        Self { part: part.into(), verdict: Verdict::Ok, says: says.into(), remedy: None }
    }

    pub fn unchecked(part: impl Into<String>, says: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::with(Verdict::Unchecked, part, says, remedy)
    }

    pub fn warning(part: impl Into<String>, says: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::with(Verdict::Warning, part, says, remedy)
    }

    pub fn problem(part: impl Into<String>, says: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::with(Verdict::Problem, part, says, remedy)
    }

    fn with(
        verdict: Verdict,
        part: impl Into<String>,
        says: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self { part: part.into(), verdict, says: says.into(), remedy: Some(remedy.into()) }
    }
}

impl Verdict {
    /// As it stands in a table.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Unchecked => "not checked",
            Self::Warning => "warning",
            Self::Problem => "problem",
        }
    }
}

/// A time as it is told: `12 s`, `4 min`, `3 h`, `2 days`.
pub fn spoken(time: Duration) -> String {
    match time.as_secs() {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds @ 120..7_200 => format!("{} min", seconds / 60),
        seconds @ 7_200..172_800 => format!("{} h", seconds / 3_600),
        seconds => format!("{} days", seconds / 86_400),
    }
}
