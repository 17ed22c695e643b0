//! Whether the kernel killed something for its memory while the build ran.

use std::fs;
use std::path::PathBuf;

/// The kernel's count of processes killed for their memory, where it was when this was made.
#[derive(Debug)]
pub(crate) struct Memory {
    group: Option<PathBuf>,
    kills_before: u64,
}

impl Memory {
    /// Counts in the builder's own control group, or of the whole host where there is none.
    pub(crate) fn new() -> Self {
        let group = fs::read_to_string("/proc/self/cgroup").ok().and_then(|text| {
            let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?.to_owned();
            let group = PathBuf::from("/sys/fs/cgroup").join(path);
            group.join("memory.events").is_file().then_some(group)
        });
        let mut memory = Self { group, kills_before: 0 };
        memory.kills_before = memory.kills();
        memory
    }

    /// The limit that applied, in words, if something was killed since.
    pub(crate) fn exhausted(&self) -> Option<String> {
        (self.kills() > self.kills_before).then(|| self.limit())
    }

    fn kills(&self) -> u64 {
        let (file, name) = match &self.group {
            Some(group) => (group.join("memory.events"), "oom_kill "),
            None => (PathBuf::from("/proc/vmstat"), "oom_kill "),
        };
        let text = fs::read_to_string(file).unwrap_or_default();
        text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok()).unwrap_or(0)
    }

    fn limit(&self) -> String {
        let group = self.group.as_ref().and_then(|group| fs::read_to_string(group.join("memory.max")).ok());
        match group.and_then(|limit| limit.trim().parse::<u64>().ok()) {
            Some(bytes) => format!("the builder's limit of {} MiB", bytes / (1024 * 1024)),
            None => "the host's memory".into(),
        }
    }
}
