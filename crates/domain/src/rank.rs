//! Who tries first: live members are ranked for each build by rendezvous hashing, so that not all try at once
//! and the order changes little as members come and go.

use sha2::{Digest as _, Sha256};

use crate::id::InstanceId;

/// How many of `live` come before `me` for `item`; 0 tries first. `me` need not be among `live`.
pub fn rank<'a>(item: &str, me: &InstanceId, live: impl IntoIterator<Item = &'a InstanceId>) -> usize {
    let mine = weight(item, me);
    live.into_iter().filter(|other| *other != me && (weight(item, other), *other) > (mine, me)).count()
}

fn weight(item: &str, member: &InstanceId) -> [u8; 32] {
    Sha256::new().chain_update(item).chain_update([0]).chain_update(member.as_str()).finalize().into()
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
    }
}
