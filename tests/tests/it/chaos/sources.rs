//! What is built: a repository for each kind, and the build tool that is played.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_proto::kiln_v1 as api;
use kiln_testkit::registry::{DockerRegistry, OCI_MANIFEST};
use kiln_testkit::workshop::{Repository, Workshop};
use serde_json::Value;

use super::plan::{Image, Kind};

/// One repository for each kind; images differ by their build args.
pub(super) struct Sources {
    repositories: Vec<(Kind, Repository)>,
}

/// What every secret begins with, and nothing else.
pub(super) const SECRET_BEGINS: &str = "kept-from-all-";

const KINDS: [Kind; 5] = [Kind::Good, Kind::Failing, Kind::Long, Kind::Same, Kind::Fresh];

impl Sources {
    pub(super) fn new(workshop: &Workshop) -> Result<Self> {
        let repository = |kind: Kind| {
            let dockerfile = dockerfile(kind);
            let busybox: &[&str] = if kind.is_played() { &[] } else { &["."] };
            Ok((kind, workshop.repository(&[("Dockerfile", &dockerfile)], busybox)?))
        };
        Ok(Self { repositories: KINDS.into_iter().map(repository).collect::<Result<_>>()? })
    }

    /// A request for the image of this number.
    pub(super) fn request(&self, number: usize, image: Image) -> Result<api::BuildImageRequest> {
        let repository = self.repositories.iter().find(|(kind, _)| *kind == image.kind);
        let (_, repository) = repository.context("a repository of each kind")?;
        let build_args = [("IMAGE", number.to_string()), ("LINES", image.lines.to_string())];
        let build_args = build_args.map(|(name, value)| (name.to_owned(), value)).into();
        let login = STANDARD.encode(format!("chaos:{}", secret(number)));
        let credentials = [("registry.invalid".to_owned(), login)].into();
        let auth = Some(api::RegistryAuth { credentials, ..Default::default() });
        let request =
            crate::system::dockerfile(&repository.uri, |dockerfile| dockerfile.build_args = build_args);
        Ok(api::BuildImageRequest { auth, ..request })
    }
}

/// The password that an image is built with, which a played build tool prints: whoever asks for the image gives the same one.
pub(super) fn secret(number: usize) -> String {
    format!("{SECRET_BEGINS}{number}-")
}

/// What an attempt that came to the end of its step has printed, in one piece.
pub(super) fn printed(number: usize, image: Image) -> String {
    let Image { lines, .. } = image;
    let lines = (1..=lines).map(|line| format!("line {line} of {lines} of image {number}\n"));
    let told = image.kind.is_played().then(|| format!("with {}\n", secret(number)));
    lines.chain(told).collect()
}

fn dockerfile(kind: Kind) -> String {
    match kind {
        Kind::Same => "# played same\nFROM registry.invalid/base:1\n".into(),
        Kind::Fresh => "# played fresh\nFROM registry.invalid/base:1\n".into(),
        Kind::Good | Kind::Failing | Kind::Long => {
            let print =
                "i=1; while [ $i -le $LINES ]; do echo line $i of $LINES of image $IMAGE; i=$((i+1)); done";
            let after = match kind {
                Kind::Failing => "exit 3",
                Kind::Long => "for i in 1 2 3 4 5 6; do /bin/busybox sleep 1; echo second $i; done",
                _ => "true",
            };
            format!(
                "FROM scratch\nCOPY busybox /bin/busybox\nARG IMAGE\nARG LINES\n\
                 RUN [\"/bin/busybox\", \"sh\", \"-c\", \"{print}; {after}\"]\n"
            )
        }
    }
}

/// Writes the played build tool into a folder, for builders to find it on their PATH. What it pushes names blobs that
/// are put into the registry here.
pub(super) async fn play_buildah(folder: &Path, registry: &DockerRegistry) -> Result<()> {
    registry.push_image("base:played", "linux/amd64", &[("played", b"x")]).await?;
    let (_, manifest) = registry.manifest("base", "played").await?.context("what was pushed")?;
    let mut manifest: Value = serde_json::from_slice(&manifest)?;
    manifest["mediaType"] = OCI_MANIFEST.into();
    manifest["annotations"] = serde_json::json!({"content": "@CONTENT@"});
    let script = include_str!("played_buildah.sh")
        .replace("@REAL@", &real_buildah()?.display().to_string())
        .replace("@MANIFEST@", &manifest.to_string());
    std::fs::create_dir_all(folder)?;
    let file = folder.join("buildah");
    std::fs::write(&file, script)?;
    Ok(std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755))?)
}

/// `PATH` with a folder before all others.
pub(super) fn path_with(folder: &Path) -> Result<String> {
    let path = super::variable("PATH").context("no PATH")?;
    let folders = std::iter::once(folder.to_owned()).chain(std::env::split_paths(&path));
    std::env::join_paths(folders)?.into_string().map_err(|_| anyhow::anyhow!("PATH is not UTF-8"))
}

fn real_buildah() -> Result<PathBuf> {
    let path = super::variable("PATH").context("no PATH")?;
    let mut programs = std::env::split_paths(&path).map(|folder| folder.join("buildah"));
    programs.find(|program| program.is_file()).context("buildah is missing")
}
