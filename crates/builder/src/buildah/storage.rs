//! Where buildah keeps layers and containers, for all builds of the installation: what lies there, read without buildah.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use kiln_domain::run_folder::Settings;
use serde::Deserialize;
use tokio::process::Command;

/// In the folder of containers: the containers that there are. (The second is of newer releases.)
const LISTS: [&str; 2] = ["containers.json", "volatile-containers.json"];
/// In a container's folder: what buildah knows of it.
const NOTE: &str = "userdata/buildah.json";

/// A container as the list has it.
#[derive(Deserialize)]
struct Listed {
    id: String,
}

/// The storage that an installation's builds share.
#[derive(Clone, Debug)]
pub(crate) struct Storage {
    folder: PathBuf,
    driver: String,
}

impl Storage {
    pub(crate) fn of(settings: &Settings) -> Self {
        Self { folder: settings.storage.join("buildah"), driver: settings.storage_driver.clone() }
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.folder.join("root")
    }

    /// Notes of mounts, which must not outlive the boot that they belong to.
    fn run_root(&self) -> PathBuf {
        self.folder.join(format!("run-{}", boot_id().unwrap_or_default()))
    }

    /// Adds the options that make buildah use it.
    pub(crate) fn use_by(&self, command: &mut Command) {
        command.arg("--root").arg(self.root()).arg("--runroot").arg(self.run_root());
        command.arg("--storage-driver").arg(&self.driver);
    }

    /// A command of buildah's on it, up to the verb, for somebody to type.
    pub(crate) fn command_line(&self) -> String {
        let (root, run_root) = (self.root(), self.run_root());
        format!(
            "buildah --root {} --runroot {} --storage-driver {}",
            root.display(),
            run_root.display(),
            self.driver
        )
    }

    /// The containers of runs in the folder `runs`, each with the name of its run.
    ///
    /// They are marked by the run's own hooks folder, which buildah notes of each.
    pub(crate) fn containers(&self, runs: &Path) -> Vec<(String, String)> {
        let folder = self.container_folders();
        // A field that no Dockerfile writes to.
        let run_of = |container: &Path| {
            let note = std::fs::read(container.join(NOTE)).ok()?;
            let note: serde_json::Value = serde_json::from_slice(&note).ok()?;
            let hooks = Path::new(note.pointer("/CommonBuildOpts/OCIHooksDir/0")?.as_str()?);
            hooks.strip_prefix(runs).ok()?.iter().next()?.to_str().map(str::to_owned)
        };
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        entries
            .filter_map(|entry| Some((entry.file_name().into_string().ok()?, run_of(&entry.path())?)))
            .collect()
    }

    /// The containers that buildah has, and has not noted anything of. It makes a container and notes it some milliseconds
    /// later; one that was killed between leaves it so. (It removes the note, too, before the container.)
    pub(crate) fn unnoted(&self) -> BTreeSet<String> {
        let folder = self.container_folders();
        self.listed().into_iter().filter(|container| !folder.join(container).join(NOTE).exists()).collect()
    }

    fn listed(&self) -> BTreeSet<String> {
        let read = |list| {
            let list = std::fs::read(self.container_folders().join(list)).unwrap_or_default();
            serde_json::from_slice::<Vec<Listed>>(&list).unwrap_or_default()
        };
        LISTS.into_iter().flat_map(read).map(|listed| listed.id).collect()
    }

    fn container_folders(&self) -> PathBuf {
        self.root().join(format!("{}-containers", self.driver))
    }

    /// Whether anything of a container is there.
    pub(crate) fn has(&self, container: &str) -> bool {
        self.container_folders().join(container).exists() || self.lists(container)
    }

    /// Of containers that buildah was about to remove, the folders of those that it does not know any more.
    pub(crate) fn remove_forgotten(&self, containers: &[String]) {
        for container in containers.iter().filter(|container| !self.lists(container)) {
            let _ = std::fs::remove_dir_all(self.container_folders().join(container));
        }
    }

    fn lists(&self, container: &str) -> bool {
        self.listed().contains(container)
    }

    /// The run roots of other boots than this one.
    pub(crate) fn old_run_roots(&self, boot: &str) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let old = entries.filter(|entry| {
            let name = entry.file_name();
            name.to_str().and_then(|name| name.strip_prefix("run-")).is_some_and(|of| of != boot)
        });
        old.map(|entry| entry.path()).collect()
    }

    /// Removes the run roots of other boots: whatever they note ended with that boot.
    pub(crate) fn forget_other_boots(&self) {
        let Some(boot) = boot_id() else { return };
        for old in self.old_run_roots(&boot) {
            // Another builder may be at the same; what stays is looked for at the next build.
            let _ = std::fs::remove_dir_all(old);
        }
    }
}

/// Names this boot of this machine.
pub(crate) fn boot_id() -> Option<String> {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(id.trim().to_owned()).filter(|id| !id.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_buildah_has_and_not_noted_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let storage = Storage::of(&Settings::new(folder.path().to_owned()));
        assert!(storage.unnoted().is_empty());
        let containers = storage.container_folders();
        for (container, file) in
            [("noted", NOTE), ("begun", "userdata/.tmp-buildah.json7"), ("forgotten", "x/y")]
        {
            let file = containers.join(container).join(file);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(file, "{}").unwrap();
        }
        for (list, ids) in LISTS.into_iter().zip([["noted", "begun"], ["bare", "bare"]]) {
            let listed = ids.map(|id| format!(r#"{{"id":"{id}","names":["x"],"flags":{{}}}}"#));
            std::fs::write(containers.join(list), format!("[{}]", listed.join(","))).unwrap();
        }
        assert_eq!(storage.unnoted().into_iter().collect::<Vec<_>>(), ["bare", "begun"]);
        assert!(storage.lists("bare") && !storage.lists("forgotten"));
    }

    #[test]
    fn run_roots_of_former_boots_are_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let storage = Storage::of(&Settings::new(folder.path().to_owned()));
        let (old, now) = (folder.path().join("buildah/run-of-yesterday"), storage.run_root());
        for folder in [&old, &now] {
            std::fs::create_dir_all(folder.join("overlay-containers")).unwrap();
        }
        assert_eq!(storage.old_run_roots(&boot_id().unwrap()), std::slice::from_ref(&old));
        storage.forget_other_boots();
        assert!(!old.exists() && now.exists());
    }
}
