//! The images that a Dockerfile names, and whether it has heredocs. Everything else in it is the build tool's to read.

use std::collections::{BTreeMap, BTreeSet};

use kiln_domain::reference::ImageReference;

/// A base image as a FROM names it, its `ARG`s filled in as far as defaults and build args tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct From {
    /// As expanded; for the user.
    pub(crate) text: String,
    /// Absent where the text is no reference (an `ARG` without a value, say).
    pub(crate) reference: Option<ImageReference>,
}

/// What a Dockerfile takes from registries.
#[derive(Debug, Default)]
pub(crate) struct Images {
    /// Of FROM lines: each once, in order, without `scratch` and earlier stages.
    pub(crate) froms: Vec<From>,
    /// Of `--from=` and `--mount=…,from=`.
    pub(crate) others: Vec<ImageReference>,
}

impl Images {
    pub(crate) fn all(&self) -> impl Iterator<Item = &ImageReference> {
        self.froms.iter().filter_map(|from| from.reference.as_ref()).chain(&self.others)
    }

    /// `host[:port]` of each.
    pub(crate) fn registries(&self) -> BTreeSet<&str> {
        self.all().map(ImageReference::registry).collect()
    }
}

/// The images that a Dockerfile names.
pub(crate) fn images(dockerfile: &str, build_args: &BTreeMap<String, String>) -> Images {
    let mut arguments = predefined();
    let mut stages = BTreeSet::new();
    let (mut found, mut others) = (Vec::<From>::new(), Vec::new());
    let mut in_head = true;
    for line in logical_lines(dockerfile) {
        let mut words = line.split_whitespace();
        match words.next().map(str::to_ascii_uppercase).as_deref() {
            Some("ARG") if in_head => {
                for word in words {
                    let (name, default) =
                        word.split_once('=').map_or((word, None), |(name, value)| (name, Some(value)));
                    let default = default.map(|value| expand(unquoted(value), &arguments));
                    if let Some(value) = build_args.get(name).cloned().or(default) {
                        arguments.insert(name.to_owned(), value);
                    }
                }
            }
            Some("FROM") => {
                in_head = false;
                let mut words = words.skip_while(|word| word.starts_with("--"));
                let text = words.next().map(|image| expand(unquoted(image), &arguments)).unwrap_or_default();
                let is_stage = text == "scratch" || stages.contains(&text.to_lowercase());
                if words.next().is_some_and(|word| word.eq_ignore_ascii_case("AS"))
                    && let Some(name) = words.next()
                {
                    stages.insert(name.to_lowercase());
                }
                if !is_stage && !text.is_empty() && found.iter().all(|from| from.text != text) {
                    found.push(From { reference: text.parse().ok(), text });
                }
            }
            Some("COPY" | "ADD" | "RUN") => others.extend(words.filter_map(from_flag).filter_map(|name| {
                let name = expand(name, &arguments);
                let is_stage =
                    stages.contains(&name.to_lowercase()) || name.bytes().all(|b| b.is_ascii_digit());
                if is_stage { None } else { name.parse().ok() }
            })),
            _ => {}
        }
    }
    Images { froms: found, others }
}

/// `name` of `--from=name` and `--mount=type=bind,from=name,…`.
pub(crate) fn from_flag(word: &str) -> Option<&str> {
    let name = word.strip_prefix("--from=");
    let mount = || word.strip_prefix("--mount=")?.split(',').find_map(|part| part.strip_prefix("from="));
    name.or_else(mount).map(unquoted)
}

/// The number of the first line that begins a heredoc (`RUN <<EOF`).
pub(crate) fn heredoc(dockerfile: &str) -> Option<usize> {
    let mut lines = dockerfile.lines().enumerate();
    let found = lines.find(|(_, line)| {
        let mut words = line.split_whitespace();
        let takes_one = words
            .next()
            .is_some_and(|word| ["RUN", "COPY", "ADD"].iter().any(|name| word.eq_ignore_ascii_case(name)));
        takes_one && words.any(begins_heredoc)
    });
    found.map(|(at, _)| at + 1)
}

fn begins_heredoc(word: &str) -> bool {
    heredoc_mark(word).is_some()
}

/// As BuildKit reads it: a word of digits (a file's number), `<<`, perhaps `-`, and the mark that ends it.
pub(crate) fn heredoc_mark(word: &str) -> Option<&str> {
    let mark = word.trim_start_matches(|c: char| c.is_ascii_digit()).strip_prefix("<<")?;
    let mark = mark.strip_prefix('-').unwrap_or(mark);
    Some(unquoted(mark)).filter(|_| !mark.is_empty() && !mark.contains('<'))
}

/// Platform arguments that every Dockerfile may use in FROM.
fn predefined() -> BTreeMap<String, String> {
    let mut arguments = BTreeMap::new();
    for side in ["TARGET", "BUILD"] {
        arguments.insert(format!("{side}OS"), "linux".into());
        arguments.insert(format!("{side}ARCH"), "amd64".into());
        arguments.insert(format!("{side}PLATFORM"), "linux/amd64".into());
    }
    arguments
}

/// Lines with continuations joined, comments and empty lines left out.
pub(crate) fn logical_lines(text: &str) -> Vec<String> {
    let text = without_mark(text);
    let escape = escape_character(text);
    let mut lines = Vec::new();
    let mut joined = String::new();
    for line in text.lines() {
        if line.trim_start().starts_with('#') || (joined.is_empty() && line.trim().is_empty()) {
            continue;
        }
        match line.trim_end().strip_suffix(escape) {
            Some(begun) => {
                joined.push_str(begun);
                joined.push(' ');
            }
            None => {
                joined.push_str(line);
                lines.push(std::mem::take(&mut joined));
            }
        }
    }
    if !joined.is_empty() {
        lines.push(joined);
    }
    lines
}

/// The `# escape=` directive, which must stand among the comments at the top.
pub(crate) fn escape_character(text: &str) -> char {
    let directives = without_mark(text).lines().map_while(|line| line.trim().strip_prefix('#'));
    let mut values = directives.filter_map(|line| {
        let (name, value) = line.split_once('=')?;
        name.trim().eq_ignore_ascii_case("escape").then(|| value.trim().chars().next())?
    });
    values.next().unwrap_or('\\')
}

/// Without the byte order mark that some editors begin a text with.
fn without_mark(text: &str) -> &str {
    text.strip_prefix('\u{feff}').unwrap_or(text)
}

fn unquoted(text: &str) -> &str {
    let inner = |quote| text.strip_prefix(quote).and_then(|rest| rest.strip_suffix(quote));
    inner('"').or_else(|| inner('\'')).unwrap_or(text)
}

/// `$NAME`, `${NAME}`, `${NAME:-default}` and `${NAME:+other}`; a name without a value is nothing.
fn expand(text: &str, arguments: &BTreeMap<String, String>) -> String {
    let value = |name: &str| arguments.get(name).map(String::as_str).unwrap_or_default();
    let mut expanded = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        expanded.push_str(before);
        if let Some((braced, behind)) = after.strip_prefix('{').and_then(|braced| braced.split_once('}')) {
            let piece = if let Some((name, default)) = braced.split_once(":-") {
                Some(value(name)).filter(|value| !value.is_empty()).unwrap_or(default)
            } else if let Some((name, other)) = braced.split_once(":+") {
                if value(name).is_empty() { "" } else { other }
            } else {
                value(braced)
            };
            expanded.push_str(piece);
            rest = behind;
        } else {
            let end = after.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(after.len());
            let (name, behind) = after.split_at(end);
            expanded.push_str(value(name));
            rest = behind;
        }
    }
    expanded + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn from_lines() {
        let build_args = BTreeMap::from([("VERSION".to_owned(), "9".to_owned())]);
        for (dockerfile, expected) in [
            ("FROM scratch", &[] as &[&str]),
            ("from  busybox as one\nFROM one\nFROM ONE AS two", &["busybox"]),
            ("FROM --platform=linux/amd64 a/b:1@sha256:x AS c", &["a/b:1@sha256:x"]),
            ("# a comment\nARG VERSION=1\nARG NAME=\"x\" OTHER\nFROM $NAME:${VERSION}", &["x:9"]),
            ("FROM ${NONE:-d}/y${VERSION:+z}", &["d/y"]),
            ("ARG VERSION\nFROM y${VERSION:+z}:$VERSION", &["yz:9"]),
            ("FROM \\\n  # between\n  busybox", &["busybox"]),
            ("# escape=`\nFROM `\nbusybox", &["busybox"]),
            ("FROM a\nARG VERSION\nRUN x \\\nFROM b\nFROM a\nFROM c", &["a", "c"]),
            ("\u{feff}FROM busybox", &["busybox"]),
            ("", &[]),
            ("FROM", &[]),
            ("FROM $UNKNOWN", &[]),
        ] {
            let found: Vec<_> =
                images(dockerfile, &build_args).froms.into_iter().map(|from| from.text).collect();
            assert_eq!(found, expected, "{dockerfile}");
        }
    }

    #[test]
    fn registries_are_those_that_something_is_taken_from() {
        let dockerfile = "FROM a.test/x AS one\nFROM one\nCOPY --from=one /a /a\nCOPY --from=0 /a /a\n\
             COPY --chown=1 --from=b.test:5000/y /a /a\nRUN --mount=type=bind,from=c.test/z,target=/z true\n\
             RUN echo d.test/w from=e.test/v\n";
        let images = images(dockerfile, &BTreeMap::new());
        assert_eq!(Vec::from_iter(images.registries()), ["a.test", "b.test:5000", "c.test"]);
        let hub = super::images("FROM busybox", &BTreeMap::new());
        assert_eq!(Vec::from_iter(hub.registries()), ["docker.io"]);
    }

    #[test]
    fn heredocs() {
        for (dockerfile, line) in [
            ("FROM a\nRUN <<EOF\nx\nEOF", Some(2)),
            ("FROM a\n\ncopy <<-\"A\" <<B /", Some(3)),
            ("FROM a\nRUN cat 3<<EOF", Some(2)),
            ("FROM a\nRUN echo $((1<<x)) <<<word", None),
            ("FROM a\nLABEL x=<<EOF", None),
        ] {
            assert_eq!(heredoc(dockerfile), line, "{dockerfile}");
        }
    }
}
