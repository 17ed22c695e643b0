//! The registry logins that a run is given: to pull, what its request may use; to push, the installation's own.

use std::collections::BTreeMap;
use std::sync::Arc;

use kiln_contract::secrets::RegistryAuth;
use kiln_credentials::{Installation, Permitted};
use kiln_domain::run::{RunSpec, Work};
use kiln_registry::{Credential, Error as RegistryError, InvalidCredential, Keychain as _};
use secrecy::SecretString;

/// Host → `username:password`.
#[derive(Default)]
pub(crate) struct Logins {
    pub(crate) pull: BTreeMap<String, SecretString>,
    pub(crate) push: BTreeMap<String, SecretString>,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Request(#[from] InvalidCredential),
    /// The installation's own can't be had now.
    #[error(transparent)]
    Own(#[from] RegistryError),
}

impl Logins {
    /// `from_own`: what the run copies was made by a build, and lies in the installation's repository.
    pub(crate) async fn of(
        auth: RegistryAuth,
        installation: &Arc<Installation>,
        spec: &RunSpec,
        from_own: bool,
    ) -> Result<Self, Error> {
        let mut logins = Self::default();
        let permitted = Permitted::of(auth, installation.clone())?;
        for registry in permitted.registries().await {
            match permitted.credential(&registry).await {
                Ok(credential) => add(&mut logins.pull, &registry, credential),
                // The build may not need it.
                Err(error) => tracing::warn!("a build goes without a credential that it may use: {error}"),
            }
        }
        let target = spec.target_ref.registry();
        add(&mut logins.push, target, installation.credential(target).await?);
        match &spec.work {
            Work::Build { base_ref, .. } => {
                let base = base_ref.registry();
                add(&mut logins.push, base, installation.credential(base).await?);
            }
            // A copy has no steps that could read it.
            Work::Copy { from, .. } if from_own => {
                let from = from.registry();
                add(&mut logins.pull, from, installation.credential(from).await?);
            }
            // Its name is known, also where the installation knows its registry by no list, as Amazon's.
            Work::Copy { from, .. } => {
                let from = from.registry();
                add(&mut logins.pull, from, permitted.credential(from).await?);
            }
        }
        Ok(logins)
    }
}

fn add(logins: &mut BTreeMap<String, SecretString>, registry: &str, credential: Option<Credential>) {
    let Some(credential) = credential else { return };
    match credential.as_login() {
        Some(login) => {
            logins.insert(registry.to_owned(), login);
        }
        None => {
            tracing::warn!("a registry token can't be given to a builder: {registry} is asked without one")
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use kiln_credentials::Config;
    use kiln_domain::source::DockerfileSource;
    use secrecy::ExposeSecret as _;

    use super::*;

    /// `host=password …` of each.
    fn told(logins: &Logins) -> [String; 2] {
        [&logins.pull, &logins.push].map(|logins| {
            let told = |(host, login): (&String, &SecretString)| {
                format!("{host}={}", login.expose_secret().rsplit(':').next().unwrap())
            };
            logins.iter().map(told).collect::<Vec<_>>().join(" ")
        })
    }

    fn spec(work: Work) -> RunSpec {
        let build = kiln_domain::id::BuildId::new(&kiln_domain::id::ImageKey::of("x"), [0; 10]);
        RunSpec {
            run: kiln_domain::id::RunId::new(&build, 1),
            work,
            target_ref: "target.test/workspace:1".parse().unwrap(),
            owner: "ann".into(),
            timeout_ms: 1,
            no_cache: false,
            plain_http: Vec::new(),
            file_remotes: false,
            traceparent: String::new(),
        }
    }

    #[tokio::test]
    async fn a_run_pulls_with_what_its_request_may_use_and_pushes_with_the_installations() {
        let folder = tempfile::TempDir::new().unwrap();
        let path = folder.path().join("config.json");
        let entry = |password: &str| serde_json::json!({"username": "i", "password": password});
        let auths = serde_json::json!({"auths": {
            "base.test": entry("base"), "target.test": entry("target"), "other.test": entry("other"),
            "token.test": {"registrytoken": "bearer"},
        }});
        std::fs::write(&path, auths.to_string()).unwrap();
        let config = Config { docker_config: Some(path), ..Config::default() };
        let installation = Arc::new(Installation::open(&config, &mut Default::default()).await.unwrap());

        let source =
            DockerfileSource { remote_uri: "https://g.test/x".into(), ..DockerfileSource::default() };
        let base_ref = "base.test/base:1".parse().unwrap();
        let build = spec(Work::Build { source, commit: "c".repeat(40), base_ref });
        let copy_of =
            |from: &str| spec(Work::Copy { from: from.parse().unwrap(), platform: Default::default() });
        let (image, base) = (copy_of("other.test/x:1"), copy_of("base.test/base:1"));
        let own = [("other.test".to_owned(), "me:own".to_owned())];
        let none = RegistryAuth::default();
        let own = RegistryAuth { credentials: own.into(), ..none.clone() };
        let all = RegistryAuth { allow_all: true, ..none.clone() };
        let selected =
            RegistryAuth { allowed_hosts: vec!["other.test".into(), "gone.test".into()], ..none.clone() };
        let pushes = "base.test=base target.test=target";
        for (auth, spec, from_own, pull, push) in [
            (&none, &build, false, "", pushes),
            (&own, &build, false, "other.test=own", pushes),
            (&selected, &build, false, "other.test=other", pushes),
            (&all, &build, false, "base.test=base other.test=other target.test=target", pushes),
            (&none, &image, false, "", "target.test=target"),
            (&own, &image, false, "other.test=own", "target.test=target"),
            (&none, &base, true, "base.test=base", "target.test=target"),
            // A user's image at the same place: only who may read it.
            (&none, &base, false, "", "target.test=target"),
        ] {
            let logins = Logins::of(auth.clone(), &installation, spec, from_own).await.unwrap();
            assert_eq!(told(&logins), [pull, push], "{:?} {from_own}", spec.work);
        }
    }

    /// A credential store, as Amazon's registries, has a credential for whom it is asked of, and no list.
    #[tokio::test]
    async fn the_registry_that_an_image_is_copied_from_need_not_be_on_a_list() {
        let folder = tempfile::TempDir::new().unwrap();
        let helper = folder.path().join("docker-credential-test");
        let says = r#"{"ServerURL": "x", "Username": "i", "Secret": "stored"}"#;
        std::fs::write(&helper, format!("#!/bin/sh\ncat >/dev/null\necho '{says}'\n")).unwrap();
        std::fs::set_permissions(&helper, std::fs::Permissions::from_mode(0o755)).unwrap();
        let path = folder.path().join("config.json");
        std::fs::write(&path, r#"{"credsStore": "test"}"#).unwrap();
        let folders = vec![folder.path().to_owned()];
        let config = Config { docker_config: Some(path), helper_folders: folders, ..Config::default() };
        let installation = Arc::new(Installation::open(&config, &mut Default::default()).await.unwrap());
        let image =
            spec(Work::Copy { from: "other.test/x:1".parse().unwrap(), platform: Default::default() });
        let none = RegistryAuth::default();
        for (auth, pull) in [
            (RegistryAuth { allow_all: true, ..none.clone() }, "other.test=stored"),
            (RegistryAuth { allowed_hosts: vec!["test".into()], ..none.clone() }, "test=stored"),
            (none, ""),
        ] {
            let logins = Logins::of(auth.clone(), &installation, &image, false).await.unwrap();
            assert_eq!(told(&logins), [pull, "target.test=stored"], "{auth:?}");
        }
    }
}
