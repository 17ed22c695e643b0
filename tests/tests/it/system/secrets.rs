//! A build's credentials are nowhere but where they are used.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::time::Duration;

use anyhow::{Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE};
use futures::StreamExt as _;
use kiln_bus::events::{From, subscribe};
use kiln_domain::run_folder;
use kiln_proto::kiln_v1 as api;

use super::{DOCKERFILE, Stage, begun, dockerfile, is_over};

/// What the Dockerfile says aloud, as a careless one may.
const SAID: &str = "hunter2-is-a-long-enough-password";
/// `user:` and [`SAID`].
const SAID_PAIR: &str = "dXNlcjpodW50ZXIyLWlzLWEtbG9uZy1lbm91Z2gtcGFzc3dvcmQ=";
/// What nobody says.
const UNSAID: &str = "battery-staple-for-the-registry";
/// `ann:` and [`UNSAID`].
const UNSAID_PAIR: &str = "YW5uOmJhdHRlcnktc3RhcGxlLWZvci10aGUtcmVnaXN0cnk=";

#[tokio::test(flavor = "multi_thread")]
async fn a_password_is_in_no_log_event_argument_or_file_that_stays() -> Result<()> {
    let stage = Stage::set().await?;
    let echo = format!("{DOCKERFILE}RUN [\"/bin/busybox\", \"echo\", \"{SAID}\"]\n");
    let repository = stage.workshop.repository(&[("Dockerfile", &echo)], &["."])?;
    let pairs = [("registry.example:5000", SAID_PAIR), ("other.example", UNSAID_PAIR)];
    let auth = api::RegistryAuth {
        credentials: pairs.map(|(host, pair)| (host.to_owned(), pair.to_owned())).into(),
        ..Default::default()
    };
    let request = api::BuildImageRequest { auth: Some(auth), ..dockerfile(&repository.uri, |_| {}) };
    let mut arguments = BTreeSet::new();
    let (log, over) = tokio::select! {
        done = async {
            let build = begun(stage.ask(request).await?)?;
            let log = stage.kiln.whole_log(&build.id).await?;
            anyhow::Ok((log, stage.kiln.until(&build.id, is_over).await?))
        } => done?,
        watched = note_arguments(&mut arguments) => return watched,
    };
    ensure!(over.state() == api::BuildState::Succeeded, "{over:?}");

    let text = String::from_utf8_lossy(&log);
    ensure!(holds(&log).is_none(), "{text}");
    ensure!(holds(format!("{over:?}").as_bytes()).is_none());
    ensure!(holds(stage.kiln.log().as_bytes()).is_none(), "{}", stage.kiln.log());

    ensure!(
        arguments.iter().any(|line| line.contains("--authfile")),
        "the builder's tool was not seen at work"
    );
    // The step's own process has what the Dockerfile says in its arguments.
    let shown = |line: &&String| [SAID_PAIR, UNSAID, UNSAID_PAIR].iter().any(|secret| line.contains(secret));
    let shown: Vec<_> = arguments.iter().filter(shown).collect();
    ensure!(shown.is_empty(), "{shown:?}");

    let mut events = pin!(subscribe(&stage.kiln.endpoint("nats")?, From::Beginning).await?);
    while let Some(event) = events.next().await {
        let event = event?;
        ensure!(holds(format!("{event:?} {}", event.data).as_bytes()).is_none(), "{event:?}");
        if event.data["state"] == "SUCCEEDED" {
            break;
        }
    }

    let nats = files(&stage.kiln.data().join("nats"))?;
    ensure!(!nats.is_empty());
    ensure!(with_secret(&nats).is_empty(), "{:?}", with_secret(&nats));
    // What the builder was given, and made of it for its tools, goes once the log is complete.
    let runs = stage.kiln.data().join("runs");
    ensure!(runs.is_dir());
    kiln_testkit::workshop::until("the run's secrets are removed", || {
        let files = files(&runs)?;
        Ok(!files.iter().any(|path| is_for_secrets(path)) && with_secret(&files).is_empty())
    })
    .await?;
    // The layers and the registry have the Dockerfile's words, and no others.
    let unsaid = |path: &PathBuf| {
        std::fs::read(path).is_ok_and(|content| has(&content, UNSAID) || has(&content, UNSAID_PAIR))
    };
    let left: Vec<_> = files(&stage.kiln.data())?.into_iter().filter(unsaid).collect();
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

/// One that has something to be escaped in every encoding.
const TOKEN: &str = "hunter/2 \"is\" a+long?p\u{e4}ssw\u{f6}rd";
/// One of several lines.
const KEY: &str = "-----BEGIN KEY-----\nq7Vz0cKf3JmWx81RtY\nuH5oPb92LdNsAeGi4T\n-----END KEY-----\n";
/// What no secret is: where this is found, a secret would have been found, too.
const MARK: &str = "mark-3f9ab2-of-what-was-said";

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_that_the_steps_say_in_any_encoding_is_in_no_log_event_or_file_of_the_bus() -> Result<()> {
    let stage = Stage::set().await?;
    let said = said();
    let lines: String = said.iter().map(|(name, text, _)| format!("{name} <{text}>\n")).collect();
    let dockerfile_text = format!(
        "FROM scratch\n\
         COPY busybox said /bin/\n\
         RUN [\"/bin/busybox\", \"cat\", \"/bin/said\"]\n\
         RUN [\"/bin/busybox\", \"echo\", \"{}\"]\n\
         RUN --mount=type=secret,id=key [\"/bin/busybox\", \"sh\", \"-c\", \"cd /run/secrets; b=/bin/busybox; \
           $b cat key; $b base64 key; $b tac key; while read -r line; do echo a line: $line.; done <key\"]\n",
        percent(TOKEN),
    );
    let files = [("Dockerfile", dockerfile_text.as_str()), ("said", &format!("{MARK}\n{lines}"))];
    let repository = stage.workshop.repository(&files, &["."])?;
    let mut request = dockerfile(&repository.uri, |_| {});
    request.secrets = [("token", TOKEN), ("key", KEY)].map(|(id, text)| (id.into(), text.into())).into();
    let build = begun(stage.ask(request).await?)?;
    let log = stage.kiln.whole_log(&build.id).await?;
    let over = stage.kiln.until(&build.id, is_over).await?;
    let text = String::from_utf8_lossy(&log);
    ensure!(over.state() == api::BuildState::Succeeded, "{over:?}\n{text}");

    // All of it was said, and each time the mask stands in its place.
    for (name, ..) in &said {
        let line = text.lines().find(|line| line.starts_with(&format!("{name} <")));
        ensure!(line.is_some_and(|line| line.contains("***")), "{name}: {line:?}\n{text}");
    }
    ensure!(text.matches("a line: ***.").count() == 4, "{text}");
    let mut hidden: Vec<String> = said.into_iter().map(|(.., hidden)| hidden).collect();
    hidden.extend(KEY.lines().map(Into::into));
    hidden
        .extend(STANDARD.encode(KEY).as_bytes().chunks(76).map(|line| String::from_utf8_lossy(line).into()));
    let shown = |text: &[u8]| hidden.iter().find(|hidden| has(text, hidden)).cloned();
    ensure!(shown(&log).is_none(), "{:?} in {text}", shown(&log));
    ensure!(shown(format!("{over:?}").as_bytes()).is_none(), "{over:?}");
    ensure!(shown(stage.kiln.log().as_bytes()).is_none(), "{}", stage.kiln.log());
    let mut events = pin!(subscribe(&stage.kiln.endpoint("nats")?, From::Beginning).await?);
    while let Some(event) = events.next().await {
        let event = event?;
        ensure!(shown(format!("{event:?} {}", event.data).as_bytes()).is_none(), "{event:?}");
        if event.data["state"] == "SUCCEEDED" {
            break;
        }
    }
    let mut marked = false;
    for file in self::files(&stage.kiln.data().join("nats"))? {
        let Ok(content) = std::fs::read(&file) else { continue };
        ensure!(shown(&content).is_none(), "{:?} in {}", shown(&content), file.display());
        marked |= has(&content, MARK);
    }
    ensure!(marked, "the bus stores the log in a form in which nothing would be found");
    Ok(())
}

/// What the steps say: a name, a text, and what of it must be seen nowhere.
fn said() -> Vec<(String, String, String)> {
    let mut said = Vec::new();
    for (name, secret) in [("token", TOKEN), ("key", KEY)] {
        let json = serde_json::Value::from(secret).to_string();
        let json = json.trim_matches('"');
        let escaped = json.replace('\u{e4}', "\\u00e4").replace('\u{f6}', "\\u00f6");
        let percent = percent(secret);
        for (form, text) in [
            ("json", json),
            ("json-ascii", &escaped),
            ("json-slash", &json.replace('/', "\\/")),
            ("url", &percent),
            ("url-lower-case", &lower_case(&percent)),
            ("form", &percent.replace("%20", "+")),
        ] {
            said.push((format!("{name}-{form}"), format!("https://ann:{text}@host"), text.to_owned()));
        }
        for (alphabet, engine) in
            [("base64", &STANDARD), ("base64url", &URL_SAFE), ("base64-bare", &STANDARD_NO_PAD)]
        {
            for before in ["", "a", "ab"] {
                let text = engine.encode(format!("{before}{secret}zz"));
                // The digits at the borders are not the secret's alone.
                let within = text[4..text.len() - 8].to_owned();
                said.push((format!("{name}-{alphabet}-{}", before.len()), text, within));
            }
        }
    }
    said.push(("token-raw".into(), format!("x{TOKEN}x"), TOKEN.into()));
    said
}

/// All but letters and digits as `%2F`.
fn percent(text: &str) -> String {
    text.bytes()
        .map(|byte| {
            if byte.is_ascii_alphanumeric() || b"-_.".contains(&byte) {
                char::from(byte).to_string()
            } else {
                format!("%{byte:02X}")
            }
        })
        .collect()
}

/// `%2f` for `%2F`, and all else as it is.
fn lower_case(percent: &str) -> String {
    let mut parts = percent.split('%');
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |text, part| format!("{text}%{}{}", part[..2].to_lowercase(), &part[2..]))
}

/// Notes the arguments of every process of this machine, until it is dropped.
async fn note_arguments(seen: &mut BTreeSet<String>) -> Result<()> {
    loop {
        for process in std::fs::read_dir("/proc")?.flatten() {
            let is_process = process.file_name().to_string_lossy().bytes().all(|b| b.is_ascii_digit());
            // Ended meanwhile, or a thread of the kernel.
            let Some(line) = std::fs::read(process.path().join("cmdline"))
                .ok()
                .filter(|line| is_process && !line.is_empty())
            else {
                continue;
            };
            seen.insert(String::from_utf8_lossy(&line).replace('\0', " "));
        }
        tokio::time::sleep(Duration::from_millis(3)).await;
    }
}

/// Whether a file of this name is made to hold secrets.
fn is_for_secrets(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    [run_folder::SECRETS, "auth.json", "git-credentials"].contains(&&*name) || name.starts_with("secret-")
}

fn with_secret(files: &[PathBuf]) -> Vec<(&PathBuf, &'static str)> {
    // A file may have been removed meanwhile.
    files.iter().filter_map(|path| Some((path, holds(&std::fs::read(path).ok()?)?))).collect()
}

/// The secret that a text holds, plain or as the request had it.
fn holds(text: &[u8]) -> Option<&'static str> {
    [SAID, SAID_PAIR, UNSAID, UNSAID_PAIR].into_iter().find(|secret| has(text, secret))
}

fn has(text: &[u8], secret: &str) -> bool {
    text.windows(secret.len()).any(|window| window == secret.as_bytes())
}

/// The files under a folder, as far as they aren't removed meanwhile; no symlinks.
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries = match std::fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error.into()),
        };
        for entry in entries.flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => folders.push(entry.path()),
                Ok(kind) if kind.is_file() => files.push(entry.path()),
                _ => {}
            }
        }
    }
    Ok(files)
}
