//! A Dockerfile, and what the image that it makes must be.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use base64::Engine as _;
use secrecy::SecretString;
use serde_json::{Value, json};

use super::image::{Entry, Image};

pub(super) struct Case {
    pub(super) name: &'static str,
    pub(super) dockerfile: String,
    /// Files besides it.
    pub(super) context: Vec<(String, String)>,
    /// Does what a list of files can't say.
    pub(super) prepare: fn(&Path) -> Result<()>,
    pub(super) build_args: BTreeMap<String, String>,
    pub(super) target: String,
    pub(super) secrets: BTreeMap<String, SecretString>,
    pub(super) buildah: Buildah,
    /// An empty folder that buildah leaves where something was mounted.
    pub(super) left_by_buildah: Option<&'static str>,
    /// Fields of the image's config, and what they must be; null for one that isn't there.
    config: Vec<(&'static str, Value)>,
    files: Vec<(&'static str, Expected)>,
}

pub(super) enum Buildah {
    Builds,
    /// With a message that has these words.
    Refuses(&'static str),
}

enum Expected {
    Content(String),
    /// `mode uid:gid`, the mode in octal digits.
    Mode(&'static str),
    Link(&'static str),
    Folder,
    Absent,
}

/// A case that both tools build, and nothing is known of it yet.
pub(super) fn case(name: &'static str, dockerfile: impl Into<String>) -> Case {
    Case {
        name,
        dockerfile: dockerfile.into(),
        context: Vec::new(),
        prepare: |_| Ok(()),
        build_args: BTreeMap::new(),
        target: String::new(),
        secrets: BTreeMap::new(),
        buildah: Buildah::Builds,
        left_by_buildah: None,
        config: Vec::new(),
        files: Vec::new(),
    }
}

impl Case {
    pub(super) fn with(mut self, path: &str, content: &str) -> Self {
        self.context.push((path.to_owned(), content.to_owned()));
        self
    }

    pub(super) fn prepared(mut self, prepare: fn(&Path) -> Result<()>) -> Self {
        self.prepare = prepare;
        self
    }

    pub(super) fn arg(mut self, name: &str, value: &str) -> Self {
        self.build_args.insert(name.to_owned(), value.to_owned());
        self
    }

    pub(super) fn target(mut self, stage: &str) -> Self {
        stage.clone_into(&mut self.target);
        self
    }

    pub(super) fn secret(mut self, id: &str, content: &str) -> Self {
        let content = base64::engine::general_purpose::STANDARD.encode(content);
        self.secrets.insert(id.to_owned(), content.into());
        self
    }

    pub(super) fn buildah_refuses(mut self, words: &'static str) -> Self {
        self.buildah = Buildah::Refuses(words);
        self
    }

    pub(super) fn buildah_leaves(mut self, path: &'static str) -> Self {
        self.left_by_buildah = Some(path);
        self
    }

    pub(super) fn config(mut self, field: &'static str, value: Value) -> Self {
        self.config.push((field, value));
        self
    }

    pub(super) fn file(mut self, path: &'static str, content: &str) -> Self {
        self.files.push((path, Expected::Content(content.to_owned())));
        self
    }

    pub(super) fn mode(mut self, path: &'static str, mode: &'static str) -> Self {
        self.files.push((path, Expected::Mode(mode)));
        self
    }

    pub(super) fn link(mut self, path: &'static str, to: &'static str) -> Self {
        self.files.push((path, Expected::Link(to)));
        self
    }

    pub(super) fn folder(mut self, path: &'static str) -> Self {
        self.files.push((path, Expected::Folder));
        self
    }

    pub(super) fn absent(mut self, path: &'static str) -> Self {
        self.files.push((path, Expected::Absent));
        self
    }

    /// In what an image is not what it must be.
    pub(super) fn problems(&self, image: &Image) -> Vec<String> {
        let mut problems = Vec::new();
        for (field, expected) in &self.config {
            let found = image.config.get(*field).unwrap_or(&Value::Null);
            if found != expected {
                problems.push(format!("{field} is {found}, not {expected}"));
            }
        }
        for (path, expected) in &self.files {
            let found = image.files.get(*path);
            let right = match (expected, found) {
                (Expected::Absent, found) => found.is_none(),
                (Expected::Content(text), Some(Entry { content: Some(content), .. })) => {
                    text.as_bytes() == content
                }
                (Expected::Mode(mode), Some(entry)) => entry.mode() == *mode,
                (Expected::Link(to), Some(Entry { link: Some(link), .. })) => link == to,
                (Expected::Folder, Some(entry)) => entry.is_folder(),
                _ => false,
            };
            if !right {
                problems.push(format!(
                    "{path} is {}, not {}",
                    json!(found.map(Entry::told)),
                    expected.told()
                ));
            }
        }
        problems
    }
}

impl Expected {
    fn told(&self) -> String {
        match self {
            Self::Content(text) => format!("a file with {text:?}"),
            Self::Mode(mode) => (*mode).to_owned(),
            Self::Link(to) => format!("a link to {to}"),
            Self::Folder => "a folder".to_owned(),
            Self::Absent => "absent".to_owned(),
        }
    }
}
