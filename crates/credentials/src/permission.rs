//! Whose credentials a request is asked with: its own, and those of the installation that it was allowed.

use std::sync::Arc;

use async_trait::async_trait;
use kiln_contract::secrets::RegistryAuth;
use kiln_registry::{Credential, Error, InvalidCredential, Keychain, Keyring, registry_name};
use secrecy::SecretString;

use crate::Installation;

/// Which of the installation's credentials a request may use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Permission {
    #[default]
    None,
    /// Those for these registries, and no others.
    Selected(Vec<String>),
    All,
}

impl Permission {
    /// For registries written as in a reference, as Docker Hub's other names, or as a URL.
    pub fn selected<'a>(registries: impl IntoIterator<Item = &'a str>) -> Self {
        Self::Selected(registries.into_iter().map(registry_name).collect())
    }

    /// `registry` exactly as a reference names it: no part of a name stands for it.
    fn covers(&self, registry: &str) -> bool {
        match self {
            Self::None => false,
            Self::Selected(selected) => selected.iter().any(|name| name == registry),
            Self::All => true,
        }
    }
}

/// What one request may be asked with.
#[derive(Clone)]
pub struct Permitted {
    own: Keyring,
    installation: Arc<Installation>,
    permission: Permission,
}

/// Whose credential it is that a registry is shown.
#[derive(Clone, Debug)]
pub enum Owner {
    /// There is none.
    Nobody,
    Request(Credential),
    Installation,
}

impl Permitted {
    /// The request's `own` win over the installation's.
    pub fn new(own: Keyring, installation: Arc<Installation>, permission: Permission) -> Self {
        Self { own, installation, permission }
    }

    /// As a request says it.
    pub fn of(auth: RegistryAuth, installation: Arc<Installation>) -> Result<Self, InvalidCredential> {
        let mut own = Keyring::default();
        for (registry, login) in auth.credentials {
            own.insert(&registry, &SecretString::from(login))?;
        }
        let permission = if auth.allow_all {
            Permission::All
        } else {
            Permission::selected(auth.allowed_hosts.iter().map(String::as_str))
        };
        Ok(Self::new(own, installation, permission))
    }

    /// Whose credential a registry would be shown. Asks nobody; the installation's may turn out not to be there.
    pub async fn owner(&self, registry: &str) -> Owner {
        if let Some(own) = self.own.get(registry) {
            return Owner::Request(own.clone());
        }
        if self.permission.covers(registry) && self.installation.serves(registry).await {
            return Owner::Installation;
        }
        Owner::Nobody
    }

    /// The registries that a credential may be shown to and whose names are known: the request's own, those that were
    /// selected, and, where all are allowed, those that the installation knows by name.
    pub async fn registries(&self) -> Vec<String> {
        let mut registries: Vec<String> = self.own.registries().cloned().collect();
        match &self.permission {
            Permission::None => {}
            Permission::Selected(selected) => registries.extend(selected.iter().cloned()),
            Permission::All => registries.extend(self.installation.registries().await),
        }
        registries.sort_unstable();
        registries.dedup();
        registries
    }
}

#[async_trait]
impl Keychain for Permitted {
    async fn credential(&self, registry: &str) -> Result<Option<Credential>, Error> {
        match self.owner(registry).await {
            Owner::Nobody => Ok(None),
            Owner::Request(own) => Ok(Some(own)),
            Owner::Installation => self.installation.credential(registry).await,
        }
    }
}
