//! What a builder is given, made of the build's record and its opened secrets.

use kiln_domain::platform::Platform;
use kiln_domain::run::{RunSecrets, RunSpec, Work, WorkspaceRequest};
use kiln_domain::source::Source;

use crate::credentials::{self, Logins};
use crate::holder::Held;

impl Held<'_> {
    pub(crate) fn spec(&self) -> Result<RunSpec, String> {
        let record = self.record();
        let parse =
            |reference: &str| reference.parse().map_err(|error| format!("a record can't be read: {error}"));
        let base_ref = parse(&record.base_ref)?;
        if !record.source.is_known() {
            return Err("the build's source is of a newer release than this orchestrator".into());
        }
        let work = match (&record.source, &record.commit) {
            (Source::Dockerfile(source), Some(commit)) if !record.base_exists => {
                Work::Build { source: source.clone(), commit: commit.clone(), base_ref }
            }
            // Its request says what is fetched.
            (Source::Dockerfile(source), None)
                if !record.base_exists && self.shared.engine.fetches_contexts() =>
            {
                Work::Build { source: source.clone(), commit: String::new(), base_ref }
            }
            (Source::Dockerfile(_), None) if !record.base_exists => {
                return Err("the record has no commit".into());
            }
            // What was built for several platforms is copied for all of them.
            (Source::Dockerfile(_), _) => Work::Copy { from: base_ref, platform: None },
            _ => Work::Copy { from: base_ref, platform: Some(Platform::default()) },
        };
        Ok(RunSpec {
            run: record.run(),
            work,
            target_ref: parse(&record.target_ref)?,
            owner: record.owner.clone(),
            timeout_ms: record.timeout_ms,
            no_cache: record.no_cache,
            plain_http: self.shared.config.plain_http.clone(),
            file_remotes: self.shared.config.file_remotes,
            traceparent: record.traceparent.clone(),
        })
    }

    /// The build's secrets, opened, and the registry logins that its run may have. `Err(None)`: they can't be read now.
    pub(crate) async fn secrets(&self, spec: &RunSpec) -> Result<RunSecrets, Option<String>> {
        let sealed = self.shared.secrets.get(&self.record().id).await.map_err(|error| {
            tracing::warn!(build.id = %self.record().id, "the build's secrets can't be read now: {error}");
            None
        })?;
        let sealed = sealed.ok_or_else(|| Some("the build's secrets are gone".to_owned()))?;
        let secrets = kiln_bus::secrets::open(&self.shared.open_key, &sealed)
            .map_err(|error| Some(error.to_string()))?;
        let record = self.record();
        let from_own = matches!(record.source, Source::Dockerfile(_));
        let logins = Logins::of(secrets.registry, &self.shared.installation, spec, from_own).await;
        let logins = logins.map_err(|error| match error {
            credentials::Error::Request(invalid) => Some(invalid.to_string()),
            credentials::Error::Own(error) => {
                tracing::error!(build.id = %record.id, "build `{}` can't be started yet: {error}", record.id);
                None
            }
        })?;
        Ok(RunSecrets {
            git_username: secrets.git_username,
            git_password: Some(secrets.git_password).filter(|password| !password.is_empty()).map(Into::into),
            registries: logins.pull,
            push: logins.push,
            workspace: secrets.workspace.map(|given| WorkspaceRequest {
                initializer: given.initializer.into(),
                supervisor_ref: given.supervisor_ref,
            }),
            mounts: secrets.mounts.into_iter().map(|(id, content)| (id, content.into())).collect(),
        })
    }
}
