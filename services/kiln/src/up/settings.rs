//! The services' configuration as `kiln up` completes it: by its flags, and by what it has started.

use anyhow::{Context as _, bail};
use kiln_chassis::config::{Error, Problem};
use kiln_domain::reference::ImageReference;
use kiln_domain::run_folder::Builder;

use super::Options;
use super::backing::Backing;
use super::data_dir::DataDir;
use super::nats;
use crate::config::{Config, Engine, Loaded, Role};

/// What it is told of the secrets that are made here is the files that they are in.
pub(crate) fn complete(
    mut config: Config,
    options: &Options,
    data: &DataDir,
    backing: &Backing,
) -> anyhow::Result<Config> {
    config.nats.url.clone_from(&backing.nats.url);
    if backing.nats.passwords.is_some() {
        config.nats.user = Some(nats::SERVICES.to_owned());
        config.nats.password = None;
        config.nats.password_file = Some(data.path().join(nats::SERVICES_PASSWORD));
    }
    if config.seal.seed.is_none() && config.seal.seed_file.is_none() {
        config.seal.seed_file = Some(data.path().join(super::SEAL_KEY));
        config.seal.public_key = None;
    }
    if let Engine::Local(local) = &mut config.engine {
        data.path().clone_into(&mut local.folder);
        if let Some(builder) = options.builder {
            local.builder = builder;
        }
        if !options.buildkit_addresses.is_empty() {
            local.buildkit.addresses.clone_from(&options.buildkit_addresses);
            // Who names a daemon means to use it.
            if local.builder == Builder::Auto {
                local.builder = Builder::Buildkit;
            }
        }
    }

    let address = &backing.registry.address;
    complete_repositories(&mut config, address);
    let gateway = config.gateway.get_or_insert_default();
    let resolver = config.resolver.get_or_insert_default();
    let orchestrator = config.orchestrator.get_or_insert_default();
    if backing.registry.plain_http {
        for hosts in [&mut resolver.plain_http, &mut orchestrator.plain_http] {
            if !hosts.contains(address) {
                hosts.push(address.clone());
            }
        }
    }
    if options.allow_file_contexts {
        gateway.file_remotes = true;
        resolver.file_remotes = true;
        orchestrator.file_remotes = true;
    }
    let problems: Vec<Problem> = config.problems(&Role::ALL);
    if problems.is_empty() { Ok(config) } else { Err(Error::Wrong(problems)).context("kiln up") }
}

/// The registry that the file means, if none is to be started: that of an image-builder-mk3, or the one that the workspaces of
/// a ws-manager push to, which could not reach one of ours on loopback.
pub(crate) fn registry_that_is_there(loaded: &Loaded) -> anyhow::Result<Option<String>> {
    let orchestrator = loaded.config.orchestrator.as_ref();
    let repositories = orchestrator.map(|of| [&of.base_image_repository, &of.workspace_image_repository]);
    let mut named = repositories.into_iter().flatten().filter(|repository| !repository.is_empty()).peekable();
    let has_ws_manager = loaded.config.engine.local().is_none();
    if has_ws_manager && named.peek().is_none() {
        let key = if loaded.is_mk3s { "baseImageRepository" } else { "base_image_repository" };
        bail!(
            "`orchestrator.{key}` is missing: builds are workspaces of a ws-manager, for which no registry is started here"
        );
    }
    if !has_ws_manager && !loaded.is_mk3s {
        return Ok(None);
    }
    // What can't be parsed is refused with all else that is wrong.
    let mut references = named.filter_map(|repository| repository.parse::<ImageReference>().ok());
    Ok(references.next().map(|reference| reference.registry().to_owned()))
}

/// Where images are pushed to, unless the file says so.
fn complete_repositories(config: &mut Config, registry: &str) {
    let orchestrator = config.orchestrator.get_or_insert_default();
    for (repository, name) in [
        (&mut orchestrator.base_image_repository, "base-images"),
        (&mut orchestrator.workspace_image_repository, "workspace-images"),
    ] {
        if repository.is_empty() {
            *repository = format!("{registry}/{name}");
        }
    }
}
