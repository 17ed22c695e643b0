//! What of a Dockerfile buildah 1.28 would read as something else, without a word: refused by its name, never built wrong.
//! Each was seen to be built otherwise than BuildKit builds it. What buildah itself refuses is left to it.

use std::collections::{BTreeMap, BTreeSet};

use crate::dockerfile;

/// What buildah does not know, for a sentence; none where it makes of a Dockerfile what that says.
pub(super) fn what_it_cannot(dockerfile: &str) -> Option<String> {
    if let Some(line) = dockerfile::heredoc(dockerfile) {
        return Some(format!("a heredoc in line {line}"));
    }
    let escape = dockerfile::escape_character(dockerfile);
    if escape != '\\' && dockerfile.contains('\\') {
        return Some(format!("`# escape={escape}` with a backslash that is to be kept"));
    }
    let mut stages = Stages::default();
    dockerfile::logical_lines(dockerfile).iter().find_map(|line| stages.line(line))
}

#[derive(Default)]
struct Stages<'a> {
    in_stage: bool,
    /// Args that were declared in stages that have ended, by the stage's name in small letters.
    declared: BTreeMap<String, BTreeSet<&'a str>>,
    name: String,
    own: BTreeSet<&'a str>,
    /// Of the stage that this one is on top of, and not its own.
    inherited: BTreeSet<&'a str>,
    has_shell: bool,
}

impl<'a> Stages<'a> {
    fn line(&mut self, line: &'a str) -> Option<String> {
        let (instruction, rest) =
            line.trim_start().split_once(char::is_whitespace).unwrap_or((line.trim(), ""));
        let instruction = instruction.to_ascii_uppercase();
        match instruction.as_str() {
            "FROM" => self.begin(rest),
            "ARG" if self.in_stage => {
                for word in rest.split_whitespace() {
                    let name = word.split('=').next().unwrap_or(word);
                    self.inherited.remove(name);
                    self.own.insert(name);
                }
            }
            "SHELL" => self.has_shell = true,
            "CMD" | "ENTRYPOINT" if self.has_shell && !rest.trim_start().starts_with('[') => {
                return Some(format!("{instruction} as text behind a SHELL"));
            }
            _ => {}
        }
        let used = self.inherited.iter().find(|name| uses(rest, name)).filter(|_| instruction != "FROM")?;
        Some(format!("the ARG {used} of a stage in another on top of it, without an ARG of its own"))
    }

    fn begin(&mut self, rest: &str) {
        self.declared
            .insert(std::mem::take(&mut self.name), self.own.union(&self.inherited).copied().collect());
        let mut words = rest.split_whitespace().skip_while(|word| word.starts_with("--"));
        let from = words.next().unwrap_or_default().to_lowercase();
        self.inherited = self.declared.get(&from).cloned().unwrap_or_default();
        self.own.clear();
        (self.in_stage, self.has_shell) = (true, false);
        // One without a name can't be built upon.
        self.name = words.nth(1).unwrap_or_default().to_lowercase();
    }
}

/// Whether a text has `$NAME` or `${NAME…`.
fn uses(text: &str, name: &str) -> bool {
    text.split('$').skip(1).any(|after| {
        let after = after.strip_prefix('{').unwrap_or(after);
        after.strip_prefix(name).is_some_and(|behind| {
            !behind.starts_with(|next: char| next.is_ascii_alphanumeric() || next == '_')
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_refused() {
        for (dockerfile, expected) in [
            ("FROM a\nRUN cat <<EOF\nEOF\n", Some("heredoc in line 2")),
            ("# escape=`\nFROM a\nENV P=C:\\dir\n", Some("`# escape=``")),
            ("# escape=`\nFROM a\nENV P=`\n x\n", None),
            ("FROM a\nSHELL [\"/x\"]\ncmd y\n", Some("CMD as text")),
            ("FROM a\nSHELL [\"/x\"]\nENTRYPOINT [\"y\"]\nRUN z\n", None),
            ("FROM a\nSHELL [\"/x\"]\nFROM b\nCMD y\n", None),
            ("FROM a AS one\nARG X\nFROM One\nRUN echo ${X:-y}\n", Some("ARG X")),
            ("FROM a AS one\nARG X=1\nFROM one AS two\nFROM two\nENV Y=$X\n", Some("ARG X")),
            ("FROM a AS one\nARG X\nFROM one\nARG X\nRUN echo $X\n", None),
            ("FROM a AS one\nARG X\nFROM one\nRUN echo $XY x\n", None),
            ("FROM a AS one\nARG X\nFROM a\nRUN echo $X\n", None),
            ("ARG X\nFROM a AS one\nFROM one\nRUN echo $X\n", None),
        ] {
            let told = what_it_cannot(dockerfile);
            assert_eq!(told.is_some(), expected.is_some(), "{dockerfile}: {told:?}");
            assert!(told.unwrap_or_default().contains(expected.unwrap_or_default()), "{dockerfile}");
        }
    }
}
