//! A build's id as the user gives it: whole, or so much of its beginning as no other build shares.

use kiln_domain::id::BuildId;
use kiln_domain::limits::truncated;
use kiln_proto::kiln_v1::{Build, ListBuildsRequest};

use super::connection::{Gateway, answer};
use super::failure::Failure;
use super::json::state_word;
use super::output::printable;

const LENGTH: usize = 45;
const PAGE: u32 = 500;
/// So many candidates are shown when a prefix fits several.
const SHOWN: usize = 10;

/// What was given for an id.
#[derive(Debug, PartialEq, Eq)]
enum Given {
    Whole,
    Prefix,
    /// Neither an id nor the beginning of one.
    Nothing,
}

/// The whole id of the build meant. A whole one is taken as it is; for a prefix the builds are searched.
pub(super) async fn find(gateway: &Gateway, given: &str) -> Result<String, Failure> {
    match classify(given) {
        Given::Whole => Ok(given.to_owned()),
        Given::Nothing => Err(Failure::Request(format!(
            "`{}` is no build's id, nor the beginning of one",
            printable(&truncated(given.to_owned(), 80))
        ))),
        Given::Prefix => choose(given, &candidates(gateway, given).await?),
    }
}

fn classify(given: &str) -> Given {
    let fits = |b: u8| b == b'-' || b.is_ascii_lowercase() || b.is_ascii_digit();
    if given.parse::<BuildId>().is_ok() {
        Given::Whole
    } else if (1..LENGTH).contains(&given.len()) && given.bytes().all(fits) {
        Given::Prefix
    } else {
        Given::Nothing
    }
}

/// The builds whose ids begin so, newest first; no more than tell that there are too many.
async fn candidates(gateway: &Gateway, prefix: &str) -> Result<Vec<Build>, Failure> {
    let mut found = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = ListBuildsRequest { page_size: PAGE, page_token, ..ListBuildsRequest::default() };
        let page = answer("looking for the build", gateway.builds().list_builds(request)).await?;
        found.extend(page.builds.into_iter().filter(|build| build.id.starts_with(prefix)));
        if page.next_page_token.is_empty() || found.len() > SHOWN {
            return Ok(found);
        }
        page_token = page.next_page_token;
    }
}

fn choose(prefix: &str, found: &[Build]) -> Result<String, Failure> {
    // A build that is met twice because the list moved between two pages is one build.
    let mut distinct: Vec<&Build> = Vec::new();
    for build in found {
        if !distinct.iter().any(|other| other.id == build.id) {
            distinct.push(build);
        }
    }
    match distinct.as_slice() {
        [] => Err(Failure::Request(format!("no build's id begins with `{prefix}`"))),
        [build] => Ok(build.id.clone()),
        several => {
            let mut message = format!("several builds' ids begin with `{prefix}`; which one?");
            for build in several.iter().take(SHOWN) {
                message.push_str(&format!("\n  {}  {}", printable(&build.id), state_word(build.state)));
            }
            if several.len() > SHOWN {
                message.push_str("\n  …");
            }
            Err(Failure::Request(message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0123456789abcdef-0123456789abcdef-abcdefghij0";

    #[test]
    fn whole_prefix_or_nothing() {
        assert_eq!(classify(ID), Given::Whole);
        assert_eq!(classify(&ID[..44]), Given::Prefix);
        assert_eq!(classify("0"), Given::Prefix);
        for given in ["", "../x", "*", ">", "ABC", "a b", &format!("{ID}0"), &"x".repeat(10_240)] {
            assert_eq!(classify(given), Given::Nothing, "{given:.20}");
        }
    }

    #[test]
    fn one_none_or_several() {
        let builds = |ids: &[&str]| -> Vec<Build> {
            ids.iter().map(|id| Build { id: (*id).into(), state: 2, ..Build::default() }).collect()
        };
        assert_eq!(choose("ab", &builds(&["abc"])).unwrap(), "abc");
        assert_eq!(choose("ab", &builds(&["abc", "abc"])).unwrap(), "abc");
        assert_eq!(choose("ab", &[]).unwrap_err().to_string(), "no build's id begins with `ab`");
        assert_eq!(
            choose("ab", &builds(&["abc", "abd"])).unwrap_err().to_string(),
            "several builds' ids begin with `ab`; which one?\n  abc  running\n  abd  running"
        );
        let ids: Vec<String> = (0..11).map(|n| format!("ab{n}")).collect();
        let many = choose("ab", &builds(&ids.iter().map(String::as_str).collect::<Vec<_>>())).unwrap_err();
        assert_eq!(many.exit_code(), 2);
        assert!(many.to_string().ends_with("ab9  running\n  …"), "{many}");
    }
}
