//! A private base image in a registry that speaks TLS of an own authority and can only be reached over a proxy.

use anyhow::{Result, ensure};
use kiln_proto::kiln_v1 as api;
use kiln_testkit::authority::{Authority, HIDDEN_HOST};
use kiln_testkit::installation::{Installation, program};
use kiln_testkit::proxy::Proxy;
use kiln_testkit::registry::{DockerRegistry, PASSWORD, USERNAME};
use kiln_testkit::workshop::Workshop;
use serde_json::json;
use tempfile::TempDir;
use tonic::Code;

use super::{begun, dockerfile, is_over};

#[tokio::test(flavor = "multi_thread")]
async fn a_private_base_is_for_who_may_use_the_installations_credentials() -> Result<()> {
    let authority = Authority::new()?;
    let registry = DockerRegistry::start_with_tls(&authority, false).await?;
    let digest = registry.push_image("private/base:1", "linux/amd64", &[("secret", b"x")]).await?;
    let proxy = Proxy::start(registry.address().to_owned()).await?;

    let folder = TempDir::new()?;
    let [docker_config, config] = ["docker.json", "kiln.json"].map(|name| folder.path().join(name));
    let login = json!({"username": USERNAME, "password": PASSWORD});
    std::fs::write(&docker_config, json!({"auths": {HIDDEN_HOST: login}}).to_string())?;
    let settings = json!({
        "credentials": {"docker_config": docker_config},
        "registries": {HIDDEN_HOST: {"ca": authority.ca()}},
    });
    std::fs::write(&config, settings.to_string())?;
    let environment = [("HTTPS_PROXY", proxy.url.as_str()), ("NO_PROXY", "127.0.0.1,localhost")];
    let config = format!("--config={}", config.display());
    let kiln = Installation::start_with(&program()?, &[&config], &environment).await?;
    let workshop = Workshop::new().await?;
    let mut client = kiln.client().await?;

    let base = format!("{HIDDEN_HOST}/private/base:1");
    let may = |allowed: &[&str]| {
        let allowed_hosts = allowed.iter().map(|host| (*host).to_owned()).collect();
        Some(api::RegistryAuth { allowed_hosts, ..Default::default() })
    };
    let resolve = |auth| api::ResolveBaseImageRequest { r#ref: base.clone(), auth, ..Default::default() };
    let resolved = client.resolve_base_image(resolve(may(&[HIDDEN_HOST]))).await?.into_inner();
    ensure!(resolved.r#ref == format!("{HIDDEN_HOST}/private/base@{digest}"), "{resolved:?}");
    ensure!(!resolved.cached && resolved.platform == "linux/amd64", "{resolved:?}");
    for auth in [None, may(&["127.0.0.1"])] {
        let refused = client.resolve_base_image(resolve(auth)).await.err();
        ensure!(refused.as_ref().map(tonic::Status::code) == Some(Code::Unauthenticated), "{refused:?}");
    }

    let text = format!("FROM {base}\nCOPY busybox /busybox\nRUN [\"/busybox\", \"ls\", \"/secret\"]\n");
    let repository = workshop.repository(&[("Dockerfile", &text)], &["."])?;
    // First with, then without: what the one has brought here is not the other's.
    for (auth, version, state) in [
        (may(&[HIDDEN_HOST]), "with", api::BuildState::Succeeded),
        (None, "without", api::BuildState::Failed),
    ] {
        let request = api::BuildImageRequest {
            auth,
            ..dockerfile(&repository.uri, |dockerfile| dockerfile.version = version.into())
        };
        let build = begun(client.build_image(request).await?.into_inner())?;
        let over = kiln.until(&build.id, is_over).await?;
        let log = String::from_utf8_lossy(&kiln.whole_log(&build.id).await?).into_owned();
        ensure!(over.state() == state, "{version}: {over:?} {log}");
        let denied = over.reason() == api::FailureReason::RegistryDenied;
        ensure!(denied == (state == api::BuildState::Failed), "{over:?} {log}");
        ensure!(!log.contains(PASSWORD), "{log}");
    }
    let expected = format!("{HIDDEN_HOST}:443");
    let asked = proxy.asked();
    ensure!(!asked.is_empty() && asked.iter().all(|host| *host == expected), "{asked:?}");
    Ok(())
}
