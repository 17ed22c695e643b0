//! Git credentials that a URL gives once.

use anyhow::{Context as _, Result, ensure};
use kiln_contract::error::Code;
use kiln_contract::orchestrator::source_to_json;
use kiln_contract::secrets::Secrets;
use kiln_domain::source::{DockerfileSource, Source};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio_util::task::TaskTracker;

use crate::stage::{Stage, config};

/// Answers the first request with credentials, and each other with 404; its URL.
async fn once() -> Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}/secret-path", listener.local_addr()?);
    TaskTracker::new().spawn(async move {
        let mut answer = "HTTP/1.1 200 OK\r\ncontent-length: 13\r\n\r\nann:pass:word";
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.read(&mut [0; 4096]).await;
            let _ = stream.write_all(answer.as_bytes()).await;
            answer = "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n";
        }
    });
    Ok(url)
}

#[tokio::test]
async fn they_are_asked_for_once_and_kept_for_the_build() -> Result<()> {
    let stage = Stage::set().await?;
    let _orchestrator = stage.orchestrator(config()).await?;
    let sealed = stage.seal(&Secrets { git_one_time_url: once().await?, ..Secrets::default() })?;
    let source = |remote: &str| {
        let dockerfile = DockerfileSource { remote_uri: remote.into(), ..DockerfileSource::default() };
        source_to_json(&Source::Dockerfile(dockerfile))
    };
    let begun = source("https://git.test/x.git")?;
    let build = stage
        .begin("x", |question| {
            question.source = begun;
            question.clone_target = Some("main".into());
            question.secrets = sealed.clone();
        })
        .await?;
    let asked = stage.asked_with()?;
    for secrets in asked.iter().chain([&stage.kept_for(&build.id).await?]) {
        ensure!((secrets.git_username.as_str(), secrets.git_password.as_str()) == ("ann", "pass:word"));
        ensure!(secrets.git_one_time_url.is_empty(), "it would be asked again");
    }
    ensure!(asked.len() == 1);
    // Another build with the same URL has none; and what is said of it doesn't show the URL.
    let other = source("https://git.test/other.git")?;
    let refused = stage.ask("y", |question| {
        question.source = other;
        question.clone_target = Some("main".into());
        question.secrets = sealed;
    });
    let refusal = refused.await.err().context("a refusal")?;
    ensure!(refusal.code == Code::InvalidArgument && refusal.message.contains("404"), "{refusal:?}");
    ensure!(!refusal.message.contains("secret-path"), "{refusal:?}");
    Ok(())
}
