//! The rules that the protocol stands on. Each can be taken out, to see that the model notices.

/// `true`: the rule is kept.
#[derive(Clone, Debug)]
pub(super) struct Rules {
    /// An append names the last sequence that its author has read.
    pub(super) expected_sequence: bool,
    /// Appends of this one event don't.
    pub(super) unsequenced: Option<&'static str>,
    /// A start follows the append that allows it.
    pub(super) append_first_act_after: bool,
    /// A builder that has the lock looks for `revoked` before it does anything.
    pub(super) revoked_check: bool,
    /// And again before it records and PUTs.
    pub(super) revoked_check_before_push: bool,
    /// A builder records the digest before it PUTs the tag.
    pub(super) recorded_digest: bool,
    /// A builder that finds a digest recorded does nothing: one of the same run has pushed, or was about to.
    pub(super) recorded_run_is_over: bool,
    /// A holder revokes a run before it judges it; else only before `retrying`.
    pub(super) revoked_first: bool,
    /// Also a run that has left its outcome.
    pub(super) revoked_whatever_is_left: bool,
    /// After the revocation it waits for the run's lock, and only then reads what the run left.
    pub(super) lock_awaited: bool,
    /// A target that isn't as it was found to be pushed is asked for once more, when no PUT can be in flight any more.
    pub(super) asked_again: bool,
    /// Nothing is asked only of a builder that failed before it PUT and that nobody else can have had a part in.
    pub(super) asked_unless_alone: bool,
    /// Then any image that wasn't there before is this build's, whatever the run left.
    pub(super) any_new_image_is_ours: bool,
    /// A build that a holder can't start (no time left, refused by the engine) ends by the same way as any other.
    pub(super) every_end_is_judged: bool,
    /// A log's chunk names the last sequence that its writer has read.
    pub(super) writer_cas: bool,
    /// The source's cursor is stored with the chunk.
    pub(super) source_cursor_with_chunk: bool,
    /// It is that of the first raw byte whose masked form isn't stored.
    pub(super) cursor_behind_masker: bool,
    /// A run's output is kept until its log is complete.
    pub(super) output_kept_until_complete: bool,
}

/// The protocol.
pub(super) const KEPT: Rules = Rules {
    expected_sequence: true,
    unsequenced: None,
    append_first_act_after: true,
    revoked_check: true,
    revoked_check_before_push: true,
    recorded_digest: true,
    recorded_run_is_over: true,
    revoked_first: true,
    revoked_whatever_is_left: true,
    lock_awaited: true,
    asked_again: true,
    asked_unless_alone: true,
    any_new_image_is_ours: true,
    every_end_is_judged: true,
    writer_cas: true,
    source_cursor_with_chunk: true,
    cursor_behind_masker: true,
    output_kept_until_complete: true,
};

impl Rules {
    /// Whether an append of this event is checked.
    pub(super) fn checks(&self, event: &str) -> bool {
        self.expected_sequence && self.unsequenced != Some(event)
    }
}
