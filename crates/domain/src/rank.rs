//! Who tries first: live members are ranked for each build by rendezvous hashing, so that not all try at once
//! and the order changes little as members come and go.

use sha2::{Digest as _, Sha256};

use crate::id::InstanceId;

/// How many of `live` come before `me` for `item`; 0 tries first. `me` need not be among `live`.
pub fn rank<'a>(item: &str, me: &InstanceId, live: impl IntoIterator<Item = &'a InstanceId>) -> usize {
    let mine = weight(item, me.as_str());
    live.into_iter()
        .filter(|other| *other != me && (weight(item, other.as_str()), *other) > (mine, me))
        .count()
}

/// `members` in the order in which they are to be tried for `item`: the same everywhere, and little changed by one that
/// comes or goes.
pub fn ranked<'a>(item: &str, members: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
    let mut ranked: Vec<_> = members.into_iter().collect();
    ranked.sort_by_cached_key(|member| std::cmp::Reverse((weight(item, member), *member)));
    ranked
}

fn weight(item: &str, member: &str) -> [u8; 32] {
    Sha256::new().chain_update(item).chain_update([0]).chain_update(member).finalize().into()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_live_have_distinct_ranks(item in "[a-z0-9-]{1,45}", members in proptest::collection::btree_set(0u64..1000, 1..12)) {
            let live: Vec<_> = members.iter().map(|n| InstanceId::new("x", *n).unwrap()).collect();
            let ranks: BTreeSet<_> = live.iter().map(|me| rank(&item, me, &live)).collect();
            prop_assert_eq!(ranks, (0..live.len()).collect::<BTreeSet<_>>());
        }

        #[test]
        fn who_goes_moves_nobody_else(item in "[a-z]{1,9}", members in proptest::collection::btree_set("[a-z]{1,9}", 1..9)) {
            let all = ranked(&item, members.iter().map(String::as_str));
            let gone = all[0];
            let rest = ranked(&item, members.iter().map(String::as_str).filter(|member| *member != gone));
            prop_assert_eq!(&all[1..], &rest[..]);
        }
    }
}
