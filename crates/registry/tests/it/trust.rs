//! A real registry under TLS, signed by an authority that no system knows.

use std::path::PathBuf;
use std::sync::Arc;

use kiln_domain::reference::Digest;
use kiln_domain::registries::{ClientCertificate, Reach, Registries};
use kiln_registry::{Access, Config, Error, Keyring, OciRegistry, Problem, Registry as _};
use kiln_testkit::authority::Authority;
use kiln_testkit::front::{Front, Reply};
use kiln_testkit::registry::{DockerRegistry, PASSWORD, USERNAME};
use tokio::time::Instant;

use crate::{LONG, amd64};

fn client(registry: &str, ca: Option<PathBuf>, client_certificate: Option<[PathBuf; 2]>) -> OciRegistry {
    let client_certificate =
        client_certificate.map(|[certificate, key]| ClientCertificate { certificate, key });
    let reach = Reach { ca, client_certificate, plain_http: Some(false), ..Reach::default() };
    let registries: Registries = [(registry.to_owned(), reach)].into_iter().collect();
    OciRegistry::new(Config { registries, ..Config::default() })
}

fn access(registry: &str) -> Access {
    let mut keyring = Keyring::default();
    keyring.insert(registry, &format!("{USERNAME}:{PASSWORD}").into()).unwrap();
    let mut access = Access::new(Arc::new(keyring), Instant::now() + LONG);
    access.patience = std::time::Duration::ZERO;
    access
}

fn tls_problem(answer: Result<Option<Digest>, Error>) -> String {
    match answer {
        Err(Error::Unavailable { problem: Problem::Tls(problem), .. }) => problem,
        other => panic!("no trouble with TLS: {other:?}"),
    }
}

#[tokio::test]
async fn an_authority_of_ones_own_is_believed_where_it_is_named_and_nowhere_else() {
    let authority = Authority::new().unwrap();
    let registry = DockerRegistry::start_with_tls(&authority, false).await.unwrap();
    let digest = registry.push_image("team/app:1", "linux/amd64", &[("a", b"b")]).await.unwrap();
    let (image, access) = (registry.reference("team/app:1").unwrap(), access(registry.address()));
    let address = registry.address();

    let trusts = client(address, Some(authority.ca()), None);
    assert_eq!(trusts.resolve(&image, &amd64(), &access).await.unwrap(), digest);
    let to = registry.reference("ws/app:1").unwrap();
    assert_eq!(
        trusts.copy(&image, &to, Some(&amd64()), &access, &mut |_| Ok(Box::new(()))).await.unwrap(),
        digest
    );
    // A host without a port stands for all of its ports.
    let trusts = client("127.0.0.1", Some(authority.ca()), None);
    assert_eq!(trusts.digest(&image, &access).await.unwrap(), Some(digest));

    for ca in [None, Some(Authority::new().unwrap().ca())] {
        tls_problem(client(address, ca, None).digest(&image, &access).await);
    }
}

#[tokio::test]
async fn a_client_certificate_is_shown_to_its_own_registry() {
    let authority = Authority::new().unwrap();
    let registry = DockerRegistry::start_with_tls(&authority, true).await.unwrap();
    let digest = registry.push_image("team/app:1", "linux/amd64", &[("a", b"b")]).await.unwrap();
    let (image, access) = (registry.reference("team/app:1").unwrap(), access(registry.address()));
    let address = registry.address();

    let shows = client(address, Some(authority.ca()), Some(authority.client()));
    assert_eq!(shows.digest(&image, &access).await.unwrap(), Some(digest));
    tls_problem(client(address, Some(authority.ca()), None).digest(&image, &access).await);

    // Where another registry leads on to it, the other's certificate is not shown.
    let to = format!("https://{address}/v2/team/app/manifests/1");
    let front = Front::start(move |_| Reply::status(307).header("location", to.clone())).await.unwrap();
    let led: kiln_domain::reference::ImageReference =
        format!("{}/team/app:1", front.address).parse().unwrap();
    let [certificate, key] = authority.client();
    let own = Some(ClientCertificate { certificate, key });
    let leads = |client_certificate: &Option<ClientCertificate>| {
        let ca = Some(authority.ca());
        let there = Reach { ca, client_certificate: client_certificate.clone(), ..Reach::default() };
        let front_own = own.clone().filter(|_| client_certificate.is_none());
        let leads_on = Reach { plain_http: Some(true), client_certificate: front_own, ..Reach::default() };
        let entries = [(front.address.clone(), leads_on), (address.to_owned(), there)];
        OciRegistry::new(Config { registries: entries.into_iter().collect(), ..Config::default() })
    };
    tls_problem(leads(&None).digest(&led, &access).await);
    // With its own certificate the connection is made; the password stays behind, as ever.
    let error = leads(&own).digest(&led, &access).await.unwrap_err();
    assert!(matches!(error, Error::Unauthenticated { .. }), "{error}");
}

#[tokio::test]
async fn files_are_read_anew_when_they_change_and_broken_ones_change_nothing() {
    let (authority, another) = (Authority::new().unwrap(), Authority::new().unwrap());
    let registry = DockerRegistry::start_with_tls(&authority, false).await.unwrap();
    let digest = registry.push_image("app:1", "linux/amd64", &[]).await.unwrap();
    let (image, access) = (registry.reference("app:1").unwrap(), access(registry.address()));
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("ca.crt");
    let client = client(registry.address(), Some(file.clone()), None);

    let missing = tls_problem(client.digest(&image, &access).await);
    assert!(missing.starts_with(&format!("{} can't be read", file.display())), "{missing}");
    std::fs::write(&file, "no certificate").unwrap();
    let broken = tls_problem(client.digest(&image, &access).await);
    assert_eq!(broken, format!("{} holds no certificate", file.display()));

    // As a mounted secret changes: a link to a file is moved to another.
    let swap = |to: PathBuf| {
        let link = folder.path().join("new");
        std::os::unix::fs::symlink(to, &link).unwrap();
        std::fs::rename(link, &file).unwrap();
    };
    swap(authority.ca());
    assert_eq!(client.digest(&image, &access).await.unwrap(), Some(digest.clone()));
    std::fs::remove_file(&file).unwrap();
    assert_eq!(client.digest(&image, &access).await.unwrap(), Some(digest.clone()), "the former one stays");
    std::fs::write(&file, "no certificate").unwrap();
    assert_eq!(client.digest(&image, &access).await.unwrap(), Some(digest), "the former one stays");
    swap(another.ca());
    tls_problem(client.digest(&image, &access).await);
}
