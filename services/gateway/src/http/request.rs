//! What a request for a log asks, in its query and its headers.

use http::{HeaderMap, HeaderName, HeaderValue, header};
use kiln_bus::logs::{Extent, Start};
use url::form_urlencoded;

use crate::http::problem::Problem;

/// The id of the last event that an interrupted client has seen.
const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

/// `?follow`, `?offset=N` or `?tail=N`: what BuildLogs has in its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Query {
    pub(super) follow: bool,
    /// `None` where none is given.
    pub(super) start: Option<Start>,
}

/// One range of bytes, as RFC 9110 (14.1.2) has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Range {
    From(u64),
    /// The last one is part of it.
    Between(u64, u64),
    Last(u64),
}

/// Where an interrupted event stream goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Resume {
    At(u64),
    /// The end was told.
    Ended,
}

impl Query {
    pub(super) fn parse(query: &str) -> Result<Self, Problem> {
        let mut parsed = Self { follow: false, start: None };
        for (name, value) in form_urlencoded::parse(query.as_bytes()) {
            let number = || value.parse().map_err(|_| Problem::invalid(&name, "must be a number of bytes"));
            let start = match &*name {
                "follow" => {
                    parsed.follow = match &*value {
                        "" | "1" | "true" => true,
                        "0" | "false" => false,
                        _ => return Err(Problem::invalid("follow", "must be true, false or left empty")),
                    };
                    continue;
                }
                "offset" => Start::Offset(number()?),
                "tail" => Start::Tail(number()?),
                _ => {
                    return Err(Problem::invalid(
                        &name,
                        "is not known; there are `follow`, `offset` and `tail`",
                    ));
                }
            };
            if parsed.start.replace(start).is_some() {
                return Err(Problem::invalid(&name, "there is a place to begin at already"));
            }
        }
        Ok(parsed)
    }
}

impl Range {
    /// The range that is asked for. One that isn't understood, and several at once, are as none: RFC 9110 (14.2) lets a
    /// server answer with the whole then.
    pub(super) fn asked(headers: &HeaderMap) -> Option<Self> {
        let text = headers.get(header::RANGE).map(HeaderValue::to_str)?.ok()?;
        let (unit, range) = text.split_once('=')?;
        if !unit.trim().eq_ignore_ascii_case("bytes") {
            return None;
        }
        let (first, last) = range.trim().split_once('-')?;
        match (first, last) {
            ("", last) => Some(Self::Last(number(last)?)),
            (first, "") => Some(Self::From(number(first)?)),
            (first, last) => {
                let (first, last) = (number(first)?, number(last)?);
                (first <= last).then_some(Self::Between(first, last))
            }
        }
    }

    /// From which byte to before which; none of which is there: `None`.
    pub(super) fn within(self, there: Extent) -> Option<(u64, u64)> {
        let (first, end) = match self {
            Self::From(first) => (first, there.end),
            Self::Between(first, last) => (first, last.saturating_add(1).min(there.end)),
            Self::Last(count) => (there.end.saturating_sub(count).max(there.first), there.end),
        };
        (first < end).then_some((first, end))
    }
}

impl Resume {
    pub(super) fn asked(headers: &HeaderMap) -> Result<Option<Self>, Problem> {
        let Some(value) = headers.get(LAST_EVENT_ID) else { return Ok(None) };
        match value.to_str().unwrap_or_default() {
            "" => Ok(None),
            super::events::END => Ok(Some(Self::Ended)),
            offset => match number(offset) {
                Some(offset) => Ok(Some(Self::At(offset))),
                None => Err(Problem::invalid("Last-Event-ID", "is no id that this log's events have")),
            },
        }
    }
}

/// Digits alone: `parse` would take a sign, too.
fn number(text: &str) -> Option<u64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_says_where_to_begin_and_whether_to_follow() {
        let query = |follow, start| Some(Query { follow, start });
        for (text, expected) in [
            ("", query(false, None)),
            ("follow", query(true, None)),
            ("follow=true&offset=17", query(true, Some(Start::Offset(17)))),
            ("tail=3&follow=0", query(false, Some(Start::Tail(3)))),
            ("follow=yes", None),
            ("offset=x", None),
            ("offset=-1", None),
            ("offset=1&tail=1", None),
            ("folow", None),
        ] {
            assert_eq!(Query::parse(text).ok(), expected, "{text}");
        }
    }

    #[test]
    fn a_range_is_one_of_three_forms_or_none() {
        for (text, expected) in [
            ("bytes=0-", Some(Range::From(0))),
            ("Bytes = 2-5", Some(Range::Between(2, 5))),
            ("bytes=-7", Some(Range::Last(7))),
            ("bytes=5-2", None),
            ("bytes=0-1,4-5", None),
            ("bytes=+1-2", None),
            ("bytes=-", None),
            ("bytes=a-b", None),
            ("bytes=18446744073709551616-", None),
            ("lines=1-2", None),
            ("1-2", None),
        ] {
            let headers = HeaderMap::from_iter([(header::RANGE, text.parse().unwrap())]);
            assert_eq!(Range::asked(&headers), expected, "{text}");
        }
        assert_eq!(Range::asked(&HeaderMap::new()), None);
    }

    #[test]
    fn a_range_is_cut_to_what_is_there() {
        let there = Extent { first: 10, end: 100, complete: true };
        for (range, expected) in [
            (Range::From(10), Some((10, 100))),
            (Range::From(99), Some((99, 100))),
            (Range::From(100), None),
            // Discarded: that is said by who reads it.
            (Range::From(3), Some((3, 100))),
            (Range::Between(20, 20), Some((20, 21))),
            (Range::Between(20, u64::MAX), Some((20, 100))),
            (Range::Between(100, 200), None),
            (Range::Last(1), Some((99, 100))),
            (Range::Last(1_000), Some((10, 100))),
            (Range::Last(0), None),
        ] {
            assert_eq!(range.within(there), expected, "{range:?}");
        }
    }

    #[test]
    fn an_interrupted_stream_says_where_it_was() {
        for (id, expected) in [
            ("", Some(None)),
            ("0", Some(Some(Resume::At(0)))),
            ("4096", Some(Some(Resume::At(4096)))),
            ("end", Some(Some(Resume::Ended))),
            ("+1", None),
            ("later", None),
        ] {
            let headers = HeaderMap::from_iter([(LAST_EVENT_ID, id.parse().unwrap())]);
            assert_eq!(Resume::asked(&headers).ok(), expected, "{id}");
        }
    }
}
