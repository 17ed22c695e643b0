//! Whether the kernel killed something for its memory while the build ran.

use std::fs;
use std::path::{Path, PathBuf};

/// The kernel's count of processes killed for their memory, where it was when this was made.
#[derive(Debug)]
pub(crate) struct Memory {
    /// Has a line `oom_kill COUNT`: of the builder's control group and those beneath it, or of the whole host where there is
    /// none (cgroup v1 doesn't count what is beneath).
    kills: PathBuf,
    /// Holds the limit in bytes of the builder's control group.
    limit: Option<PathBuf>,
    kills_before: u64,
}

/// What cgroup v1 has in the place of no limit is just below 2^63.
const NO_LIMIT: u64 = 1 << 62;

impl Memory {
    pub(crate) fn new() -> Self {
        let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        Self::of(&groups, Path::new("/sys/fs/cgroup"), Path::new("/proc/vmstat"))
    }

    /// `groups` is what `/proc/self/cgroup` says: `0::/PATH` for v2, `N:memory:/PATH` for v1.
    fn of(groups: &str, mounted: &Path, host: &Path) -> Self {
        let found = groups.lines().find_map(|line| {
            let (_, rest) = line.split_once(':')?;
            let (controllers, path) = rest.split_once(":/")?;
            let (kills, limit) = if controllers.is_empty() {
                let group = mounted.join(path);
                (group.join("memory.events"), group.join("memory.max"))
            } else if controllers.split(',').any(|controller| controller == "memory") {
                (host.to_owned(), mounted.join("memory").join(path).join("memory.limit_in_bytes"))
            } else {
                return None;
            };
            (kills.is_file() && limit.is_file()).then_some((kills, Some(limit)))
        });
        let (kills, limit) = found.unwrap_or_else(|| (host.to_owned(), None));
        let mut memory = Self { kills, limit, kills_before: 0 };
        memory.kills_before = memory.kills();
        memory
    }

    /// The limit that applied, in words, if something was killed since.
    pub(crate) fn exhausted(&self) -> Option<String> {
        (self.kills() > self.kills_before).then(|| self.limit())
    }

    fn kills(&self) -> u64 {
        let text = fs::read_to_string(&self.kills).unwrap_or_default();
        text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok()).unwrap_or(0)
    }

    fn limit(&self) -> String {
        let limit = self.limit.as_ref().and_then(|limit| fs::read_to_string(limit).ok());
        match limit.and_then(|limit| limit.trim().parse::<u64>().ok()).filter(|limit| *limit < NO_LIMIT) {
            Some(bytes) => format!("the builder's limit of {} MiB", bytes / (1024 * 1024)),
            None => "the host's memory".into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The files of a kernel, written anew for each look.
    #[test]
    fn kills_since_the_beginning_are_told_with_the_limit_that_applied() {
        let v1 = "5:cpu,cpuacct:/x\n4:memory:/a/b\n0::/\n";
        let v2 = "0::/a/b\n";
        for (groups, files, counted_in, says) in [
            (
                v2,
                &[("a/b/memory.max", "67108864\n")][..],
                "a/b/memory.events",
                "the builder's limit of 64 MiB",
            ),
            (v2, &[("a/b/memory.max", "max\n")], "a/b/memory.events", "the host's memory"),
            (
                v1,
                &[("memory/a/b/memory.limit_in_bytes", "33554432\n")],
                "vmstat",
                "the builder's limit of 32 MiB",
            ),
            (
                v1,
                &[("memory/a/b/memory.limit_in_bytes", "9223372036854771712\n")],
                "vmstat",
                "the host's memory",
            ),
            ("", &[], "vmstat", "the host's memory"),
            // A container that doesn't see its own group.
            (v2, &[], "vmstat", "the host's memory"),
        ] {
            let folder = tempfile::tempdir().unwrap();
            let root = folder.path();
            let write = |file: &str, text: &str| {
                let file = root.join(file);
                fs::create_dir_all(file.parent().unwrap()).unwrap();
                fs::write(file, text).unwrap();
            };
            for (file, text) in files {
                write(file, text);
            }
            write(counted_in, "oom 7\noom_kill 3\n");
            let memory = Memory::of(groups, root, &root.join("vmstat"));
            assert_eq!(memory.exhausted(), None, "{groups}: earlier ones don't count");
            write(counted_in, "oom 9\noom_kill 4\noom_group_kill 0\n");
            assert_eq!(memory.exhausted().as_deref(), Some(says), "{groups}");
        }
    }
}
