//! The stages of a Dockerfile, as far as it matters where their steps run.

use crate::dockerfile::{from_flag, heredoc_mark, logical_lines};

#[derive(Default)]
struct Stage {
    /// In small letters; empty where it has none.
    name: String,
    /// The stages that it is made of, as they are named in it.
    needs: Vec<String>,
    /// Its FROM says for itself which platform it is for.
    has_own_platform: bool,
    first_run: Option<String>,
}

/// The first step that must run on the platform that is built for: a RUN among what the stage `target` (empty: the last one)
/// needs, but for stages that name a platform of their own.
pub(crate) fn first_run(dockerfile: &str, target: &str) -> Option<String> {
    let stages = stages(dockerfile);
    let find = |name: &str, before: usize| {
        let named = stages.iter().take(before).rposition(|stage| !name.is_empty() && stage.name == name);
        named.or_else(|| name.parse().ok().filter(|number| *number < before))
    };
    let target = target.to_lowercase();
    let last = stages.len().checked_sub(1)?;
    let first = if target.is_empty() { last } else { find(&target, stages.len())? };
    let mut needed = vec![first];
    let mut at = 0;
    while let Some(number) = needed.get(at).copied() {
        at += 1;
        let stage = stages.get(number)?;
        if let Some(run) = stage.first_run.as_ref().filter(|_| !stage.has_own_platform) {
            return Some(run.clone());
        }
        let more = stage.needs.iter().filter_map(|name| find(name, number));
        let more: Vec<_> = more.filter(|number| !needed.contains(number)).collect();
        needed.extend(more);
    }
    None
}

fn stages(dockerfile: &str) -> Vec<Stage> {
    let mut stages: Vec<Stage> = Vec::new();
    let mut marks: Vec<String> = Vec::new();
    for line in logical_lines(dockerfile) {
        // What stands in a heredoc is no instruction.
        if let Some(mark) = marks.first() {
            if line.trim() == mark {
                marks.remove(0);
            }
            continue;
        }
        let mut words = line.split_whitespace();
        let instruction = words.next().unwrap_or_default().to_ascii_uppercase();
        if instruction == "FROM" {
            let (flags, rest): (Vec<_>, Vec<_>) = words.partition(|word| word.starts_with("--"));
            let own = flags.iter().any(|flag| flag.starts_with("--platform=") && !flag.contains("TARGET"));
            let base = rest.first().map(|name| name.to_lowercase()).unwrap_or_default();
            // One on top of another is of its platform.
            let below = stages.iter().rfind(|stage| !base.is_empty() && stage.name == base);
            stages.push(Stage {
                has_own_platform: own || below.is_some_and(|below| below.has_own_platform),
                name: rest.get(2).map(|name| name.to_lowercase()).unwrap_or_default(),
                needs: vec![base],
                first_run: None,
            });
        } else if let Some(stage) = stages.last_mut()
            && matches!(instruction.as_str(), "RUN" | "COPY" | "ADD")
        {
            stage.needs.extend(words.clone().filter_map(from_flag).map(str::to_lowercase));
            marks = words.filter_map(heredoc_mark).map(str::to_owned).collect();
            if instruction == "RUN" {
                stage.first_run.get_or_insert_with(|| line.trim().to_owned());
            }
        }
    }
    stages
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_must_run_there() {
        for (dockerfile, target, expected) in [
            ("FROM a\nCOPY x /\n", "", None),
            ("FROM a\nCOPY x /\nrun  make\n", "", Some("run  make")),
            ("FROM a AS one\nRUN x\nFROM a\nCOPY y /\n", "", None),
            ("FROM a AS one\nRUN x\nFROM a\nCOPY --from=One y /\n", "", Some("RUN x")),
            ("FROM a\nRUN x\nFROM a\nCOPY --from=0 y /\n", "", Some("RUN x")),
            ("FROM a AS one\nRUN x\nFROM one AS two\nFROM a AS three\nRUN z\n", "two", Some("RUN x")),
            ("FROM a AS one\nFROM one AS two\nFROM a AS three\nRUN z\n", "TWO", None),
            (
                "FROM --platform=$BUILDPLATFORM a AS b\nRUN x\nFROM b AS c\nRUN y\nFROM a\nCOPY --from=c z /\n",
                "",
                None,
            ),
            ("FROM --platform=$TARGETPLATFORM a\nRUN x\n", "", Some("RUN x")),
            ("FROM a\nCOPY <<EOF /\nRUN x\nEOF\n", "", None),
            ("FROM a\nCOPY <<A <<-\"B\" /\nA\nRUN x\nB\nRUN y\n", "", Some("RUN y")),
            ("FROM a AS a\nFROM a\n", "", None),
            ("", "", None),
            ("FROM a\nRUN x\n", "nowhere", None),
        ] {
            assert_eq!(first_run(dockerfile, target).as_deref(), expected, "{dockerfile}");
        }
    }
}
