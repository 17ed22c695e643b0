//! The keeper of Kiln's own buildkitd (`kiln keep-buildkitd`): starts it, and ends it when nobody has used it for a while.
//!
//! - **I am asked** by a builder that found no keeper, and by SIGTERM to end.
//! - **I never** end the daemon while a builder uses it (but for SIGTERM, or where its folder was removed).

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{ExitCode, Stdio};
use std::time::Duration;

use kiln_domain::run_folder::Settings;
use rustix::fs::{FlockOperation, flock};
use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_setfd};
use rustix::process::{Pid, Signal, geteuid, kill_process, set_child_subreaper};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use super::daemon::{Place, keeper};
use crate::children::{end_descendants, reap_orphans};
use crate::programs;

/// How often it is looked at who uses the daemon.
const LOOK: Duration = Duration::from_secs(1);
/// How often, and how soon after each other, a keeper tries to be the only one.
const LOOKS: u32 = 100;
const BETWEEN_LOOKS: Duration = Duration::from_millis(20);
/// For what a daemon that was asked to end has under way.
const ENDING: Duration = Duration::from_secs(10);
/// A longer log begins anew.
const LOG_BYTES: u64 = 1 << 20;
/// What a daemon may see of the environment.
const PASSED_ON: [&str; 12] = [
    "HOME",
    "TZ",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "ALL_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "all_proxy",
];

/// Keeps a daemon in `folder` until nobody uses it. With `detach`, starts a process of its own that does so.
pub fn keep(folder: &Path, detach: bool) -> ExitCode {
    let place = Place::at(folder);
    let kept = if detach { detached(&place) } else { kept(&place) };
    match kept {
        Ok(()) => ExitCode::SUCCESS,
        // Its standard error is the daemon's log.
        Err(error) => {
            let _ = std::io::Write::write_all(
                &mut std::io::stderr(),
                format!("kiln: cannot keep BuildKit's daemon: {error}\n").as_bytes(),
            );
            ExitCode::FAILURE
        }
    }
}

fn detached(place: &Place) -> io::Result<()> {
    let log = File::options().create(true).append(true).open(place.log())?;
    if log.metadata()?.len() > LOG_BYTES {
        log.set_len(0)?;
    }
    let mut command = keeper(place);
    command.current_dir(place.folder()).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    command.spawn().map(drop)
}

fn kept(place: &Place) -> io::Result<()> {
    // Refused only to who leads a group of processes already, which serves as well.
    let _ = rustix::process::setsid();
    let lock = place.keeper_lock()?;
    // A builder's short look at the lock doesn't count; another keeper has it for as long as it lives.
    let mut looks = 0;
    while flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        looks += 1;
        if looks > LOOKS {
            return Ok(());
        }
        std::thread::sleep(BETWEEN_LOOKS);
    }
    let settings: Settings = serde_json::from_slice(&std::fs::read(place.settings())?)?;
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(run(place, &settings, &lock))
}

async fn run(place: &Place, settings: &Settings, lock: &File) -> io::Result<()> {
    std::fs::write(place.folder().join("buildkitd.toml"), configuration(place, settings))?;
    // The socket of a daemon that was killed.
    let _ = std::fs::remove_file(place.socket());
    // What a daemon that was killed leaves of its steps comes here, and is ended with it.
    set_child_subreaper(Some(rustix::process::getpid()))?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut daemon = start(place, settings, lock)?;
    let (users, idle) = (place.users_lock()?, Duration::from_secs(settings.buildkit.idle_seconds));
    let (mut since, mut look) = (Instant::now(), interval(LOOK));
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            status = daemon.wait() => {
                end_descendants().await;
                return Err(io::Error::other(format!("buildkitd ended by itself: {}", status?)));
            }
            _ = terminate.recv() => break,
            _ = look.tick() => {}
        }
        reap_orphans(pid(&daemon));
        if !place.settings().exists() {
            break;
        }
        if flock(&users, FlockOperation::NonBlockingLockExclusive).is_err() {
            since = Instant::now();
        } else if since.elapsed() >= idle {
            // Still held: who comes now waits until the daemon is gone, and has another one started.
            break;
        } else {
            flock(&users, FlockOperation::Unlock)?;
        }
    }
    let ended = end(&mut daemon).await;
    end_descendants().await;
    let _ = std::fs::remove_file(place.socket());
    ended
}

/// The daemon, which holds the keeper's lock too: a second one on the same cache is never started.
fn start(place: &Place, settings: &Settings, lock: &File) -> io::Result<Child> {
    let inherited: OwnedFd = fcntl_dupfd_cloexec(lock, 200)?;
    fcntl_setfd(&inherited, FdFlags::empty())?;
    let mut command = if geteuid().is_root() {
        Command::new(program("buildkitd", settings)?)
    } else {
        let mut command = Command::new(program("rootlesskit", settings)?);
        command.arg("--net=host").arg(program("buildkitd", settings)?);
        command.args(["--rootless", "--oci-worker-no-process-sandbox", "--oci-worker-snapshotter=native"]);
        command
    };
    let passed = std::env::vars_os().filter(|(name, _)| PASSED_ON.iter().any(|passed| name == passed));
    command
        .arg("--config")
        .arg(place.folder().join("buildkitd.toml"))
        .env_clear()
        .envs(passed)
        .env("PATH", programs::path(settings.programs.as_deref()))
        // Its own clipping of logs is switched off: how long a log may be is Kiln's to say.
        .env("BUILDKIT_STEP_LOG_MAX_SIZE", "-1")
        .env("BUILDKIT_STEP_LOG_MAX_SPEED", "-1")
        .env("XDG_RUNTIME_DIR", place.folder())
        .current_dir(place.folder())
        .stdin(Stdio::null());
    command.spawn()
}

fn program(name: &str, settings: &Settings) -> io::Result<std::path::PathBuf> {
    let found = programs::find(name, settings.programs.as_deref());
    found.ok_or_else(|| io::Error::other(format!("{name} is not there")))
}

async fn end(daemon: &mut Child) -> io::Result<()> {
    if let Some(pid) = pid(daemon) {
        // It wasn't waited for yet, so the pid is its own.
        let _ = kill_process(pid, Signal::TERM);
    }
    match timeout(ENDING, daemon.wait()).await {
        Ok(ended) => ended.map(drop),
        Err(_) => daemon.kill().await,
    }
}

fn pid(daemon: &Child) -> Option<Pid> {
    daemon.id().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?))
}

/// buildkitd.toml(5).
fn configuration(place: &Place, settings: &Settings) -> String {
    // A JSON string is a TOML string.
    let text = |text: &str| serde_json::Value::from(text).to_string();
    let path = |name: &str| text(&place.folder().join(name).display().to_string());
    let mut configuration = format!(
        "root = {}\n\
         [log]\nlevel = \"warn\"\n\
         [grpc]\naddress = [{}]\n\
         [otel]\nsocketPath = {}\n\
         [worker.containerd]\nenabled = false\n\
         [worker.oci]\nenabled = true\nnetworkMode = \"host\"\ngc = true\nmaxUsedSpace = {}\n",
        path("root"),
        text(&place.address()),
        path("otel.sock"),
        settings.buildkit.cache_bytes,
    );
    let mut registries = settings.registries.clone();
    registries.plain(settings.buildkit.plain_http.iter().cloned());
    for (registry, reach) in registries.iter() {
        // Said in any case: BuildKit takes loopback for plain, whatever certificates are named for it.
        let plain = registries.is_plain(registry);
        configuration.push_str(&format!("[registry.{}]\nhttp = {plain}\n", text(registry)));
        if !reach.mirrors.is_empty() {
            configuration.push_str(&format!("mirrors = {}\n", serde_json::json!(reach.mirrors)));
        }
        if let Some(ca) = &reach.ca {
            configuration.push_str(&format!("ca = [{}]\n", text(&ca.display().to_string())));
        }
        if let Some(client) = &reach.client_certificate {
            let [key, certificate] =
                [&client.key, &client.certificate].map(|path| path.display().to_string());
            let (key, certificate) = (text(&key), text(&certificate));
            let table = format!("[[registry.{}.keypair]]\n", text(registry));
            configuration.push_str(&format!("{table}key = {key}\ncert = {certificate}\n"));
        }
    }
    configuration
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_daemon_is_told() {
        let mut settings = Settings::new("/data/layers".into());
        settings.buildkit.cache_bytes = 7_000_000;
        settings.buildkit.plain_http = vec!["registry.test:5000".into()];
        settings.registries = serde_json::from_str(
            r#"{"docker.io": {"mirrors": ["m.test/hub"]}, "registry.test:5000": {"mirrors": []},
                "tls.test": {"ca": "/ca", "client_certificate": {"certificate": "/c", "key": "/k"}}}"#,
        )
        .unwrap();
        let told = configuration(&Place::of(&settings), &settings);
        for part in [
            "root = \"/data/layers/buildkit/root\"\n",
            "address = [\"unix:///data/layers/buildkit/buildkitd.sock\"]\n",
            "maxUsedSpace = 7000000\n",
            "[registry.\"registry.test:5000\"]\nhttp = true\n",
            "[registry.\"docker.io\"]\nhttp = false\nmirrors = [\"m.test/hub\"]\n",
            "[registry.\"tls.test\"]\nhttp = false\nca = [\"/ca\"]\n[[registry.\"tls.test\".keypair]]\nkey = \"/k\"\ncert = \"/c\"\n",
        ] {
            assert!(told.contains(part), "{part} is missing in {told}");
        }
    }
}
