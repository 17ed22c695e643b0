//! A question: a message that has one answer, asked of whichever member of a service is free.

/// A question says its service, its verb, and the type of its answer. Every question is idempotent: it may be asked
/// again, and then means the same.
pub trait Question: prost::Message + Default + 'static {
    /// The service that answers: `orchestrator`, `resolver`.
    const SERVICE: &'static str;
    /// What is asked of it.
    const VERB: &'static str;
    type Answer: prost::Message + Default + 'static;

    /// `kiln.<service>.v1.<verb>`.
    fn subject() -> String {
        format!("kiln.{}.v1.{}", Self::SERVICE, Self::VERB)
    }
}
