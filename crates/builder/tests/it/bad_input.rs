//! What users get wrong: each has its reason, and a message that says what.

use std::os::unix::fs::symlink;

use anyhow::{Context as _, Result, ensure};
use kiln_domain::failure::FailureReason::{Context, Dockerfile, RegistryDenied};
use kiln_domain::run::{RunSecrets, RunSpec, Work};
use kiln_domain::source::DockerfileSource;
use kiln_testkit::registry::DockerRegistry;
use kiln_testkit::workshop::Workshop;

use crate::run::{failed, run};

#[tokio::test(flavor = "multi_thread")]
async fn each_mistake_is_named() -> Result<()> {
    let workshop = Workshop::new().await?;
    let registry = workshop.registry.address();
    let files = [
        ("Dockerfile", "FROM scratch\nCOPY Dockerfile /\n"),
        (
            "step",
            "FROM scratch\nCOPY busybox /bin/busybox\nRUN [\"/bin/busybox\", \"sh\", \"-c\", \"echo a word; exit 9\"]\n",
        ),
        ("syntax", "FROM scratch\nFRMO x\n"),
        ("nothing", "# nothing\n"),
        ("image", &format!("FROM {registry}/no/such:image\n")),
        ("badref", "FROM a//b\n"),
        ("copy", "FROM scratch\nCOPY no-such-file /\n"),
    ];
    let repository = workshop.repository(&files, &["."])?;
    symlink("/etc/passwd", repository.path.join("link"))?;
    let mut repository = repository;
    repository.commit = repository.commit_all()?;

    let by_path = |path: &'static str| move |source: &mut DockerfileSource| source.path = path.into();
    type Change = Box<dyn FnOnce(&mut DockerfileSource)>;
    let cases: Vec<(Change, _, &str)> = vec![
        (Box::new(by_path("step")), Dockerfile, "failed with exit code 9"),
        (Box::new(by_path("syntax")), Dockerfile, "nknown instruction"),
        (Box::new(by_path("nothing")), Dockerfile, "no stages"),
        (Box::new(by_path("image")), Dockerfile, "no/such"),
        (Box::new(by_path("badref")), Dockerfile, "invalid reference"),
        (Box::new(by_path("copy")), Dockerfile, "no-such-file"),
        (Box::new(by_path("missing/Dockerfile")), Context, "Dockerfile `missing/Dockerfile` is not in"),
        (
            Box::new(by_path("link")),
            Context,
            "Dockerfile `link` is a symlink that leads out of the repository",
        ),
        (Box::new(by_path("../x")), Context, "must not leave the repository"),
        (Box::new(|source| source.context_path = "no".into()), Context, "context `no` is not in"),
        (Box::new(|source| source.target = "no-such-stage".into()), Dockerfile, "no-such-stage"),
        (
            Box::new(|source| source.remote_uri = "file:///no/such/repository".into()),
            Context,
            "/no/such/repository",
        ),
        (Box::new(|source| source.remote_uri = "ext::sh -c touch% x".into()), Context, "scheme"),
        (Box::new(|source| source.remote_uri = "--upload-pack=touch x".into()), Context, "scheme"),
    ];
    for (change, reason, part) in cases {
        let spec = workshop.build(&repository, change)?;
        check(&workshop, &spec, reason, part).await?;
    }
    let mut spec = workshop.build(&repository, |_| {})?;
    if let Work::Build { commit, .. } = &mut spec.work {
        *commit = "0123456789012345678901234567890123456789".into();
    }
    check(&workshop, &spec, Context, "0123456789012345678901234567890123456789 is not in").await?;
    let mut spec = workshop.build(&repository, |_| {})?;
    spec.file_remotes = false;
    check(&workshop, &spec, Context, "file:// is not admitted").await?;
    let spec = workshop.spec(Work::Copy {
        from: workshop.registry.reference("no/such:image")?,
        platform: Default::default(),
    })?;
    check(&workshop, &spec, Context, "does not exist").await
}

async fn check(
    workshop: &Workshop,
    spec: &RunSpec,
    reason: kiln_domain::failure::FailureReason,
    part: &str,
) -> Result<()> {
    let (outcome, output) = run(workshop, spec, &RunSecrets::default())?;
    let failure = failed(&outcome, reason).with_context(|| format!("for `{part}`; {output}"))?;
    ensure!(failure.message.contains(part), "`{failure}` does not say `{part}`");
    let folder = workshop.runs().display().to_string();
    ensure!(!failure.message.contains(&folder), "`{failure}` tells where it was built");
    ensure!(workshop.pushed(&spec.target_ref).await?.is_none(), "it pushed");
    let left = workshop.left(&spec.run)?;
    let left: Vec<_> = left
        .iter()
        .filter(|left| left.contains("work") || left.starts_with("container") || left.ends_with("/merged"))
        .collect();
    ensure!(
        left.iter().all(|left| left.contains("/runs/") && !left.ends_with("/work")),
        "`{part}` left {left:?}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_wants_other_credentials() -> Result<()> {
    let workshop = Workshop::with(DockerRegistry::start_with_password().await?)?;
    let repository = workshop.repository(&[("Dockerfile", "FROM scratch\nCOPY Dockerfile /\n")], &[])?;
    let spec = workshop.build(&repository, |_| {})?;
    let mut secrets = RunSecrets::default();
    secrets.registries.insert(workshop.registry.address().into(), "kiln:wr0ng".to_owned().into());
    for secrets in [RunSecrets::default(), secrets] {
        let spec = RunSpec { run: workshop.build(&repository, |_| {})?.run, ..spec.clone() };
        let (outcome, output) = run(&workshop, &spec, &secrets)?;
        let failure = failed(&outcome, RegistryDenied).context(output.clone())?;
        ensure!(!failure.message.contains("wr0ng") && !output.contains("wr0ng"), "the password shows");
    }
    Ok(())
}
