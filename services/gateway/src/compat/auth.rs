//! Which registry credentials a request of the compatible API may use.

use kiln_contract::secrets::RegistryAuth;
use kiln_proto::builder as api;
use kiln_proto::builder::build_registry_auth::Mode;
use kiln_proto::kiln_v1;
use tonic::Status;

use crate::config::Config;
use crate::request;

/// `uses_base` allows the registry of base images whatever the request says, as mk3 does for one that names a base of ours.
pub(crate) fn registry_auth(
    auth: Option<api::BuildRegistryAuth>,
    config: &Config,
    uses_base: bool,
) -> Result<RegistryAuth, Status> {
    let auth = auth.unwrap_or_default();
    let mut native = kiln_v1::RegistryAuth { credentials: auth.additional, ..Default::default() };
    match auth.mode {
        Some(Mode::Total(total)) => native.allow_all = total.allow_all,
        Some(Mode::Selective(selective)) => {
            native.allowed_hosts = selective.any_of;
            for (allowed, host) in [
                (selective.allow_baserep || uses_base, &config.base_registry),
                (selective.allow_workspacerep, &config.workspace_registry),
            ] {
                if allowed && !host.is_empty() && !native.allowed_hosts.contains(host) {
                    native.allowed_hosts.push(host.clone());
                }
            }
        }
        None => {}
    }
    request::registry_auth(Some(native)).map_err(|status| {
        // Our own API calls these fields otherwise.
        let message = status.message().replacen("auth.credentials", "auth.additional", 1);
        Status::invalid_argument(message.replacen("auth.allowed_hosts", "auth.selective.any_of", 1))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(mode: Option<Mode>, uses_base: bool) -> RegistryAuth {
        let config = Config {
            base_registry: "base.test".into(),
            workspace_registry: "workspace.test:5000".into(),
            ..Config::default()
        };
        let auth = api::BuildRegistryAuth { mode, ..Default::default() };
        registry_auth(Some(auth), &config, uses_base).unwrap()
    }

    #[test]
    fn each_mode_allows_what_it_names() {
        let selective = |allow_baserep, allow_workspacerep, any_of: &[&str]| {
            let any_of = any_of.iter().map(ToString::to_string).collect();
            Some(Mode::Selective(api::BuildRegistryAuthSelective {
                allow_baserep,
                allow_workspacerep,
                any_of,
            }))
        };
        for (mode, uses_base, all, hosts) in [
            (None, true, false, vec![]),
            (Some(Mode::Total(api::BuildRegistryAuthTotal { allow_all: true })), false, true, vec![]),
            (Some(Mode::Total(api::BuildRegistryAuthTotal { allow_all: false })), true, false, vec![]),
            (selective(false, false, &["quay.io"]), false, false, vec!["quay.io"]),
            (selective(false, false, &["quay.io"]), true, false, vec!["quay.io", "base.test"]),
            (selective(true, true, &["base.test"]), false, false, vec!["base.test", "workspace.test:5000"]),
        ] {
            let shown = format!("{mode:?} {uses_base}");
            let auth = allowed(mode, uses_base);
            assert_eq!(
                (auth.allow_all, auth.allowed_hosts),
                (all, hosts.iter().map(ToString::to_string).collect()),
                "{shown}"
            );
        }
    }

    #[test]
    fn a_field_has_the_name_that_the_client_knows() {
        let auth = api::BuildRegistryAuth {
            additional: [("r.test".to_owned(), "no base64!".to_owned())].into(),
            ..Default::default()
        };
        let status = registry_auth(Some(auth), &Config::default(), false).unwrap_err();
        assert!(status.message().starts_with("auth.additional: of r.test"), "{}", status.message());
    }
}
