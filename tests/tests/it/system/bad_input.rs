//! What a user can get wrong: each has its gRPC code and a message that names the field, and leaves nothing running.

use anyhow::{Result, ensure};
use kiln_proto::kiln_v1 as api;
use tonic::Code;

use super::{DOCKERFILE, Stage, dockerfile, image, is_over};

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_are_wrong_are_refused_by_name() -> Result<()> {
    let stage = Stage::set().await?;
    let repository = stage.workshop.repository(&[("Dockerfile", DOCKERFILE)], &[])?;
    let registry = stage.workshop.registry.address();
    let good = || dockerfile(&repository.uri, |_| {});
    let remote = |uri: &str| dockerfile(uri, |_| {});
    let path = |path: &str| dockerfile(&repository.uri, |dockerfile| dockerfile.path = path.into());
    let context =
        |path: &str| dockerfile(&repository.uri, |dockerfile| dockerfile.context_path = path.into());
    let revision = |revision: &str| {
        dockerfile(&repository.uri, |dockerfile| {
            if let Some(git) = dockerfile.git.as_mut() {
                git.revision = revision.into();
            }
        })
    };
    let gone = format!("{}-gone", repository.uri);
    let cases = [
        (api::BuildImageRequest::default(), Code::InvalidArgument, "source"),
        (image("UPPER/x"), Code::InvalidArgument, "source.image"),
        (image("a//b"), Code::InvalidArgument, "source.image"),
        (image("x:tag:tag"), Code::InvalidArgument, "source.image"),
        (image(&"a".repeat(300)), Code::InvalidArgument, "source.image"),
        (image(&format!("{registry}/no/such:1")), Code::NotFound, "no/such"),
        (remote("--upload-pack=touch /tmp/x"), Code::InvalidArgument, "source.dockerfile.git.remote_uri"),
        (remote("ext::sh -c true"), Code::InvalidArgument, "source.dockerfile.git.remote_uri"),
        (
            remote("https://user:password@127.0.0.1/x"),
            Code::InvalidArgument,
            "source.dockerfile.git.remote_uri",
        ),
        (remote(&gone), Code::NotFound, "source.dockerfile.git.remote_uri"),
        (revision("no-such-branch"), Code::NotFound, "source.dockerfile.git.revision"),
        (revision("--upload-pack=x"), Code::InvalidArgument, "source.dockerfile.git.revision"),
        (path("../../etc/passwd"), Code::InvalidArgument, "source.dockerfile.path"),
        (path("/etc/passwd"), Code::InvalidArgument, "source.dockerfile.path"),
        (context("../.."), Code::InvalidArgument, "source.dockerfile.context_path"),
        (
            api::BuildImageRequest { secrets: [("../x".to_owned(), b"y".to_vec())].into(), ..good() },
            Code::InvalidArgument,
            "secrets",
        ),
        (
            dockerfile(&repository.uri, |dockerfile| dockerfile.platforms = vec!["arm64".into()]),
            Code::InvalidArgument,
            "source.dockerfile.platforms",
        ),
        (
            api::BuildImageRequest { labels: [("k".to_owned(), "v".repeat(300_000))].into(), ..good() },
            Code::InvalidArgument,
            "labels",
        ),
        (
            api::BuildImageRequest {
                timeout: Some(prost_types::Duration { seconds: -1, nanos: 0 }),
                ..good()
            },
            Code::InvalidArgument,
            "timeout",
        ),
    ];
    for (request, code, names) in cases {
        let about = format!("{:.200}", format!("{request:?}"));
        let status = match stage.ask(request).await {
            Ok(answer) => anyhow::bail!("{about}: taken: {answer:?}"),
            Err(status) => status,
        };
        ensure!(status.code() == code && status.message().contains(names), "{about}: {status:?}");
        ensure!(!status.message().contains("password@"), "{status:?}");
    }
    let mut client = stage.kiln.client().await?;
    ensure!(client.list_builds(api::ListBuildsRequest::default()).await?.into_inner().builds.is_empty());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn ids_and_tokens_that_are_made_up() -> Result<()> {
    let stage = Stage::set().await?;
    let mut client = stage.kiln.client().await?;
    let unknown = format!("{}-{}-abcdefghij0", "0".repeat(16), "1".repeat(16));
    let long = "x".repeat(10 << 10);
    for (id, code) in [
        (unknown.as_str(), Code::NotFound),
        ("", Code::InvalidArgument),
        ("../x", Code::InvalidArgument),
        ("*", Code::InvalidArgument),
        (">", Code::InvalidArgument),
        (&long, Code::InvalidArgument),
    ] {
        let id = id.to_owned();
        let status = client.build_status(api::BuildStatusRequest { id: id.clone() }).await.err();
        let watch = client.watch_build(api::WatchBuildRequest { id: id.clone() }).await.err();
        let cancel =
            client.cancel_build(api::CancelBuildRequest { id: id.clone(), ..Default::default() }).await.err();
        let logs = client
            .build_logs(api::BuildLogsRequest { id: id.clone(), follow: true, start: None })
            .await
            .err();
        for (call, error) in [("status", status), ("watch", watch), ("cancel", cancel), ("logs", logs)] {
            ensure!(error.as_ref().map(tonic::Status::code) == Some(code), "{call} {id:.20}: {error:?}");
        }
    }
    let request = api::ListBuildsRequest { page_token: "made-up".into(), ..Default::default() };
    let error = client.list_builds(request).await.unwrap_err();
    ensure!(error.code() == Code::InvalidArgument && error.message().contains("page_token"), "{error:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_repository_lacks_is_the_users_failure() -> Result<()> {
    let stage = Stage::set().await?;
    let repository = stage.workshop.repository(&[("Dockerfile", DOCKERFILE)], &[])?;
    std::os::unix::fs::symlink("/etc/passwd", repository.path.join("out"))?;
    repository.commit_all()?;
    let path = |path: &str| dockerfile(&repository.uri, |dockerfile| dockerfile.path = path.into());
    let context =
        |path: &str| dockerfile(&repository.uri, |dockerfile| dockerfile.context_path = path.into());
    for (request, names) in
        [(path("no/Dockerfile"), "no/Dockerfile"), (context("nowhere"), "nowhere"), (path("out"), "out")]
    {
        let build = super::begun(stage.ask(request).await?)?;
        let over = stage.kiln.until(&build.id, is_over).await?;
        ensure!(over.reason() == api::FailureReason::Context && over.message.contains(names), "{over:?}");
        stage.kiln.whole_log(&build.id).await?;
    }
    Ok(())
}
