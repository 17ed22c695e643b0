//! Docker's credential helpers: programs that are asked for a registry's login
//! (<https://github.com/docker/docker-credential-helpers>).

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use kiln_registry::Credential;
use rustix::process::{Pid, Signal, kill_process_group};
use secrecy::SecretString;
use serde::Deserialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, Command};

use crate::docker_config::{HUB_KEY, login};

/// More than any helper has to say.
const OUTPUT_BYTES: u64 = 64 << 10;
/// What helpers write where they have no login for a registry.
const NONE: &str = "credentials not found in native keychain";

/// `ecr-login` of `docker-credential-ecr-login`. It can't be a path.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct HelperName(String);

impl HelperName {
    pub(crate) fn new(name: &str) -> Option<Self> {
        let fits = (1..=100).contains(&name.len())
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
        fits.then(|| Self(name.to_owned()))
    }

    fn program(&self) -> String {
        format!("docker-credential-{}", self.0)
    }
}

/// How helpers are run.
pub(crate) struct Helpers {
    /// Where they are looked for; empty: in PATH.
    pub(crate) folders: Vec<PathBuf>,
    pub(crate) timeout: Duration,
}

impl Helpers {
    /// The login for a registry, if the helper has one. An error says what went wrong, in no word of the helper's, which
    /// could be secret.
    pub(crate) async fn get(
        &self,
        helper: &HelperName,
        registry: &str,
    ) -> Result<Option<Credential>, String> {
        let (program, within) = (helper.program(), self.timeout);
        let mut places = self.folders.iter().map(|folder| folder.join(&program));
        let path = places.find(|path| path.is_file()).unwrap_or_else(|| program.clone().into());
        if !self.folders.is_empty() && path.is_relative() {
            return Err(format!("{program} is in none of `helper_folders`"));
        }
        let mut command = Command::new(path);
        // This process's own secrets may stand in variables.
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"KILN_"))
        {
            command.env_remove(name);
        }
        command.arg("get").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        // A group of its own, so that what it starts can be ended with it.
        command.process_group(0).kill_on_drop(true);
        let child = command.spawn().map_err(|error| format!("{program} can't be started: {error}"))?;
        let mut running = Running(child);
        let said = tokio::time::timeout(within, running.ask(registry)).await;
        let (succeeded, output) = said
            .map_err(|_| format!("{program} does not answer within {within:?}"))?
            .map_err(|error| format!("{program}: {error}"))?;
        if !succeeded {
            let none = String::from_utf8_lossy(&output).trim() == NONE;
            return if none { Ok(None) } else { Err(format!("{program} failed")) };
        }
        let answer: Answer =
            serde_json::from_slice(&output).map_err(|_| format!("{program} answers what is no login"))?;
        Ok(login(answer.username, answer.secret))
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    username: String,
    secret: SecretString,
}

struct Running(Child);

impl Running {
    async fn ask(&mut self, registry: &str) -> std::io::Result<(bool, Vec<u8>)> {
        let server = if registry == "docker.io" { HUB_KEY } else { registry };
        if let Some(mut input) = self.0.stdin.take() {
            // A helper may answer without having read.
            let _ = input.write_all(server.as_bytes()).await;
        }
        let mut output = Vec::new();
        if let Some(stdout) = self.0.stdout.take() {
            stdout.take(OUTPUT_BYTES + 1).read_to_end(&mut output).await?;
        }
        if output.len() as u64 > OUTPUT_BYTES {
            return Err(std::io::Error::other("it answers more than 64 KiB"));
        }
        Ok((self.0.wait().await?.success(), output))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Once it was waited for, its number may be another's.
        let leader = self.0.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        if let Some(leader) = leader {
            // It fails only for a group that is gone.
            let _ = kill_process_group(leader, Signal::KILL);
        }
    }
}
