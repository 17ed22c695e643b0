//! What the layer cache in the registry saves, and what Kiln adds to BuildKit. Everything is measured in pairs within one
//! run, by turns, on one daemon; figures are ratios. Prints, and asserts only that builds succeed and where their steps came from.
//!
//! - ten steps from cold; again on an emptied daemon; with the last step changed, on an emptied daemon;
//! - the same by buildctl by hand, with the same options;
//! - eight builds at once, and eight by hand.

#![expect(
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::indexing_slicing,
    reason = "a benchmark measures time, prints figures, and may end where a test may"
)]

mod figures;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use kiln_domain::run_folder::Settings;
use kiln_proto::kiln_v1 as api;
use kiln_testkit::installation::{Installation, program};
use kiln_testkit::workshop::{Repository, Workshop, git, tools_folder, until};
use tokio::task::JoinSet;

use crate::figures::figures;

const PAIRS: usize = 5;
const AT_ONCE: usize = 8;
const STEPS: usize = 10;

/// A Kiln with BuildKit, the daemon and the registry of which the builds by hand use too.
struct Bench {
    kiln: Installation,
    workshop: Workshop,
    buildctl: PathBuf,
    by_hand: tempfile::TempDir,
}

#[tokio::main]
async fn main() -> Result<()> {
    let mut settings = Settings::new("/".into());
    settings.programs = tools_folder();
    if let Some(missing) = kiln_builder::missing(&settings) {
        println!("left out: {missing} is not here; `scripts/bootstrap --buildkit` brings BuildKit");
        return Ok(());
    }
    let kiln =
        Installation::start_with(&program()?, &["--builder=buildkit"], &[("KILN_ORCHESTRATOR__SLOTS", "8")])
            .await?;
    let in_folder = tools_folder().map(|folder| folder.join("buildctl")).filter(|program| program.exists());
    let bench = Bench {
        kiln,
        workshop: Workshop::new().await?,
        buildctl: in_folder.unwrap_or_else(|| "buildctl".into()),
        by_hand: tempfile::tempdir()?,
    };
    // The first build starts the daemon.
    let first = bench.repository("first", 1, "")?;
    bench.through_kiln(&first).await?;
    bench.cached().await?;
    bench.at_once().await
}

impl Bench {
    /// Steps that take some time each, no two of which are the same anywhere.
    fn repository(&self, name: &str, steps: usize, last: &str) -> Result<Repository> {
        let mut dockerfile = "FROM scratch\nCOPY busybox /bin/sh\n".to_owned();
        for step in 0..steps {
            let last = if step + 1 == steps { last } else { "" };
            dockerfile.push_str(&format!(
                "RUN echo {name} {step} {last} > /{step}; dd if=/dev/zero bs=1M count=60 | sha256sum >> /{step}\n"
            ));
        }
        self.workshop.repository(&[("Dockerfile", &dockerfile)], &["."])
    }

    async fn cached(&self) -> Result<()> {
        let (mut cold, mut cold_by_hand, mut again, mut changed) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let [mut of_again, mut of_changed, mut of_hand, mut of_hand_again] = [const { Vec::new() }; 4];
        for pair in 0..PAIRS {
            let through = self.repository(&format!("kiln {pair}"), STEPS, "")?;
            self.empty()?;
            let (first, _) = self.through_kiln(&through).await?;
            self.empty()?;
            let (second, build) = self.through_kiln(&through).await?;
            let ran =
                build.steps.iter().filter(|step| !step.cached && !step.name.starts_with("FROM ")).count();
            ensure!(ran == 0, "{ran} steps were not in the cache: {build:?}");
            let dockerfile = std::fs::read_to_string(through.path.join("Dockerfile"))?;
            let last = format!("kiln {pair} {} ", STEPS - 1);
            std::fs::write(
                through.path.join("Dockerfile"),
                dockerfile.replace(&last, &format!("{last} changed ")),
            )?;
            // By a branch of its own: what a name stands for is kept for some seconds.
            git(&through.path, &["checkout", "--quiet", "-b", "changed"])?;
            through.commit_all()?;
            self.empty()?;
            let (third, build) = self.through_kiln_at(&through, "changed").await?;
            let ran =
                build.steps.iter().filter(|step| !step.cached && !step.name.starts_with("FROM ")).count();
            ensure!(ran == 1, "{ran} steps ran: {build:?}");

            let alone = self.repository(&format!("hand {pair}"), STEPS, "")?;
            self.empty()?;
            let by_hand = self.by_hand(&alone, &format!("{pair}-cold"), pair)?;
            self.export_by_hand(&format!("{pair}-cold"), pair)?;
            self.empty()?;
            let by_hand_again = self.by_hand(&alone, &format!("{pair}-again"), pair)?;

            let ratio = |a: Duration, b: Duration| a.as_secs_f64() / b.as_secs_f64();
            of_again.push(ratio(second, first));
            of_changed.push(ratio(third, first));
            of_hand.push(ratio(first, by_hand));
            of_hand_again.push(second.as_secs_f64() - by_hand_again.as_secs_f64());
            cold.push(first);
            again.push(second);
            changed.push(third);
            cold_by_hand.push(by_hand);
        }
        println!("{STEPS} steps from cold: {}; by hand {}", figures(&mut cold), figures(&mut cold_by_hand));
        println!(
            "again on an emptied daemon: {}; of cold {} (aim: at most 0.3)",
            figures(&mut again),
            spread(&mut of_again)
        );
        println!(
            "with the last step changed: {}; of cold {} (aim: at most 0.4)",
            figures(&mut changed),
            spread(&mut of_changed)
        );
        println!(
            "Kiln's whole time from cold, of buildctl's by hand: {} (aim: at most 1.05, or 150 ms more)",
            spread(&mut of_hand)
        );
        println!("again on an emptied daemon, seconds more than by hand: {}", spread(&mut of_hand_again));
        Ok(())
    }

    /// Eight different builds at once.
    async fn at_once(&self) -> Result<()> {
        let mut ratios = Vec::new();
        for round in 0..3 {
            let name = |who: &str, n| format!("{who} at once {round} {n}");
            let repositories =
                (0..AT_ONCE).map(|n| self.repository(&name("kiln", n), 2, "")).collect::<Result<Vec<_>>>()?;
            let begun = Instant::now();
            let mut ids = Vec::new();
            for repository in &repositories {
                ids.push(self.begin(repository, "").await?);
            }
            for id in &ids {
                self.kiln.until(id, over).await?;
            }
            let through = begun.elapsed();
            self.exported().await?;

            let repositories =
                (0..AT_ONCE).map(|n| self.repository(&name("hand", n), 2, "")).collect::<Result<Vec<_>>>()?;
            let begun = Instant::now();
            let mut running = JoinSet::new();
            for (n, repository) in repositories.into_iter().enumerate() {
                let (program, socket, registry) = (self.buildctl.clone(), self.socket(), self.registry()?);
                let folder = self.by_hand.path().join(format!("at-once-{round}-{n}"));
                running.spawn_blocking(move || {
                    fetch(&repository, &folder)?;
                    build(&program, &socket, &registry, &folder, &[])
                });
            }
            while let Some(built) = running.join_next().await {
                built??;
            }
            ratios.push(through.as_secs_f64() / begun.elapsed().as_secs_f64());
        }
        println!("{AT_ONCE} builds at once, of {AT_ONCE} by hand: {}", spread(&mut ratios));
        Ok(())
    }

    async fn begin(&self, repository: &Repository, revision: &str) -> Result<String> {
        let (remote_uri, revision) = (repository.uri.clone(), revision.to_owned());
        let git = api::GitContext { remote_uri, revision, ..Default::default() };
        let dockerfile = api::Dockerfile { git: Some(git), ..Default::default() };
        let source = api::Source { from: Some(api::source::From::Dockerfile(dockerfile)) };
        let request = api::BuildImageRequest { source: Some(source), force: true, ..Default::default() };
        let answer = self.kiln.client().await?.build_image(request).await?.into_inner();
        match answer.outcome {
            Some(api::build_image_response::Outcome::Build(build)) => Ok(build.id),
            other => anyhow::bail!("no build: {other:?}"),
        }
    }

    /// From the request to the build's end; its layers are in the registry when this returns.
    async fn through_kiln(&self, repository: &Repository) -> Result<(Duration, api::Build)> {
        self.through_kiln_at(repository, "").await
    }

    async fn through_kiln_at(
        &self,
        repository: &Repository,
        revision: &str,
    ) -> Result<(Duration, api::Build)> {
        let begun = Instant::now();
        let id = self.begin(repository, revision).await?;
        let build = self.kiln.until(&id, over).await?;
        let took = begun.elapsed();
        ensure!(build.state() == api::BuildState::Succeeded, "{build:?}");
        self.exported().await?;
        Ok((took, build))
    }

    async fn exported(&self) -> Result<()> {
        let folder = self.kiln.data().join("layers/layer-cache");
        let is_over = || {
            let entries = std::fs::read_dir(&folder).into_iter().flatten().flatten();
            Ok(entries.into_iter().all(|entry| !entry.path().is_dir()))
        };
        until("the layers are exported", is_over).await
    }

    /// The same steps by hand: fetch, build with the same options, push to the base, make the target of it.
    fn by_hand(&self, repository: &Repository, folder: &str, pair: usize) -> Result<Duration> {
        let folder = self.by_hand.path().join(folder);
        let begun = Instant::now();
        fetch(repository, &folder)?;
        let import = format!("type=registry,ref={}", self.cache(pair)?);
        build(&self.buildctl, &self.socket(), &self.registry()?, &folder, &["--import-cache", &import])?;
        Ok(begun.elapsed())
    }

    fn export_by_hand(&self, folder: &str, pair: usize) -> Result<()> {
        let export =
            format!("type=registry,ref={},mode=max,image-manifest=true,compression=zstd", self.cache(pair)?);
        let folder = self.by_hand.path().join(folder);
        build(&self.buildctl, &self.socket(), &self.registry()?, &folder, &["--export-cache", &export])
    }

    fn cache(&self, pair: usize) -> Result<String> {
        Ok(format!("{}/by-hand-cache:{pair}", self.registry()?))
    }

    fn registry(&self) -> Result<String> {
        self.kiln.endpoint("registry")
    }

    fn socket(&self) -> String {
        format!("unix://{}", self.kiln.data().join("layers/buildkit/buildkitd.sock").display())
    }

    fn empty(&self) -> Result<()> {
        must(Command::new(&self.buildctl).args(["--addr", &self.socket(), "prune", "--all"]))
    }
}

fn fetch(repository: &Repository, folder: &Path) -> Result<()> {
    std::fs::create_dir(folder)?;
    git(folder, &["ls-remote", &repository.uri, "HEAD"])?;
    git(folder, &["init", "--quiet", "."])?;
    git(folder, &["fetch", "--quiet", "--depth", "1", &repository.uri, &repository.commit])?;
    git(folder, &["checkout", "--quiet", "--detach", "FETCH_HEAD"])?;
    Ok(std::fs::remove_dir_all(folder.join(".git"))?)
}

fn build(buildctl: &Path, socket: &str, registry: &str, folder: &Path, options: &[&str]) -> Result<()> {
    let tag = folder.file_name().context("a folder")?.display();
    let output = format!(
        "type=image,\"name={registry}/by-hand-base:{tag},{registry}/by-hand:{tag}\",push=true,compression=gzip,force-compression=true"
    );
    must(
        Command::new(buildctl)
            .args(["--addr", socket, "build", "--progress=rawjson", "--frontend=dockerfile.v0"])
            .args(["--local", "context=.", "--local", "dockerfile=.", "--output", &output])
            .args(options)
            .current_dir(folder),
    )
}

fn must(command: &mut Command) -> Result<()> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("{command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn over(build: &api::Build) -> bool {
    !matches!(build.state(), api::BuildState::Queued | api::BuildState::Running)
}

fn spread(values: &mut [f64]) -> String {
    values.sort_by(f64::total_cmp);
    let last = values.len() - 1;
    format!("p50 {:.2}, from {:.2} to {:.2}", values[last / 2], values[0], values[last])
}
