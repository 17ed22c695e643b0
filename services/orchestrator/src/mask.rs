//! What a builder tells of its work, masked before it goes into an event: a step's name is the Dockerfile's own line, and
//! that may say a secret aloud.

use std::sync::Arc;
use std::time::Duration;

use kiln_domain::failure::Failure;
use kiln_domain::mask::Patterns;
use kiln_domain::run::{Base, Findings, Outcome, RunResult};
use kiln_domain::step::Step;

use crate::holder::{Held, LetGo};

/// In place of a text that can't be masked, because the secrets can't be opened any more.
pub(crate) const WITHHELD: &str = "(withheld)";
/// Between two tries to read the secrets.
const PAUSE: Duration = Duration::from_secs(1);

impl Held<'_> {
    /// The outcome with every text of it masked.
    pub(crate) async fn masked(&mut self, outcome: Outcome) -> Result<Outcome, LetGo> {
        let patterns = self.patterns().await?;
        let mask = |text: &str| match &patterns {
            Some(patterns) => patterns.masked(text),
            None => WITHHELD.to_owned(),
        };
        let Findings { steps, bases, images, build_tool } = outcome.findings;
        let steps = steps.into_iter().map(|step| Step { name: mask(&step.name), ..step }).collect();
        let bases = bases.into_iter().map(|base| Base { reference: mask(&base.reference), ..base }).collect();
        let result = match outcome.result {
            RunResult::Failed(failure) => {
                RunResult::Failed(Failure::new(failure.reason, mask(&failure.message)))
            }
            pushed @ RunResult::Pushed(_) => pushed,
        };
        Ok(Outcome { result, findings: Findings { steps, bases, images, build_tool } })
    }

    /// A text of the engine, which may quote what it was given.
    pub(crate) async fn masked_text(&mut self, text: &str) -> Result<String, LetGo> {
        let patterns = self.patterns().await?;
        Ok(patterns.map_or_else(|| WITHHELD.to_owned(), |patterns| patterns.masked(text)))
    }

    /// What to mask; `None` where that can't be known any more.
    async fn patterns(&mut self) -> Result<Option<Arc<Patterns>>, LetGo> {
        let id = self.record().id.clone();
        let sealed = loop {
            match self.shared.secrets.get(&id).await {
                Ok(sealed) => break sealed,
                Err(error) => {
                    tracing::warn!(build.id = %id, "the build's secrets can't be read now: {error}");
                    self.pause(PAUSE).await?;
                }
            }
        };
        let Some(sealed) = sealed else {
            tracing::error!(build.id = %id, "the secrets of `{id}` are gone: what its builder says is withheld");
            return Ok(None);
        };
        let patterns = kiln_bus::secrets::open(&self.shared.open_key, &sealed)
            .map_err(|error| error.to_string())
            .and_then(|secrets| {
                Patterns::of(secrets.hidden().iter().map(Vec::as_slice)).map_err(|error| error.to_string())
            });
        match patterns {
            Ok(patterns) => Ok(Some(Arc::new(patterns))),
            Err(error) => {
                tracing::error!(build.id = %id, "what the builder of `{id}` says is withheld: {error}");
                Ok(None)
            }
        }
    }
}
