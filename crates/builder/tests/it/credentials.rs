//! Git credentials: shown to the remote's own host, and to nobody else.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};

use anyhow::{Context as _, Result, ensure};
use kiln_domain::failure::FailureReason;
use kiln_domain::run::RunSecrets;
use kiln_testkit::workshop::Workshop;

use crate::run::{failed, run};

/// `o'brien:pa"ss\$word` in base64.
const SHOWN: &str = "Basic bydicmllbjpwYSJzc1wkd29yZA==";
const UNAUTHORIZED: &str = "HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"x\"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
const NOT_FOUND: &str = "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";

/// A git server that only ever asks who is there; its address and the credentials that it was shown.
fn server(unauthorized: String) -> Result<(String, Receiver<String>)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?.to_string();
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let _ = stream.map(|stream| answer(stream, &unauthorized, &sender));
        }
    });
    Ok((address, receiver))
}

fn answer(mut stream: TcpStream, unauthorized: &str, shown: &Sender<String>) -> Result<()> {
    let mut credential = None;
    for line in BufReader::new(stream.try_clone()?).lines() {
        let line = line?;
        if line.is_empty() {
            break;
        }
        if let Some(value) = line.strip_prefix("Authorization: ") {
            credential = Some(value.to_owned());
        }
    }
    let reply = if credential.is_some() { NOT_FOUND } else { unauthorized };
    if let Some(credential) = credential {
        shown.send(credential)?;
    }
    stream.write_all(reply.as_bytes())?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_username_alone_is_a_token() -> Result<()> {
    let workshop = Workshop::new().await?;
    let repository = workshop.repository(&[("Dockerfile", "FROM scratch\n")], &[])?;
    let secrets = RunSecrets { git_username: "t0ken".into(), ..RunSecrets::default() };
    let (address, shown) = server(UNAUTHORIZED.into())?;
    let spec = workshop.build(&repository, |source| source.remote_uri = format!("http://{address}/x"))?;
    failed(&run(&workshop, &spec, &secrets)?.0, FailureReason::Context)?;
    // `t0ken:` in base64.
    ensure!(shown.try_iter().next().as_deref() == Some("Basic dDBrZW46"), "not shown to the remote");
    Ok(())
}

/// The second server speaks no TLS: that git gets as far as its handshake is enough.
#[tokio::test(flavor = "multi_thread")]
async fn a_remote_may_send_from_http_to_https() -> Result<()> {
    let workshop = Workshop::new().await?;
    let repository = workshop.repository(&[("Dockerfile", "FROM scratch\n")], &[])?;
    let (plain, _) = server(UNAUTHORIZED.into())?;
    let (address, _) = server(format!(
        "HTTP/1.1 302 Found\r\nLocation: https://{plain}/x/info/refs?service=git-upload-pack\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    ))?;
    let spec = workshop.build(&repository, |source| source.remote_uri = format!("http://{address}/x"))?;
    let failure = failed(&run(&workshop, &spec, &RunSecrets::default())?.0, FailureReason::Context)?;
    let message = failure.message.to_lowercase();
    ensure!(message.contains("tls") || message.contains("ssl"), "{failure}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn they_reach_their_own_host_alone() -> Result<()> {
    let workshop = Workshop::new().await?;
    let repository = workshop.repository(&[("Dockerfile", "FROM scratch\n")], &[])?;
    let secrets = RunSecrets {
        git_username: "o'brien".into(),
        git_password: Some("pa\"ss\\$word".into()),
        ..RunSecrets::default()
    };
    let (own, shown) = server(UNAUTHORIZED.into())?;
    let (other, shown_to_other) = server(UNAUTHORIZED.into())?;
    let port = other.rsplit(':').next().context("no port")?;
    let redirect = format!(
        "HTTP/1.1 302 Found\r\nLocation: http://localhost:{port}/x/info/refs?service=git-upload-pack\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    );
    let (redirecting, _) = server(redirect)?;
    for address in [&own, &redirecting] {
        let spec = workshop.build(&repository, |source| source.remote_uri = format!("http://{address}/x"))?;
        let (outcome, output) = run(&workshop, &spec, &secrets)?;
        let failure = failed(&outcome, FailureReason::Context)?;
        ensure!(failure.message.contains(address.as_str()), "{failure}");
        ensure!(!format!("{failure}{output}").contains("word"), "the password shows: {failure} {output}");
    }
    ensure!(
        shown.try_iter().collect::<Vec<_>>().first().map(String::as_str) == Some(SHOWN),
        "not shown to the remote"
    );
    let told: Vec<_> = shown_to_other.try_iter().collect();
    ensure!(told.is_empty(), "shown to another host: {told:?}");
    Ok(())
}
