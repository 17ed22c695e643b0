//! What a Dockerfile's `# syntax=` line asks for, and whether it is had.
//!
//! `docker/dockerfile` is built into BuildKit, and that one serves each of its versions: nothing is pulled. Any other is
//! an image that runs in the daemon with the build's session, so it is admitted only where the configuration lists it.

use std::collections::BTreeMap;

/// The repositories of the built-in frontend, as a `# syntax=` line may spell them.
const BUILT_IN: [&str; 2] = ["docker/dockerfile", "docker/dockerfile-upstream"];
/// The build arg that overrides the line.
const ARGUMENT: &str = "BUILDKIT_SYNTAX";

/// Which frontend reads the Dockerfile.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Frontend {
    BuiltIn,
    /// The image that the line names; BuildKit reads it from there again.
    Listed,
}

/// The frontend that a Dockerfile asks for; the error says which is not admitted.
pub(super) fn asked_for(
    dockerfile: &str,
    build_args: &BTreeMap<String, String>,
    listed: &[String],
) -> Result<Frontend, String> {
    let argument = build_args.get(ARGUMENT).map(String::as_str);
    let Some(syntax) = argument.or_else(|| directive(dockerfile)) else { return Ok(Frontend::BuiltIn) };
    // The rest of the line is the frontend's own.
    let image = syntax.split_whitespace().next().unwrap_or_default();
    let name = repository(image);
    if name.is_empty() || BUILT_IN.contains(&name) {
        Ok(Frontend::BuiltIn)
    } else if listed.iter().any(|listed| listed == image || repository(listed) == listed && listed == name) {
        Ok(Frontend::Listed)
    } else {
        Err(format!(
            "`# syntax={image}` asks for a frontend that is not admitted here: docker/dockerfile is, and what \
             `buildkit.frontends` in the engine's configuration lists"
        ))
    }
}

/// Without Docker Hub's host, tag and digest.
fn repository(image: &str) -> &str {
    let image = image.strip_prefix("docker.io/").unwrap_or(image);
    let image = image.split_once('@').map_or(image, |(name, _)| name);
    match image.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => name,
        _ => image,
    }
}

/// The directive among the comments at the very top; `#` or `//` begins a comment there, and a `#!` line may come first.
fn directive(dockerfile: &str) -> Option<&str> {
    let text = dockerfile.strip_prefix('\u{feff}').unwrap_or(dockerfile);
    let lines = text.lines().enumerate().skip_while(|(at, line)| *at == 0 && line.starts_with("#!"));
    for (_, line) in lines {
        let line = line.trim();
        let comment = line.strip_prefix("//").or_else(|| line.strip_prefix('#'))?;
        let (name, value) = comment.split_once('=')?;
        if !name.trim().chars().all(|letter| letter.is_ascii_alphanumeric() || letter == '_') {
            return None;
        }
        if name.trim().eq_ignore_ascii_case("syntax") {
            return Some(value.trim());
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frontends() {
        let listed = ["r.example/front".to_owned(), "r.example/exact:1".to_owned()];
        let none = BTreeMap::new();
        for (dockerfile, expected) in [
            ("FROM scratch", Some(Frontend::BuiltIn)),
            ("# syntax=docker/dockerfile:1\nFROM scratch", Some(Frontend::BuiltIn)),
            ("#syntax = docker.io/docker/dockerfile:1.7-labs@sha256:00\n", Some(Frontend::BuiltIn)),
            ("\u{feff}# escape=`\n# syntax=other/front\n", None),
            ("#!/usr/bin/env x\n// syntax=other/front\n", None),
            ("# SYNTAX=other/front:1 -x\r\nFROM scratch", None),
            ("# syntax=docker/dockerfile.evil/x\n", None),
            ("# syntax=evil.test:5000/docker/dockerfile\n", None),
            // Behind anything else it is a comment like any other.
            ("# a comment\n# syntax=other/front\n", Some(Frontend::BuiltIn)),
            ("\n# syntax=other/front\n", Some(Frontend::BuiltIn)),
            ("# syntax=r.example/front:9\n", Some(Frontend::Listed)),
            ("# syntax=r.example/exact:1\n", Some(Frontend::Listed)),
            ("# syntax=r.example/exact:2\n", None),
        ] {
            assert_eq!(asked_for(dockerfile, &none, &listed).ok(), expected, "{dockerfile}");
        }
        let argument = BTreeMap::from([("BUILDKIT_SYNTAX".to_owned(), "other/front".to_owned())]);
        assert!(asked_for("# syntax=docker/dockerfile:1\n", &argument, &listed).is_err());
    }
}
