//! The model: Kiln's protocol, checked by trying everything.

mod builder;
mod faults;
mod holder;
mod journal;
mod lifecycle;
mod log;
mod relay;

use stateright::{Checker, HasDiscoveries, Model};

use self::faults::{Fault, Faults};
use self::lifecycle::Lifecycle;

/// The rules that the protocol stands on; each can be taken out.
#[derive(Clone, Debug)]
struct Rules {
    expected_sequence: bool,
    unsequenced: Option<&'static str>,
    append_first_act_after: bool,
    revoked_check: bool,
    revoked_check_before_push: bool,
    recorded_digest: bool,
    recorded_run_is_over: bool,
    revoked_first: bool,
    lock_awaited: bool,
    asked_again: bool,
    any_new_image_is_ours: bool,
    revoked_whatever_is_left: bool,
    every_end_is_judged: bool,
    writer_cas: bool,
    source_cursor_with_chunk: bool,
    cursor_behind_masker: bool,
    output_kept_until_complete: bool,
}

impl Rules {
    fn checks(&self, event: &str) -> bool {
        self.expected_sequence && self.unsequenced != Some(event)
    }
}

const KEPT: Rules = Rules {
    expected_sequence: true,
    unsequenced: None,
    append_first_act_after: true,
    revoked_check: true,
    revoked_check_before_push: true,
    recorded_digest: true,
    recorded_run_is_over: true,
    revoked_first: true,
    lock_awaited: true,
    asked_again: true,
    any_new_image_is_ours: true,
    revoked_whatever_is_left: true,
    every_end_is_judged: true,
    writer_cas: true,
    source_cursor_with_chunk: true,
    cursor_behind_masker: true,
    output_kept_until_complete: true,
};

#[test]
fn scratch() {
    let n: u8 = std::env::var("ANY").unwrap_or("2".into()).parse().unwrap();
    let mut rules = KEPT;
    match std::env::var("RULE").unwrap_or_default().as_str() {
        "expected_sequence" => rules.expected_sequence = false,
        "append_first" => rules.append_first_act_after = false,
        "revoked_check" => rules.revoked_check = false,
        "revoked_check2" => rules.revoked_check_before_push = false,
        "recorded" => rules.recorded_digest = false,
        "recorded_over" => rules.recorded_run_is_over = false,
        "revoked_first" => rules.revoked_first = false,
        "lock_awaited" => rules.lock_awaited = false,
        "asked_again" => rules.asked_again = false,
        "new_is_ours" => rules.any_new_image_is_ours = false,
        "left" => rules.revoked_whatever_is_left = false,
        "judged" => rules.every_end_is_judged = false,
        "" => {}
        x => rules.unsequenced = Some(Box::leak(x.to_string().into_boxed_str())),
    }
    let kinds: &'static [Fault] = if std::env::var("REM").is_ok() { &[Fault::Removal, Fault::Lapse, Fault::BuilderDeath, Fault::Overlooked] } else { faults::COMMON };
    let faults = Faults { kinds, left: n };
    let t = std::time::Instant::now();
    let c = Lifecycle { rules, faults, cancel: std::env::var("CANCEL").is_ok(), reproducible: std::env::var("REPRO").is_ok() }
        .checker().threads(2)
        .finish_when(HasDiscoveries::AnyFailures)
        .spawn_bfs()
        .join();
    println!("states {} unique {} depth {} {:?}", c.state_count(), c.unique_state_count(), c.max_depth(), t.elapsed());
    for (name, path) in c.discoveries() {
        if c.discovery_classification(name).to_string() == "counterexample" {
            println!("== {name}: ");
            for a in path.into_actions() { println!("   {a:?}"); }
        } else { println!("ok {name}"); }
    }
}

#[test]
fn scratchlog() {
    let n: u8 = std::env::var("ANY").unwrap_or("2".into()).parse().unwrap();
    let mut rules = KEPT;
    match std::env::var("RULE").unwrap_or_default().as_str() {
        "cas" => rules.writer_cas = false,
        "cursor" => rules.source_cursor_with_chunk = false,
        "masker" => rules.cursor_behind_masker = false,
        "kept" => rules.output_kept_until_complete = false,
        _ => {}
    }
    let t = std::time::Instant::now();
    let c = log::Log { rules, faults: Faults { kinds: faults::COMMON, left: n } }
        .checker().threads(2)
        .finish_when(HasDiscoveries::AnyFailures)
        .spawn_bfs()
        .join();
    println!("states {} unique {} depth {} {:?}", c.state_count(), c.unique_state_count(), c.max_depth(), t.elapsed());
    for (name, path) in c.discoveries() {
        if c.discovery_classification(name).to_string() == "counterexample" {
            println!("== {name}: ");
            for a in path.into_actions() { println!("   {a:?}"); }
        } else { println!("ok {name}"); }
    }
}
