//! The model: Kiln's protocol, checked by trying everything that two of each can do to one build.
//!
//! Two models, since a log is written by others than a build is held by: [`lifecycle`] (journal, leases, claims, runs,
//! registry) stands on `kiln_domain`'s own rules, [`log`] on the design's section of that name. Sleep needs no action of
//! its own: any process may wait before any step, for as long as it likes; `Lapse` is what makes a sleep tell.
//!
//! What it found wrong in the first design, each shown by a test below that takes the repair out:
//!
//! 1. *`revoked` only before `retrying`.* A builder that began late, or an earlier holder that slept before its start,
//!    went on after `failed` or `cancelled`. Now a holder revokes a run before it judges it, whatever the end will be.
//! 2. *Revoked without looking again.* Between "the lock is free" and the marker a late builder passed its look. Now the
//!    holder waits for the lock after it has revoked, and only then reads outcome and digest and asks the registry.
//! 3. *A second process of the same run* overwrote the digest that the first one, dead by then, had recorded before a PUT
//!    that was still in flight. Now a recorded digest ends a run for later processes, as an outcome does (an engine that
//!    never starts a run twice needs no such look).
//! 4. *An end that skips all that*: a holder that can't start the build, its time in the queue being up, appended `failed`
//!    while a run that was started before it worked. Now every end of a claimed build goes the same way.
//! 5. *The digest, where a run's folder was lost and the run begun again*, was another process's than the one that had
//!    pushed. Now, asked for the last time, any image that was not there before is the build's.
//!
//! And what it found to be no pillar: with 1 and 2, the builder's second look for `revoked` only saves work.

mod builder;
mod faults;
mod holder;
mod journal;
mod lifecycle;
mod log;
mod relay;
mod rules;

use std::hash::Hash;
use std::time::Instant;

use kiln_domain::transition::EVENTS;
use stateright::{Checker, DiscoveryClassification, Expectation, HasDiscoveries, Model};

use self::faults::{COMMON, Fault, Faults};
use self::lifecycle::Lifecycle;
use self::log::Log;
use self::rules::{KEPT, Rules};

/// A run's data may be lost before the build ends (a pod that is gone), which no local engine does.
const LOSSY: &[Fault] = &[Fault::Removal, Fault::Lapse];

fn lifecycle(rules: Rules, kinds: &'static [Fault], left: u8) -> Lifecycle {
    Lifecycle { rules, faults: Faults { kinds, left }, cancel: true, reproducible: false }
}

/// What a visit of every state, or of those before the first violation, came to.
struct Visit {
    /// What does not hold, and after which steps.
    violation: Option<String>,
    /// What never happened.
    missed: Vec<&'static str>,
}

fn visit<M>(what: &str, model: M) -> Visit
where
    M: Model + Send + Sync + 'static,
    M::State: Clone + PartialEq + Hash + Send + Sync + std::fmt::Debug + 'static,
    M::Action: Clone + PartialEq + Send + Sync + std::fmt::Debug + 'static,
{
    #[expect(clippy::disallowed_methods, reason = "for the test's output alone")]
    let begun = Instant::now();
    let checker = model.checker().threads(2).finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    println!(
        "{what}: {} states, {} of them different, {} deep, in {:.1?}",
        checker.state_count(),
        checker.unique_state_count(),
        checker.max_depth(),
        begun.elapsed()
    );
    let discoveries = checker.discoveries();
    let properties = checker.model().properties();
    let sometimes = properties.iter().filter(|property| property.expectation == Expectation::Sometimes);
    let missed =
        sometimes.map(|property| property.name).filter(|name| !discoveries.contains_key(name)).collect();
    let counterexample = discoveries.into_iter().find(|(name, _)| {
        matches!(checker.discovery_classification(name), DiscoveryClassification::Counterexample)
    });
    let violation = counterexample.map(|(name, path)| {
        let steps: Vec<_> = path.into_actions().iter().map(|step| format!("  {step:?}")).collect();
        format!("`{name}` does not hold after\n{}", steps.join("\n"))
    });
    Visit { violation, missed }
}

/// All of the properties, among them that what the model is about can happen.
fn assert_complete(visit: Visit) {
    assert_eq!(visit.missed, Vec::<&str>::new(), "never happened");
    assert_holds(visit);
}

fn assert_holds(visit: Visit) {
    if let Some(story) = visit.violation {
        panic!("{story}");
    }
}

/// With a rule taken out something gives way, at the latest with two faults.
fn assert_load_bearing<M>(what: &str, model: impl Fn(u8) -> M)
where
    M: Model + Send + Sync + 'static,
    M::State: Clone + PartialEq + Hash + Send + Sync + std::fmt::Debug + 'static,
    M::Action: Clone + PartialEq + Send + Sync + std::fmt::Debug + 'static,
{
    let story = (0..=2)
        .find_map(|faults| visit(&format!("without {what}, {faults} faults"), model(faults)).violation);
    println!("without {what}: {}\n", story.unwrap_or_else(|| panic!("nobody misses {what}")));
}

#[test]
fn a_build_ends_once_and_as_what_it_was() {
    assert_complete(visit("a build, 2 faults", lifecycle(KEPT, COMMON, 2)));
}

#[test]
fn a_build_whose_runs_can_be_lost() {
    assert_holds(visit("a build that can be lost, 2 faults", lifecycle(KEPT, LOSSY, 2)));
}

/// A copy, or a forced build that makes the same image again: the tag alone doesn't tell whether it was pushed.
#[test]
fn a_build_that_makes_the_image_that_was_there() {
    let model = |rules, left| Lifecycle { reproducible: true, ..lifecycle(rules, COMMON, left) };
    assert_holds(visit("a reproducible build, 1 fault", model(KEPT, 1)));
    let rules = Rules { recorded_digest: false, ..KEPT };
    assert_load_bearing("the recorded digest", |left| model(rules.clone(), left));
}

/// What may be left out where a run's data can't be lost: a run with an outcome needs no revocation (its removal revokes
/// it), what the run left tells whose the image is, and the builder's second look saves work alone.
#[test]
fn what_is_no_pillar() {
    let rules = Rules { revoked_whatever_is_left: false, any_new_image_is_ours: false, ..KEPT };
    let rules = Rules { revoked_check_before_push: false, ..rules };
    assert_holds(visit("without the spare rules, 1 fault", lifecycle(rules, COMMON, 1)));
}

#[test]
fn each_rule_of_a_build_is_load_bearing() {
    let mutations = [
        ("the expected sequence", Rules { expected_sequence: false, ..KEPT }),
        ("append first, act after", Rules { append_first_act_after: false, ..KEPT }),
        ("the builder's look for `revoked`", Rules { revoked_check: false, ..KEPT }),
        ("the end of a run that has recorded", Rules { recorded_run_is_over: false, ..KEPT }),
        ("`revoked` before every judgement", Rules { revoked_first: false, ..KEPT }),
        ("the wait for the lock", Rules { lock_awaited: false, ..KEPT }),
        ("the second question", Rules { asked_again: false, ..KEPT }),
        ("a judgement before every end", Rules { every_end_is_judged: false, ..KEPT }),
    ];
    for (what, rules) in mutations {
        assert_load_bearing(what, |left| lifecycle(rules.clone(), COMMON, left));
    }
    let lossy = [
        ("`revoked` whatever is left", Rules { revoked_whatever_is_left: false, ..KEPT }),
        ("a new image is ours", Rules { any_new_image_is_ours: false, ..KEPT }),
        ("no short cut but for who is alone", Rules { asked_unless_alone: false, ..KEPT }),
    ];
    for (what, rules) in lossy {
        assert_load_bearing(what, |left| lifecycle(rules.clone(), LOSSY, left));
    }
}

/// Of each kind of append, but two that the model has no rivals for: `queued` and `joined`.
#[test]
fn each_expected_sequence_is_load_bearing() {
    let kinds = &[Fault::Release, Fault::LostAck, Fault::Overlooked];
    for event in EVENTS.into_iter().filter(|event| !["queued", "joined"].contains(event)) {
        let rules = Rules { unsequenced: Some(event), ..KEPT };
        assert_load_bearing(&format!("the sequence of `{event}`"), |left| {
            lifecycle(rules.clone(), kinds, left)
        });
    }
}

#[test]
fn a_log_is_an_exact_prefix_and_then_whole() {
    let faults = Faults { kinds: COMMON, left: 2 };
    assert_complete(visit("a log, 2 faults", Log { rules: KEPT, faults }));
}

#[test]
fn each_rule_of_a_log_is_load_bearing() {
    let mutations = [
        ("the writer's sequence", Rules { writer_cas: false, ..KEPT }),
        ("the cursor with the chunk", Rules { source_cursor_with_chunk: false, ..KEPT }),
        ("the cursor behind the masker", Rules { cursor_behind_masker: false, ..KEPT }),
        ("the output until its log is complete", Rules { output_kept_until_complete: false, ..KEPT }),
    ];
    for (what, rules) in mutations {
        assert_load_bearing(what, |left| Log {
            rules: rules.clone(),
            faults: Faults { kinds: COMMON, left },
        });
    }
}
