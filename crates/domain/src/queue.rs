//! The order in which waiting builds get a free slot.

use std::collections::HashMap;
use std::hash::Hash;

/// The waiting builds in the order of their turns, as places in `waiting`: owners with the fewest running come first, then
/// who waits longest. `waiting` are the builds' owners in the order of their arrival; `running` those of the builds that
/// are claimed. Each turn is given with how many builds of its owner run before it.
///
/// It is the order if nothing ends and nothing arrives meanwhile. Costs n log n.
pub fn turns<O: Eq + Hash>(waiting: &[O], running: impl IntoIterator<Item = O>) -> Vec<(usize, usize)> {
    let mut load: HashMap<O, usize> = HashMap::new();
    for owner in running {
        *load.entry(owner).or_default() += 1;
    }
    let mut ahead: HashMap<&O, usize> = HashMap::new();
    let mut turns: Vec<(usize, usize)> = waiting
        .iter()
        .enumerate()
        .map(|(place, owner)| {
            let before = ahead.entry(owner).or_insert_with(|| load.get(owner).copied().unwrap_or_default());
            let turn = (place, *before);
            *before += 1;
            turn
        })
        .collect();
    // Taking the least loaded owner again and again is sorting by the load that each build finds: it only grows.
    turns.sort_by_key(|(place, before)| (*before, *place));
    turns
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_take_turns_and_each_keeps_its_order() {
        for (waiting, running, expected) in [
            ("", "", &[][..]),
            ("aaa", "", &[0, 1, 2]),
            ("aaab", "", &[0, 3, 1, 2]),
            ("aaab", "b", &[0, 1, 3, 2]),
            ("aaab", "aa", &[3, 0, 1, 2]),
            ("abcabc", "c", &[0, 1, 2, 3, 4, 5]),
            ("ccab", "c", &[2, 3, 0, 1]),
        ] {
            let owners: Vec<char> = waiting.chars().collect();
            let order: Vec<usize> =
                turns(&owners, running.chars()).into_iter().map(|(place, _)| place).collect();
            assert_eq!(order, expected, "{waiting} behind {running}");
        }
    }
}
