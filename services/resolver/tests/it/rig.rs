//! A bus of one's own with resolvers on it.

use std::sync::Arc;
use std::time::Duration;

use kiln_bus::layout::Layout;
use kiln_bus::seal::OpenKey;
use kiln_bus::{Bus, Connect, secrets};
use kiln_contract::error::Refusal;
use kiln_contract::question::Question;
use kiln_contract::resolver::{FindImage, ResolveCommit, ResolveImage, ResolvedImage};
use kiln_contract::secrets::{RegistryAuth, Secrets};
use kiln_credentials::Installation;
use kiln_domain::registries::Registries;
use kiln_registry::OciRegistry;
use kiln_resolver::{Config, Parts, run};
use kiln_testkit::nats::{NatsServer, run_server};
use secrecy::SecretString;
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio_util::sync::{CancellationToken, DropGuard};

pub(crate) const WITHIN: Duration = Duration::from_secs(30);

pub(crate) struct Rig {
    nats: NatsServer,
    seed: SecretString,
    installation: Arc<Installation>,
    registries: Registries,
    pub(crate) asking: Bus,
    running: JoinSet<()>,
    stop: Vec<DropGuard>,
}

impl Rig {
    /// A bus, and one resolver.
    pub(crate) async fn new(config: Config) -> Self {
        Self::of(config, Installation::default()).await
    }

    /// Of an installation that has credentials.
    pub(crate) async fn of(config: Config, installation: Installation) -> Self {
        Self::with(config, installation, Registries::default()).await
    }

    /// Of an installation that has credentials, and mirrors.
    pub(crate) async fn with(config: Config, installation: Installation, registries: Registries) -> Self {
        let nats = run_server().await.unwrap();
        let asking = connect(&nats).await;
        let small = Layout { journal_max_bytes: 1 << 20, logs_max_bytes: 1 << 20, ..Layout::default() };
        asking.provision(&small).await.unwrap();
        let seed = OpenKey::new_seed().unwrap();
        let installation = Arc::new(installation);
        let mut rig =
            Self { nats, seed, installation, registries, asking, running: JoinSet::new(), stop: Vec::new() };
        rig.replace(config).await;
        rig
    }

    /// Ends the resolver and starts another, which has nothing in its memory.
    pub(crate) async fn replace(&mut self, config: Config) {
        self.stop.clear();
        while self.running.join_next().await.is_some() {}
        self.add(config).await;
    }

    /// Starts another resolver beside what runs.
    pub(crate) async fn add(&mut self, config: Config) {
        let parts = Parts {
            bus: connect(&self.nats).await,
            registry: Arc::new(OciRegistry::default()),
            registries: self.registries.clone(),
            installation: self.installation.clone(),
            open_key: self.open_key(),
            metrics: Default::default(),
        };
        let (stop, (ready, answers)) = (CancellationToken::new(), oneshot::channel());
        let until = stop.clone();
        self.running.spawn(async move {
            run(config, parts, |metrics| ready.send(metrics).unwrap(), until).await.unwrap();
        });
        answers.await.unwrap();
        self.stop.push(stop.drop_guard());
    }

    /// Another installation's seal key from now on, for the next resolver.
    pub(crate) fn forget_key(&mut self) {
        self.seed = OpenKey::new_seed().unwrap();
    }

    fn open_key(&self) -> OpenKey {
        OpenKey::from_seed(self.seed.clone()).unwrap()
    }

    pub(crate) async fn ask<Q: Question>(&self, question: &Q) -> Result<Q::Answer, Refusal> {
        self.asking.ask(question, WITHIN).await
    }

    pub(crate) async fn image(&self, reference: &str) -> Result<ResolvedImage, Refusal> {
        self.ask(&ResolveImage { reference: reference.into(), ..Default::default() }).await
    }

    pub(crate) async fn refreshed(&self, reference: &str) -> Result<ResolvedImage, Refusal> {
        self.ask(&ResolveImage { reference: reference.into(), refresh: true, ..Default::default() }).await
    }

    /// As a user of that registry.
    pub(crate) async fn image_as(
        &self,
        reference: &str,
        registry: &str,
        login: &str,
    ) -> Result<ResolvedImage, Refusal> {
        let credentials = [(registry.to_owned(), login.to_owned())].into();
        self.image_with(reference, RegistryAuth { credentials, ..Default::default() }).await
    }

    pub(crate) async fn image_with(
        &self,
        reference: &str,
        registry: RegistryAuth,
    ) -> Result<ResolvedImage, Refusal> {
        let secrets = Secrets { registry, ..Default::default() };
        let secrets = secrets::seal(&self.open_key().seal_key(), &secrets).unwrap();
        self.ask(&ResolveImage { reference: reference.into(), secrets, ..Default::default() }).await
    }

    pub(crate) async fn find(&self, reference: &str) -> Result<String, Refusal> {
        self.ask(&FindImage { reference: reference.into() }).await.map(|found| found.digest)
    }

    pub(crate) async fn commit(&self, remote: &str, revision: &str) -> Result<String, Refusal> {
        let (remote_uri, revision) = (remote.into(), revision.into());
        let question = ResolveCommit { remote_uri, revision, ..Default::default() };
        self.ask(&question).await.map(|resolved| resolved.commit)
    }

    /// As a user of the remote.
    pub(crate) async fn commit_as(
        &self,
        remote: &str,
        revision: &str,
        username: &str,
        password: &str,
    ) -> Result<String, Refusal> {
        let secrets =
            Secrets { git_username: username.into(), git_password: password.into(), ..Default::default() };
        let secrets = secrets::seal(&self.open_key().seal_key(), &secrets).unwrap();
        let question = ResolveCommit { remote_uri: remote.into(), revision: revision.into(), secrets };
        self.ask(&question).await.map(|resolved| resolved.commit)
    }
}

async fn connect(nats: &NatsServer) -> Bus {
    let connect = Connect { url: nats.url(), user: None, password: None, name: "test".into() };
    connect.connect().await.unwrap()
}
