//! What Kiln adds to a build, each figure beside its baseline where it has one. Prints, and asserts nothing.
//!
//! - from BuildImage's answer to the first line of the builder's `main`, the box idle;
//! - a small build through Kiln, and the same steps by hand, in pairs;
//! - resident memory of each idle role;
//! - from the start of `kiln up` to its ready line.

#![expect(
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::indexing_slicing,
    reason = "a benchmark measures time, prints figures, and may end where a test may"
)]

mod figures;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use kiln_proto::kiln_v1 as api;
use kiln_testkit::installation::{Installation, program};
use kiln_testkit::nats;
use kiln_testkit::workshop::{Repository, Workshop};

use crate::figures::figures;

const DISPATCHES: usize = 40;
const PAIRS: usize = 10;
const STARTS: usize = 5;
/// Between two looks at the output: the error of what is measured with it.
const LOOK: Duration = Duration::from_micros(200);

#[tokio::main]
async fn main() -> Result<()> {
    let program = program()?;
    println!("program: {}", program.file_name().map(|name| name.display().to_string()).unwrap_or_default());
    starts(&program).await?;
    memory(&program).await?;
    let workshop = Workshop::new().await?;
    let kiln = Installation::start(&program, &[]).await?;
    dispatch(&kiln, &workshop).await?;
    pairs(&kiln, &workshop).await
}

async fn starts(program: &Path) -> Result<()> {
    let mut fresh = Vec::new();
    let mut again = Vec::new();
    for _ in 0..STARTS {
        let begun = Instant::now();
        let mut kiln = Installation::start(program, &[]).await?;
        fresh.push(begun.elapsed());
        kiln.terminate().await?;
        let begun = Instant::now();
        kiln.start_again().await?;
        again.push(begun.elapsed());
    }
    println!(
        "start to ready: on a new data directory {}; again {} (aim: under 1 s)",
        figures(&mut fresh),
        figures(&mut again)
    );
    Ok(())
}

async fn memory(program: &Path) -> Result<()> {
    let server = nats::run_server().await?;
    let folder = tempfile::tempdir()?;
    let seed = kiln_bus::seal::OpenKey::new_seed()?;
    let file = folder.path().join("kiln.json");
    let config = serde_json::json!({
        "nats": {"url": server.url()},
        "seal": {"seed": secrecy::ExposeSecret::expose_secret(&seed)},
        "streams": {"journal_max_bytes": 64 << 20, "logs_max_bytes": 64 << 20},
        "listen": {"grpc": "127.0.0.1:0", "health": "127.0.0.1:0", "metrics": "127.0.0.1:0"},
        "engine": {"local": {"folder": folder.path().join("engine")}},
        "orchestrator": {
            "base_image_repository": "127.0.0.1:5000/base",
            "workspace_image_repository": "127.0.0.1:5000/workspace"
        }
    });
    std::fs::write(&file, config.to_string())?;
    for role in ["gateway", "resolver", "orchestrator", "log-relay", "cache-warmer"] {
        let mut child = Command::new(program)
            .arg(role)
            .arg("--config")
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        tokio::time::sleep(Duration::from_secs(5)).await;
        let ended = child.try_wait()?;
        ensure!(ended.is_none(), "the {role} ended: {ended:?}");
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id()))?;
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
        let anonymous = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("RssAnon")?;
        println!(
            "resident, idle: {role} {}, of it anonymous {} (aim: under 15 MB)",
            resident.trim(),
            anonymous.trim()
        );
        child.kill()?;
        child.wait()?;
    }
    Ok(())
}

/// Copies of images that differ: nothing but dispatch, a manifest and a layer.
async fn dispatch(kiln: &Installation, workshop: &Workshop) -> Result<()> {
    let mut client = kiln.client().await?;
    let mut took = Vec::new();
    for n in 0..DISPATCHES {
        let name = format!("source:{n}");
        workshop.registry.push_image(&name, "linux/amd64", &[("n", n.to_string().as_bytes())]).await?;
        let reference = workshop.registry.reference(&name)?.to_string();
        let source = api::Source { from: Some(api::source::From::Image(reference)) };
        let request = api::BuildImageRequest { source: Some(source), ..Default::default() };
        let answer = client.build_image(request).await?.into_inner();
        let answered = Instant::now();
        let Some(api::build_image_response::Outcome::Build(build)) = answer.outcome else {
            anyhow::bail!("no build: {answer:?}")
        };
        let run = format!("{}1", build.id.strip_suffix('0').context("an id")?);
        let output = find_output(kiln, &run).await?;
        while std::fs::metadata(&output).map_or(0, |metadata| metadata.len()) == 0 {
            ensure!(answered.elapsed() < Duration::from_secs(10), "the builder wrote nothing");
            // Not spinning: the builder needs the cores.
            std::thread::sleep(LOOK);
        }
        took.push(answered.elapsed());
        kiln.until(&build.id, over).await?;
    }
    println!(
        "BuildImage's answer to the builder's first line: {} (aim: p50 under 10 ms)",
        figures(&mut took)
    );
    Ok(())
}

/// The output file of a run, once it is there.
async fn find_output(kiln: &Installation, run: &str) -> Result<std::path::PathBuf> {
    let begun = Instant::now();
    let runs = ["runs", "engine/runs"].map(|folder| kiln.data().join(folder));
    loop {
        for folder in &runs {
            let output = folder.join(run).join("output");
            if output.exists() {
                return Ok(output);
            }
        }
        ensure!(begun.elapsed() < Duration::from_secs(10), "no run {run} under {:?}", kiln.data());
        std::thread::sleep(LOOK);
    }
}

/// A small build through Kiln and by hand, by turns, each of a repository of its own.
async fn pairs(kiln: &Installation, workshop: &Workshop) -> Result<()> {
    let by_hand = tempfile::tempdir()?;
    let mut client = kiln.client().await?;
    let (mut with, mut without, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for n in 0..PAIRS {
        let content = |who: &str| {
            format!(
                "FROM scratch\nCOPY busybox /bin/busybox\nRUN [\"/bin/busybox\", \"echo\", \"{who} {n}\"]\n\
                 RUN [\"/bin/busybox\", \"touch\", \"/made\"]\n"
            )
        };
        let repository = workshop.repository(&[("Dockerfile", &content("kiln"))], &["."])?;
        let git = api::GitContext { remote_uri: repository.uri.clone(), ..Default::default() };
        let dockerfile = api::Dockerfile { git: Some(git), ..Default::default() };
        let source = api::Source { from: Some(api::source::From::Dockerfile(dockerfile)) };
        let request = api::BuildImageRequest { source: Some(source), ..Default::default() };
        let begun = Instant::now();
        let answer = client.build_image(request).await?.into_inner();
        let Some(api::build_image_response::Outcome::Build(build)) = answer.outcome else {
            anyhow::bail!("no build: {answer:?}")
        };
        let ended = kiln.until(&build.id, over).await?;
        let through = begun.elapsed();
        ensure!(ended.state() == api::BuildState::Succeeded, "{ended:?}");

        let repository = workshop.repository(&[("Dockerfile", &content("hand"))], &["."])?;
        let begun = Instant::now();
        hand(&repository, workshop.registry.address(), by_hand.path(), n)?;
        let alone = begun.elapsed();
        // The first of each fills caches.
        if n > 0 {
            with.push(through);
            without.push(alone);
            ratios.push(through.as_secs_f64() / alone.as_secs_f64());
        }
    }
    ratios.sort_by(f64::total_cmp);
    println!(
        "a small build: through Kiln {}, by hand {}; ratio in pairs p50 {:.2}, from {:.2} to {:.2} (aim: at most 1.05, or 150 ms more)",
        figures(&mut with),
        figures(&mut without),
        ratios[ratios.len() / 2],
        ratios[0],
        ratios[ratios.len() - 1]
    );
    Ok(())
}

/// The same steps by hand: fetch, build, push to the base, copy to the target.
fn hand(repository: &Repository, registry: &str, folder: &Path, n: usize) -> Result<()> {
    let context = folder.join(format!("context-{n}"));
    std::fs::create_dir(&context)?;
    let run = |program: &str, arguments: &[&str]| -> Result<()> {
        let output =
            Command::new(program).args(arguments).current_dir(&context).stdin(Stdio::null()).output()?;
        ensure!(
            output.status.success(),
            "{program} {arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    };
    run("git", &["ls-remote", &repository.uri, "HEAD"])?;
    run("git", &["init", "--quiet", "."])?;
    run("git", &["fetch", "--quiet", "--depth", "1", &repository.uri, &repository.commit])?;
    run("git", &["checkout", "--quiet", "--detach", "FETCH_HEAD"])?;
    let root = folder.join("root").display().to_string();
    let runroot = folder.join("runroot").display().to_string();
    let store = ["--root", &root, "--runroot", &runroot, "--storage-driver", "overlay"];
    let image = format!("localhost/by-hand:{n}");
    let build = [
        "build",
        "--isolation",
        "chroot",
        "--layers",
        "--pull-always",
        "--force-rm",
        "--format",
        "docker",
        "--tag",
        &image,
        ".",
    ];
    run("buildah", &[&store[..], &build[..]].concat())?;
    for target in ["by-hand-base", "by-hand"] {
        let to = format!("docker://{registry}/{target}:{n}");
        run("buildah", &[&store[..], &["push", "--tls-verify=false", &image, &to][..]].concat())?;
    }
    Ok(())
}

fn over(build: &api::Build) -> bool {
    !matches!(build.state(), api::BuildState::Queued | api::BuildState::Running)
}
