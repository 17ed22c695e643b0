//! Listing builds: newest first, page by page.

use base64::Engine as _;
use kiln_bus::journal::Entry;
use kiln_domain::id::ImageKey;
use kiln_domain::record::State;
use kiln_proto::kiln_v1 as api;
use tonic::Status;

use crate::convert;
use crate::status::invalid;

const DEFAULT_PAGE: usize = 100;
const LARGEST_PAGE: usize = 1_000;

/// Which builds, and from where on.
#[derive(Debug)]
pub(crate) struct Query {
    states: Vec<State>,
    owner: String,
    target_ref: String,
    pub(crate) limit: usize,
    /// Only builds before this place.
    pub(crate) before: Option<u64>,
}

impl Query {
    pub(crate) fn new(request: api::ListBuildsRequest) -> Result<Self, Status> {
        const ALL: [State; 5] =
            [State::Queued, State::Running, State::Succeeded, State::Failed, State::Cancelled];
        let mut states = Vec::new();
        for number in &request.states {
            let state = ALL.into_iter().find(|state| i32::from(convert::state(*state)) == *number);
            states.push(state.ok_or_else(|| invalid("states", format!("{number} is no state of a build")))?);
        }
        let limit = match usize::try_from(request.page_size).unwrap_or(usize::MAX) {
            0 => DEFAULT_PAGE,
            size if size <= LARGEST_PAGE => size,
            size => return Err(invalid("page_size", format!("{size} is above {LARGEST_PAGE}"))),
        };
        let mut query = Self { states, owner: request.owner, target_ref: request.r#ref, limit, before: None };
        if !request.page_token.is_empty() {
            query.before = Some(query.place_of(&request.page_token).ok_or_else(|| {
                invalid("page_token", "was not given by this service for this query; list from the start")
            })?);
        }
        Ok(query)
    }

    pub(crate) fn wants(&self, entry: &Entry) -> bool {
        let record = &entry.record;
        (self.states.is_empty() || self.states.contains(&record.state))
            && (self.owner.is_empty() || record.owners().any(|owner| owner == self.owner))
            && (self.target_ref.is_empty() || record.target_ref == self.target_ref)
    }

    /// The token of the page after a place. It holds for the same query only.
    pub(crate) fn token(&self, place: u64) -> String {
        base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(format!("{place}.{}", self.checksum(place)))
    }

    fn place_of(&self, token: &str) -> Option<u64> {
        let text = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(token).ok()?;
        let text = String::from_utf8(text).ok()?;
        let (place, checksum) = text.split_once('.')?;
        let place = place.parse().ok()?;
        (checksum == self.checksum(place)).then_some(place)
    }

    fn checksum(&self, place: u64) -> String {
        let states: Vec<_> = self.states.iter().map(|state| state.as_str()).collect();
        let text = format!("{place}\n{}\n{}\n{}", states.join(","), self.owner, self.target_ref);
        ImageKey::of(&text).as_str().chars().take(8).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_good_for_its_query_alone() {
        let ask = |owner: &str, page_token: &str| {
            Query::new(api::ListBuildsRequest {
                owner: owner.into(),
                page_token: page_token.into(),
                ..Default::default()
            })
        };
        let token = ask("ann", "").unwrap().token(42);
        assert_eq!(ask("ann", &token).unwrap().before, Some(42));
        for (owner, token) in
            [("bob", token.as_str()), ("ann", "made-up"), ("ann", "NDIuMDAwMDAwMDA"), ("ann", "é")]
        {
            let status = ask(owner, token).unwrap_err();
            assert_eq!(status.code(), tonic::Code::InvalidArgument);
            assert!(status.message().starts_with("page_token: "), "{}", status.message());
        }
    }

    #[test]
    fn sizes_and_states_are_checked() {
        let size = |page_size| Query::new(api::ListBuildsRequest { page_size, ..Default::default() });
        assert_eq!(size(0).unwrap().limit, DEFAULT_PAGE);
        assert_eq!(size(1000).unwrap().limit, 1000);
        assert!(size(1001).unwrap_err().message().starts_with("page_size: "));
        let state = |state| Query::new(api::ListBuildsRequest { states: vec![state], ..Default::default() });
        assert!(state(1).is_ok() && state(0).is_err() && state(99).is_err());
    }
}
