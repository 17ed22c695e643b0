//! Questions in, answers out: message → call → answer, and nothing else.

use std::sync::Arc;

use kiln_bus::BusError;
use kiln_bus::serve::Server;
use kiln_contract::error::{Code, Refusal};
use kiln_contract::orchestrator::{
    AlreadyBuilt, Build, BuildAnswer, Cancel, RecordAt, WorkspaceImage, WorkspaceImageAnswer,
    source_from_json,
};
use kiln_domain::id::BuildId;

use crate::Shared;
use crate::accept::{Accepted, Request};

pub(crate) async fn serve(server: &Server, shared: &Arc<Shared>) -> Result<(), BusError> {
    let orchestrator = shared.clone();
    server
        .answer(move |question: Build| {
            let orchestrator = orchestrator.clone();
            async move { build(&orchestrator, question).await }
        })
        .await?;
    let orchestrator = shared.clone();
    server
        .answer(move |question: Cancel| {
            let orchestrator = orchestrator.clone();
            async move { cancel(&orchestrator, question).await }
        })
        .await?;
    let orchestrator = shared.clone();
    server
        .answer(move |question: WorkspaceImage| {
            let orchestrator = orchestrator.clone();
            async move { workspace_image(&orchestrator, question).await }
        })
        .await
}

async fn build(orchestrator: &Shared, question: Build) -> Result<BuildAnswer, Refusal> {
    let request = Request {
        id: question.request_id,
        source: source_from_json(&question.source)?,
        sealed: question.secrets,
        force: question.force,
        owner: question.owner,
        timeout_ms: question.timeout_ms,
        labels: question.labels.into_iter().collect(),
        no_cache: question.no_cache,
        clone_target: question.clone_target,
        unfetchable: question.unfetchable,
    };
    Ok(match orchestrator.accept(request).await? {
        Accepted::Build { entry, joined } => BuildAnswer {
            build: Some(RecordAt::new(&entry.record, entry.sequence)?),
            joined,
            already_built: None,
        },
        Accepted::AlreadyBuilt { target_ref, base_ref, digest } => BuildAnswer {
            build: None,
            joined: false,
            already_built: Some(AlreadyBuilt { target_ref, base_ref, digest: digest.to_string() }),
        },
    })
}

async fn cancel(orchestrator: &Shared, question: Cancel) -> Result<RecordAt, Refusal> {
    let id: BuildId = question
        .build_id
        .parse()
        .map_err(|error| Refusal::new(Code::InvalidArgument, format!("id: {error}")))?;
    let entry = orchestrator.cancel(&id, &question.reason).await?;
    RecordAt::new(&entry.record, entry.sequence)
}

async fn workspace_image(
    orchestrator: &Shared,
    question: WorkspaceImage,
) -> Result<WorkspaceImageAnswer, Refusal> {
    let source = source_from_json(&question.source)?;
    let image = orchestrator.identify(&source, question.clone_target.as_deref(), &question.secrets).await?;
    let found = orchestrator.resolver.find(&image.target_ref).await?;
    Ok(WorkspaceImageAnswer {
        target_ref: image.target_ref.to_string(),
        base_ref: image.base_ref.to_string(),
        exists: found.is_some(),
    })
}
