//! Questions in, answers out: message → call → answer, and nothing else.

use std::sync::Arc;

use kiln_bus::BusError;
use kiln_bus::seal::SealKey;
use kiln_bus::serve::Server;
use kiln_contract::error::{Code, Refusal};
use kiln_contract::orchestrator::{
    AlreadyBuilt, Build, BuildAnswer, Cancel, OutputAccess, OutputAccessAnswer, RecordAt, WorkspaceImage,
    WorkspaceImageAnswer, source_from_json,
};
use kiln_contract::secrets::{self, OutputAccesses};
use kiln_domain::engine::{self, EngineError};
use kiln_domain::id::{BuildId, RunId};
use secrecy::ExposeSecret as _;

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
        .answer(move |question: OutputAccess| {
            let orchestrator = orchestrator.clone();
            async move { output_access(&orchestrator, question).await }
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

async fn output_access(orchestrator: &Shared, question: OutputAccess) -> Result<OutputAccessAnswer, Refusal> {
    let invalid = |what: &str, error: &dyn std::fmt::Display| {
        Refusal::new(Code::InvalidArgument, format!("{what}: {error}"))
    };
    let key = SealKey::from_public(&question.seal_to).map_err(|error| invalid("seal_to", &error))?;
    let (mut accesses, mut not_yet) = (OutputAccesses::default(), Vec::new());
    for name in question.runs {
        let run: RunId = name.parse().map_err(|error| invalid("runs", &error))?;
        match orchestrator.engine.output_access(&run).await {
            Ok(Some(access)) => drop(accesses.runs.insert(name, readable(access))),
            Ok(None) | Err(EngineError::Gone | EngineError::Revoked | EngineError::Rejected(_)) => {}
            Err(EngineError::Unavailable(why)) => {
                tracing::debug!(run.id = %run, "how to read the output of `{run}` is not known yet: {why}");
                not_yet.push(name);
            }
        }
    }
    if question.others {
        let others = orchestrator.engine.others().await;
        let others = others.map_err(|error| Refusal::new(Code::Unavailable, error.to_string()))?;
        accesses.others = others
            .into_iter()
            .map(|build| secrets::OthersBuild {
                id: build.id,
                target_ref: build.target_ref,
                base_ref: build.base_ref,
                started_at: build.started_at,
                output: build.output.map(readable),
            })
            .collect();
    }
    let sealed = kiln_bus::secrets::seal_accesses(&key, &accesses)
        .map_err(|error| Refusal::new(Code::Internal, error.to_string()))?;
    Ok(OutputAccessAnswer { sealed, not_yet })
}

fn readable(access: engine::OutputAccess) -> secrets::OutputAccess {
    let headers = access.headers.iter();
    let headers = headers.map(|(name, value)| (name.clone(), value.expose_secret().to_owned())).collect();
    secrets::OutputAccess { url: access.url, headers }
}

async fn workspace_image(
    orchestrator: &Shared,
    question: WorkspaceImage,
) -> Result<WorkspaceImageAnswer, Refusal> {
    let source = source_from_json(&question.source)?;
    let image = orchestrator.identify(&source, question.clone_target.as_deref(), &question.secrets).await?;
    let found = orchestrator.resolver.find(&image.target_ref).await??;
    Ok(WorkspaceImageAnswer {
        target_ref: image.target_ref.to_string(),
        base_ref: image.base_ref.to_string(),
        exists: found.is_some(),
    })
}
