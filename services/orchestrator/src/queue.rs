//! Whose turn it is: the queue is the view's builds without a claim, taken by turns between owners.

use std::collections::HashMap;

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
    let mut busy: HashMap<&str, usize> = HashMap::new();
    for record in running {
        *busy.entry(record.owner.as_str()).or_default() += 1;
    }
    let mut left: Vec<&Record> = waiting.to_vec();
    let mut taken = Vec::new();
    while taken.len() < slots {
        let load = |record: &Record| busy.get(record.owner.as_str()).copied().unwrap_or_default();
        let next = left
            .iter()
            .enumerate()
            .filter(|(_, record)| load(record) < owner_limit)
            .min_by_key(|(place, record)| (load(record), *place))
            .map(|(place, _)| place);
        let Some(next) = next else { break };
        let record = left.remove(next);
        *busy.entry(record.owner.as_str()).or_default() += 1;
        taken.push(record);
    }
    taken
}
