//! Whose turn it is: the queue is the view's builds without a claim, taken by turns between owners.

use kiln_domain::queue;
use kiln_domain::record::Record;

/// The next builds to claim, at most `slots`: owners with the fewest running come first, then who waits longest.
/// `waiting` is in the order of their arrival; `running` are the builds that are claimed by anybody. No owner is given
/// more than `owner_limit`.
pub(crate) fn next<'a>(
    waiting: &[&'a Record],
    running: &[&Record],
    slots: usize,
    owner_limit: usize,
) -> Vec<&'a Record> {
    let owners: Vec<&str> = waiting.iter().map(|record| record.owner.as_str()).collect();
    let turns = queue::turns(&owners, running.iter().map(|record| record.owner.as_str()));
    let allowed = turns.into_iter().filter(|(_, before)| *before < owner_limit);
    allowed.filter_map(|(place, _)| waiting.get(place).copied()).take(slots).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Builds in the order of their arrival, by their owners.
    fn records(owners: &[u8]) -> Vec<Record> {
        let record = |(n, owner): (usize, &u8)| {
            let mut record = kiln_testkit::records::queued(&n.to_string(), [0; 10]).unwrap();
            record.owner = owner.to_string();
            record
        };
        owners.iter().enumerate().map(record).collect()
    }

    #[test]
    fn five_hundred_of_one_owner_cost_another_one_turn() {
        let mut owners = vec![1; 500];
        owners.push(2);
        let records = records(&owners);
        let waiting: Vec<&Record> = records.iter().collect();
        let turns = next(&waiting, &[], 2, 100);
        assert_eq!(turns.iter().map(|record| record.owner.as_str()).collect::<Vec<_>>(), ["1", "2"]);
        let running: Vec<&Record> = records.iter().take(1).collect();
        assert_eq!(next(&waiting, &running, 1, 100)[0].owner, "2", "who has the fewest running comes first");
        assert!(next(&waiting, &running, 9, 1).iter().all(|record| record.owner == "2"), "an owner's limit");
    }

    proptest! {
        #[test]
        fn no_slot_stays_free_and_nobody_is_passed_over(
            owners in proptest::collection::vec(0u8..4, 0..40),
            running in proptest::collection::vec(0u8..4, 0..10),
            slots in 0usize..12,
        ) {
            let (owners, running) = (records(&owners), records(&running));
            let (waiting, running): (Vec<&Record>, Vec<&Record>) = (owners.iter().collect(), running.iter().collect());
            let turns = next(&waiting, &running, slots, usize::MAX);
            prop_assert_eq!(turns.len(), slots.min(waiting.len()));
            // Within an owner the order is that of arrival.
            for owner in ["0", "1", "2", "3"] {
                let of = |records: &[&Record]| records.iter().filter(|r| r.owner == owner).map(|r| r.id.clone()).collect::<Vec<_>>();
                prop_assert!(of(&waiting).starts_with(&of(&turns)));
            }
        }
    }
}
