//! An image as it lies in a registry: its config, and the files that its layers make together.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use kiln_domain::reference::ImageReference;
use kiln_testkit::registry::DockerRegistry;
use serde_json::{Map, Value};
use tempfile::TempDir;

/// What a tool may leave of its own.
const OF_TOOLS: [&str; 7] =
    ["/proc", "/sys", "/dev", "/run", "/etc/resolv.conf", "/etc/hosts", "/etc/hostname"];

pub(super) struct Image {
    /// `config` of the image's config, without fields that say nothing.
    pub(super) config: Map<String, Value>,
    /// By absolute path.
    pub(super) files: BTreeMap<String, Entry>,
}

#[derive(PartialEq, Eq)]
pub(super) struct Entry {
    mode: u32,
    uid: u32,
    gid: u32,
    pub(super) content: Option<Vec<u8>>,
    pub(super) link: Option<String>,
}

impl Entry {
    pub(super) fn mode(&self) -> String {
        format!("{:04o} {}:{}", self.mode & 0o7777, self.uid, self.gid)
    }

    pub(super) fn is_folder(&self) -> bool {
        self.content.is_none() && self.link.is_none()
    }

    pub(super) fn told(&self) -> String {
        let what = match (&self.content, &self.link) {
            (Some(content), _) if content.len() < 200 => format!("{:?}", String::from_utf8_lossy(content)),
            (Some(content), _) => format!("{} bytes", content.len()),
            (None, Some(link)) => format!("-> {link}"),
            (None, None) => "a folder".to_owned(),
        };
        format!("{} {what}", self.mode())
    }
}

impl Image {
    pub(super) async fn read(registry: &DockerRegistry, reference: &ImageReference) -> Result<Self> {
        let repository = reference.repository();
        let found = registry.manifest(repository, reference.selector()).await?;
        let manifest: Value = serde_json::from_slice(&found.context("no image")?.1)?;
        let part = |of: &Value, name: &str| of.get(name).cloned().unwrap_or_default();
        let blob = async |descriptor: &Value| {
            let digest = part(descriptor, "digest").as_str().context("no digest")?.parse()?;
            registry.blob(repository, &digest).await?.context("a blob is missing")
        };
        let config: Value = serde_json::from_slice(&blob(&part(&manifest, "config")).await?)?;
        let config = part(&config, "config").as_object().cloned().unwrap_or_default();
        let mut config: Map<_, _> = config.into_iter().filter(|(_, value)| says_something(value)).collect();
        // The container's in which buildah worked; what Windows makes of a CMD; the folder that is the default.
        config.remove("Hostname");
        config.remove("ArgsEscaped");
        config.retain(|field, value| field != "WorkingDir" || value != "/");
        if let Some(labels) = config.get_mut("Labels").and_then(Value::as_object_mut) {
            labels.remove("io.buildah.version");
        }
        config.retain(|_, value| says_something(value));
        let root = TempDir::new()?;
        for layer in part(&manifest, "layers").as_array().context("no layers")? {
            lay(root.path(), &blob(layer).await?)?;
        }
        let mut files = BTreeMap::new();
        collect(root.path(), root.path(), &mut files)?;
        Ok(Self { config, files })
    }

    /// In what it is not the same as another.
    pub(super) fn differences(&self, other: &Self) -> Vec<String> {
        let mut differences = Vec::new();
        let fields = self.config.keys().chain(other.config.keys()).collect::<std::collections::BTreeSet<_>>();
        for field in fields {
            let (here, there) = (self.config.get(field), other.config.get(field));
            if here != there {
                differences.push(format!("{field} is {here:?}, not {there:?}"));
            }
        }
        let paths = self.files.keys().chain(other.files.keys()).collect::<std::collections::BTreeSet<_>>();
        for path in paths {
            let (here, there) = (self.files.get(path), other.files.get(path));
            if here != there {
                let [here, there] = [here, there].map(|entry| entry.map(Entry::told));
                differences.push(format!("{path} is {here:?}, not {there:?}"));
            }
        }
        differences
    }
}

fn says_something(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        _ => true,
    }
}

/// Puts a layer over what is there, as OCI's image spec says of whiteouts.
fn lay(root: &Path, layer: &[u8]) -> Result<()> {
    let archive = root.with_extension("layer");
    fs::write(&archive, layer)?;
    let tar = |arguments: &[&str]| -> Result<String> {
        let output = Command::new("tar")
            .args(arguments)
            .arg(&archive)
            .arg("-C")
            .arg(root)
            .stderr(Stdio::inherit())
            .output()?;
        ensure!(output.status.success(), "tar {arguments:?}");
        Ok(String::from_utf8(output.stdout)?)
    };
    let names = tar(&["--quoting-style=literal", "--list", "--file"])?;
    for name in names.lines() {
        let path = root.join(name.trim_start_matches('/'));
        let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else { continue };
        match name.to_string_lossy().strip_prefix(".wh.") {
            Some(".wh..opq") => {
                for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                    remove(&entry.path())?;
                }
            }
            Some(gone) => remove(&folder.join(gone))?,
            None => {}
        }
    }
    tar(&[
        "--extract",
        "--same-owner",
        "--same-permissions",
        "--numeric-owner",
        "--exclude=.wh.*",
        "--file",
    ])?;
    Ok(fs::remove_file(&archive)?)
}

fn remove(path: &Path) -> Result<()> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => Ok(fs::remove_dir_all(path)?),
        Ok(_) => Ok(fs::remove_file(path)?),
        Err(_) => Ok(()),
    }
}

fn collect(root: &Path, folder: &Path, into: &mut BTreeMap<String, Entry>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = format!("/{}", path.strip_prefix(root)?.display());
        if OF_TOOLS.contains(&name.as_str()) {
            continue;
        }
        let metadata = fs::symlink_metadata(&path)?;
        let link = metadata.is_symlink().then(|| fs::read_link(&path)).transpose()?;
        let entry = Entry {
            // A link has no mode of its own.
            mode: if link.is_some() { 0o777 } else { metadata.mode() },
            uid: metadata.uid(),
            gid: metadata.gid(),
            content: metadata.is_file().then(|| fs::read(&path)).transpose()?,
            link: link.map(|link| link.display().to_string()),
        };
        into.insert(name, entry);
        if metadata.is_dir() {
            collect(root, &path, into)?;
        }
    }
    Ok(())
}
