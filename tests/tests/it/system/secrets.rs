//! A build's credentials are nowhere but where they are used.

use std::path::Path;

use anyhow::{Result, ensure};
use kiln_proto::kiln_v1 as api;

use super::{DOCKERFILE, Stage, begun, dockerfile, is_over};

const PASSWORD: &str = "hunter2-is-a-long-enough-password";

#[tokio::test(flavor = "multi_thread")]
async fn a_password_is_in_no_log_event_or_file_that_stays() -> Result<()> {
    let stage = Stage::set().await?;
    // The Dockerfile says the registry password aloud, as a careless one may.
    let echo = format!("{DOCKERFILE}RUN [\"/bin/busybox\", \"echo\", \"{PASSWORD}\"]\n");
    let repository = stage.workshop.repository(&[("Dockerfile", &echo)], &["."])?;
    // base64 of user:hunter2-is-a-long-enough-password
    let pair = "dXNlcjpodW50ZXIyLWlzLWEtbG9uZy1lbm91Z2gtcGFzc3dvcmQ=";
    let auth = api::RegistryAuth {
        credentials: [("registry.example:5000".to_owned(), pair.to_owned())].into(),
        ..Default::default()
    };
    let request = api::BuildImageRequest { auth: Some(auth), ..dockerfile(&repository.uri, |_| {}) };
    let build = begun(stage.ask(request).await?)?;
    let log = stage.kiln.whole_log(&build.id).await?;
    let over = stage.kiln.until(&build.id, is_over).await?;
    ensure!(over.state() == api::BuildState::Succeeded, "{over:?}");
    let text = String::from_utf8_lossy(&log);
    ensure!(!text.contains(PASSWORD), "{text}");
    ensure!(!format!("{over:?}").contains(PASSWORD));
    ensure!(!stage.kiln.log().contains(PASSWORD));
    let mut found = Vec::new();
    let nats = stage.kiln.data().join("nats");
    ensure!(nats.is_dir());
    search(&nats, &mut found)?;
    ensure!(found.is_empty(), "{found:?}");
    // What the builder was given goes once the log is complete.
    let runs = stage.kiln.data();
    kiln_testkit::workshop::until("the run's secrets are removed", || {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(&runs)? {
            let path = entry?.path();
            if path.is_dir() && !path.ends_with("registry") && !path.ends_with("buildah") && !path.ends_with("storage") {
                search(&path, &mut found)?;
            }
        }
        found.retain(|path| path.contains("secrets"));
        Ok(found.is_empty())
    })
    .await
}

/// The files under a folder that hold the password, plain or base64.
fn search(folder: &Path, found: &mut Vec<String>) -> Result<()> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        // Removed meanwhile.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    for entry in entries {
        let path = entry?.path();
        if path.is_symlink() {
            continue;
        }
        if path.is_dir() {
            search(&path, found)?;
        } else if let Ok(content) = std::fs::read(&path) {
            for needle in [PASSWORD.as_bytes(), b"aHVudGVyMi1pcy1hLWxvbmct"] {
                if content.windows(needle.len()).any(|window| window == needle) {
                    found.push(path.display().to_string());
                }
            }
        }
    }
    Ok(())
}
