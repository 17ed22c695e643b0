//! Which form of a log a client asks for.

use http::{HeaderMap, header};

/// Whether the client asks for Server-Sent Events by name. A wildcard doesn't: that is what curl sends.
pub(super) fn wants_events(headers: &HeaderMap) -> bool {
    headers
        .get_all(header::ACCEPT)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|range| {
            let mut parts = range.split(';').map(str::trim);
            let is_events = parts.next().is_some_and(|kind| kind.eq_ignore_ascii_case("text/event-stream"));
            let refused = |part: &str| {
                part.strip_prefix("q=").and_then(|q| q.parse::<f32>().ok()).is_some_and(|q| q == 0.0)
            };
            is_events && !parts.any(refused)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_names_events_gets_them() {
        for (accept, expected) in [
            ("text/event-stream", true),
            ("text/html, Text/Event-Stream; q=0.9", true),
            ("text/event-stream;q=0", false),
            ("text/event-stream;q=0.000, */*", false),
            ("*/*", false),
            ("text/plain", false),
        ] {
            let headers = HeaderMap::from_iter([(header::ACCEPT, accept.parse().unwrap())]);
            assert_eq!(wants_events(&headers), expected, "{accept}");
        }
        assert!(!wants_events(&HeaderMap::new()));
    }
}
