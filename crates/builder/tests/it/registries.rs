//! Registry credentials: what a FROM may pull with, and what the push has for itself.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use kiln_domain::failure::FailureReason;
use kiln_domain::run::{RunResult, RunSecrets, Work};
use kiln_testkit::registry::{DockerRegistry, PASSWORD, USERNAME};
use kiln_testkit::workshop::Workshop;
use secrecy::SecretString;

use crate::run::{failed, run};

fn login(host: &str) -> BTreeMap<String, SecretString> {
    BTreeMap::from([(host.to_owned(), format!("{USERNAME}:{PASSWORD}").into())])
}

#[tokio::test(flavor = "multi_thread")]
async fn the_push_has_its_own_which_no_step_finds_and_no_from_pulls_with() -> Result<()> {
    let workshop = Workshop::with(DockerRegistry::start_with_password().await?)?;
    let at = workshop.registry.address();
    workshop.registry.push_image("private/base:1", "linux/amd64", &[("secret", b"x")]).await?;
    let push_only = RunSecrets { push: login(at), ..RunSecrets::default() };

    let search = "FROM scratch\nCOPY busybox /busybox\n\
         RUN [\"/busybox\", \"sh\", \"-c\", \"test -z \\\"$(/busybox find / -xdev -name '*auth.json')\\\"\"]\n";
    let repository = workshop.repository(&[("Dockerfile", search)], &["."])?;
    let spec = workshop.build(&repository, |_| {})?;
    let (outcome, output) = run(&workshop, &spec, &push_only)?;
    ensure!(matches!(outcome.result, RunResult::Pushed(_)), "{outcome:?} {output}");
    ensure!(workshop.pushed(&spec.target_ref).await?.is_some(), "nothing at the target");

    let from = format!("FROM {at}/private/base:1\n");
    let repository = workshop.repository(&[("Dockerfile", &from)], &[])?;
    let spec = workshop.build(&repository, |_| {})?;
    failed(&run(&workshop, &spec, &push_only)?.0, FailureReason::RegistryDenied)?;
    let spec = workshop.build(&repository, |_| {})?;
    let both = RunSecrets { registries: login(at), ..push_only.clone() };
    let (outcome, output) = run(&workshop, &spec, &both)?;
    ensure!(matches!(outcome.result, RunResult::Pushed(_)), "{outcome:?} {output}");

    // So it is with a copy, which takes no build tool.
    let copy =
        Work::Copy { from: workshop.registry.reference("private/base:1")?, platform: Default::default() };
    let spec = workshop.spec(copy.clone())?;
    failed(&run(&workshop, &spec, &push_only)?.0, FailureReason::RegistryDenied)?;
    let spec = workshop.spec(copy)?;
    let (outcome, output) = run(&workshop, &spec, &both)?;
    ensure!(matches!(outcome.result, RunResult::Pushed(_)), "{outcome:?} {output}");
    Ok(())
}
