//! A corpus of small Dockerfiles: each is built by BuildKit and by buildah, and the image's config and files are compared with
//! what the Dockerfile says, and with each other. What buildah can't do it refuses by its name.

mod case;
mod files;
mod image;
mod instructions;
mod syntax;

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use kiln_domain::failure::FailureReason::Dockerfile;
use kiln_domain::run::{RunResult, RunSecrets};
use kiln_domain::run_folder::Builder;
use kiln_testkit::registry::DockerRegistry;
use kiln_testkit::workshop::{Workshop, builder_program};
use tokio::task::JoinSet;

use self::case::{Buildah, Case};
use self::image::Image;
use crate::run::run;

/// In Dockerfiles of the corpus: an image of a static busybox, and one with ONBUILD triggers on top of that.
const BASE: &str = "BASE";
const TRIGGERS: &str = "TRIGGERS";

/// Cases that are built side by side.
const LANES: usize = 3;

/// One place for each tool; the images that Dockerfiles begin with are in a registry of their own.
struct Corpus {
    buildkit: Option<Workshop>,
    buildah: Workshop,
    bases: DockerRegistry,
}

impl Corpus {
    async fn start() -> Result<Self> {
        let bases = DockerRegistry::start().await?;
        let busybox = std::fs::read("/bin/busybox").context("busybox-static is missing")?;
        let users = b"root:x:0:0::/:/bin/sh\nann:x:1000:1001::/:/bin/sh\n";
        let groups = b"root:x:0:\nusers:x:1001:\ndaemon:x:7:\n";
        let files: [(&str, &[u8]); 4] =
            [("bin/sh", &busybox), ("etc/passwd", users), ("etc/group", groups), ("etc/old/file", b"old\n")];
        bases.push_image("base:1", "linux/amd64", &files).await?;
        let buildah = Workshop::new().await?.using(Builder::Buildah);
        let corpus = Self { buildkit: Workshop::with_buildkit(kiln_builder::missing).await?, buildah, bases };
        corpus.push_triggers().await?;
        Ok(corpus)
    }

    /// The config of an image, by hand: which tool makes it shall not matter.
    async fn push_triggers(&self) -> Result<()> {
        let (media_type, manifest) = self.bases.manifest("base", "1").await?.context("no base")?;
        let mut manifest: serde_json::Value = serde_json::from_slice(&manifest)?;
        let named = manifest.pointer("/config/digest").and_then(serde_json::Value::as_str);
        let digest = named.context("no config")?.parse()?;
        let config = self.bases.blob("base", &digest).await?.context("no config")?;
        let mut config: serde_json::Value = serde_json::from_slice(&config)?;
        let triggers = serde_json::json!({
            "Cmd": ["/bin/sh", "-c", "inherited"],
            "OnBuild": ["COPY child /triggered", "RUN cat /triggered > /ran"],
        });
        config.as_object_mut().context("no config")?.insert("config".into(), triggers);
        let config = config.to_string().into_bytes();
        self.bases.push_blob("base", &config).await?;
        let config = kiln_testkit::registry::descriptor(kiln_testkit::registry::OCI_CONFIG, &config);
        manifest.as_object_mut().context("no manifest")?.insert("config".into(), config);
        let manifest = manifest.to_string();
        self.bases.push_manifest("base", "triggers", &media_type, manifest.as_bytes()).await?;
        Ok(())
    }

    /// Builds a case with one tool; the image, or why there is none.
    async fn build(&self, workshop: &Workshop, case: &Case) -> Result<Result<Image, String>> {
        let address = self.bases.address();
        let named = |text: &str| {
            let text = text.replace(TRIGGERS, &format!("{address}/base:triggers"));
            text.replace(BASE, &format!("{address}/base:1"))
        };
        let dockerfile = named(&case.dockerfile);
        let mut files: Vec<(&str, &str)> =
            case.context.iter().map(|(path, content)| (path.as_str(), content.as_str())).collect();
        files.push(("Dockerfile", &dockerfile));
        let repository = workshop.repository_prepared(&files, case.prepare)?;
        let spec = workshop.build(&repository, |source| {
            source.target.clone_from(&case.target);
            let arguments = case.build_args.iter().map(|(name, value)| (name.clone(), named(value)));
            source.build_args = arguments.collect();
        })?;
        let secrets = RunSecrets { mounts: case.secrets.clone(), ..RunSecrets::default() };
        let (outcome, output) = run(workshop, &spec, &secrets)?;
        if let RunResult::Failed(failure) = outcome.result {
            let told = format!("{failure}");
            return Ok(Err(if failure.reason == Dockerfile { told } else { format!("{told}; {output}") }));
        }
        Image::read(&workshop.registry, &spec.target_ref).await.map(Ok)
    }

    /// Every way in which the tools are not at one with the case, or with each other.
    async fn problems(&self, case: &Case) -> Result<Vec<String>> {
        let mut problems = Vec::new();
        let mut of_buildkit = None;
        if let Some(buildkit) = &self.buildkit {
            match self.build(buildkit, case).await.context("buildkit")? {
                Ok(image) => {
                    problems.extend(
                        case.problems(&image).into_iter().map(|problem| format!("buildkit: {problem}")),
                    );
                    of_buildkit = Some(image);
                }
                Err(problem) => problems.push(format!("buildkit: it is not built: {problem}")),
            }
        }
        match (self.build(&self.buildah, case).await.context("buildah")?, &case.buildah) {
            (Ok(mut image), Buildah::Builds) => {
                if let Some(path) = case.left_by_buildah {
                    image.files.remove(path);
                }
                problems
                    .extend(case.problems(&image).into_iter().map(|problem| format!("buildah: {problem}")));
                let differences = of_buildkit.map(|other| image.differences(&other)).unwrap_or_default();
                problems.extend(differences.into_iter().map(|what| format!("buildah's is another: {what}")));
            }
            (Err(problem), Buildah::Refuses(name)) if problem.contains(name) => {}
            (Err(problem), _) => problems.push(format!("buildah: it is not built: {problem}")),
            (Ok(_), Buildah::Refuses(name)) => problems.push(format!("buildah: built, in spite of {name}")),
        }
        Ok(problems)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_dockerfile_makes_what_it_says() -> Result<()> {
    builder_program()?;
    let cases: Vec<Case> =
        [instructions::cases(), files::cases(), syntax::cases()].into_iter().flatten().collect();
    ensure!(cases.len() >= 30, "only {} cases", cases.len());
    let corpus = Arc::new(Corpus::start().await?);
    let lanes =
        cases.into_iter().enumerate().fold(BTreeMap::<_, Vec<Case>>::new(), |mut lanes, (at, case)| {
            lanes.entry(at % LANES).or_default().push(case);
            lanes
        });
    let mut running = JoinSet::new();
    for lane in lanes.into_values() {
        let corpus = corpus.clone();
        running.spawn(async move {
            let mut problems = Vec::new();
            for case in lane {
                let found = corpus.problems(&case).await.with_context(|| case.name)?;
                problems.extend(found.into_iter().map(|problem| format!("{}: {problem}", case.name)));
            }
            Ok::<_, anyhow::Error>(problems)
        });
    }
    let mut problems = Vec::new();
    while let Some(found) = running.join_next().await {
        problems.extend(found??);
    }
    ensure!(problems.is_empty(), "{}", problems.join("\n"));
    Ok(())
}
