//! Revisions to commits, by the real git.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use futures::future::join_all;
use kiln_contract::error::Code;
use kiln_resolver::Config;
use tempfile::TempDir;

use crate::http_git::{HttpGit, Manner};
use crate::rig::Rig;

const LOGIN: &str = "kiln:s3cret & w/rd";
const USERNAME: &str = "kiln";
const PASSWORD: &str = "s3cret & w/rd";

/// A repository `repo` with a branch, a further branch, a light and an annotated tag.
struct Repository {
    folder: TempDir,
}

impl Repository {
    fn new() -> Self {
        let repository = Self { folder: TempDir::new().unwrap() };
        repository.git(&["init", "-q", "-b", "main", "."]);
        repository.commit("one");
        repository.git(&["tag", "light"]);
        repository.git(&["tag", "-a", "v1", "-m", "v1"]);
        repository.git(&["branch", "feature/x"]);
        repository.commit("two");
        repository
    }

    fn root(&self) -> &Path {
        self.folder.path()
    }

    fn url(&self) -> String {
        format!("file://{}/repo", self.root().display())
    }

    fn commit(&self, message: &str) -> String {
        self.git(&["commit", "-q", "--allow-empty", "-m", message]);
        self.commit_of("HEAD")
    }

    fn commit_of(&self, revision: &str) -> String {
        self.git(&["rev-parse", &format!("{revision}^{{commit}}")])
    }

    fn git(&self, arguments: &[&str]) -> String {
        let repo = self.root().join("repo");
        std::fs::create_dir_all(&repo).unwrap();
        let output = Command::new("git")
            .args(["-c", "user.name=test", "-c", "user.email=test@localhost"])
            .args(arguments)
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .current_dir(repo)
            .output()
            .unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }
}

fn with_files() -> Config {
    Config { file_remotes: true, commit_fresh_seconds: 0, ..Config::default() }
}

#[tokio::test]
async fn branches_tags_head_and_commits() {
    let (rig, repository) = (Rig::new(with_files()).await, Repository::new());
    let (head, first) = (repository.commit_of("HEAD"), repository.commit_of("HEAD~1"));
    for (revision, commit) in [
        ("", &head),
        ("HEAD", &head),
        ("main", &head),
        ("refs/heads/main", &head),
        ("feature/x", &first),
        ("light", &first),
        ("v1", &first),
        ("refs/tags/v1", &first),
        (&first, &first),
        (&first.to_uppercase(), &first),
    ] {
        assert_eq!(rig.commit(&repository.url(), revision).await.as_ref(), Ok(commit), "{revision}");
    }
    let moved = repository.commit("three");
    assert_eq!(rig.commit(&repository.url(), "main").await, Ok(moved));
}

#[tokio::test]
async fn what_cannot_be_resolved_names_its_field() {
    const REMOTE: &str = "source.dockerfile.git.remote_uri: ";
    const REVISION: &str = "source.dockerfile.git.revision: ";
    let (mut rig, repository) = (Rig::new(with_files()).await, Repository::new());
    let http = HttpGit::start(repository.root(), Manner::Open).await;
    let (file, web) = (repository.url(), format!("{}/repo", http.url));
    let nowhere = format!("file://{}/nowhere", repository.root().display());
    let (short, commit) = (&repository.commit_of("HEAD")[..7], repository.commit_of("HEAD"));
    let touched = repository.root().join("touched");
    let touch = format!("touch {}", touched.display());
    for (remote, revision, code, beginning) in [
        (file.as_str(), "no-such", Code::NotFound, REVISION),
        (&web, "no-such", Code::NotFound, REVISION),
        (&file, short, Code::InvalidArgument, REVISION),
        (&nowhere, "", Code::NotFound, REMOTE),
        (&nowhere, &commit, Code::NotFound, REMOTE),
        (&format!("{}/nowhere", http.url), "main", Code::NotFound, REMOTE),
        ("http://no-such-host.invalid/x", "", Code::NotFound, REMOTE),
        ("http://127.0.0.1:1/x", "", Code::Unavailable, REMOTE),
        ("", "", Code::InvalidArgument, REMOTE),
        (&format!("--upload-pack={touch}"), "", Code::InvalidArgument, REMOTE),
        (&format!("ext::sh -c {touch}"), "", Code::InvalidArgument, REMOTE),
        (&format!("ext::sh -c {}", touch.replace(' ', "%20")), "", Code::InvalidArgument, REMOTE),
        ("git@github.com:x/y", "", Code::InvalidArgument, REMOTE),
        ("https://user:s3cret@github.com/x", "", Code::InvalidArgument, REMOTE),
        ("ssh://-oProxyCommand=touch/y", "", Code::InvalidArgument, REMOTE),
        (&file, &format!("--upload-pack={touch}"), Code::InvalidArgument, REVISION),
        (&file, "main^{/x}", Code::InvalidArgument, REVISION),
        (&file, "*", Code::InvalidArgument, REVISION),
    ] {
        let refusal = rig.commit(remote, revision).await.unwrap_err();
        assert_eq!(refusal.code, code, "{remote} {revision}: {refusal}");
        assert!(refusal.message.starts_with(beginning), "{remote} {revision}: {refusal}");
        assert!(!refusal.message.contains("s3cret"), "{refusal}");
    }
    assert!(!touched.exists());
    let refusal = rig.commit_as(&web, "", "kiln", "two\nlines-s3cret").await.unwrap_err();
    assert_eq!(refusal.code, Code::InvalidArgument, "{refusal}");
    assert!(!refusal.message.contains("s3cret"), "{refusal}");

    rig.replace(Config::default()).await;
    let refusal = rig.commit(&file, "main").await.unwrap_err();
    assert_eq!(refusal.code, Code::InvalidArgument);
    assert!(refusal.message.contains("file:// is not admitted"), "{refusal}");
    rig.replace(Config { git: "/no/such/git".into(), ..Config::default() }).await;
    assert_eq!(rig.commit(&web, "main").await.unwrap_err().code, Code::Internal);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_is_kept_for_seconds_for_who_shows_the_same() {
    let config = Config { commit_fresh_seconds: 60, ..Config::default() };
    let (rig, repository) = (Rig::new(config).await, Repository::new());
    let http = HttpGit::start(repository.root(), Manner::Password(LOGIN.into())).await;
    let (remote, head) = (format!("{}/repo", http.url), repository.commit_of("HEAD"));

    let answers = join_all((0..50).map(|_| rig.commit_as(&remote, "main", USERNAME, PASSWORD))).await;
    assert!(answers.iter().all(|answer| answer.as_ref() == Ok(&head)), "{answers:?}");
    // Refused without credentials, then with them: the list of refs, and the question for some of them.
    assert!(http.count() <= 4, "asked {} times", http.count());
    let asked = http.count();
    assert_eq!(rig.commit_as(&remote, "main", USERNAME, PASSWORD).await, Ok(head.clone()));
    assert_eq!(http.count(), asked);

    for (username, password) in [("", ""), (USERNAME, "wrong-s3cret"), ("other", PASSWORD)] {
        for revision in ["main", &head] {
            let refusal = rig.commit_as(&remote, revision, username, password).await.unwrap_err();
            assert_eq!(refusal.code, Code::Unauthenticated, "{refusal}");
            assert!(!refusal.message.contains("s3cret"), "{refusal}");
        }
    }
    let refusal = rig.commit_as(&remote, "soon", USERNAME, PASSWORD).await.unwrap_err();
    assert_eq!(refusal.code, Code::NotFound, "{refusal}");
    repository.git(&["branch", "soon"]);
    assert_eq!(rig.commit_as(&remote, "soon", USERNAME, PASSWORD).await, Ok(head), "a no isn't kept");
}

#[tokio::test]
async fn credentials_are_in_no_arguments() {
    let (rig, repository) = (Rig::new(Config::default()).await, Repository::new());
    let http = HttpGit::start(repository.root(), Manner::Password(LOGIN.into())).await;
    let remote = format!("{}/repo", http.url);
    http.hold(true);
    let looked = async {
        http.asked(1).await;
        let before = arguments_of_all();
        assert!(before.iter().any(|arguments| arguments.contains(&remote)), "git runs");
        http.hold(false);
        let mut all = before;
        // Until it was shown the credentials, and a little beyond: whatever is run is seen.
        while http.shown().is_empty() {
            all.extend(arguments_of_all());
            tokio::task::yield_now().await;
        }
        all.extend(arguments_of_all());
        for arguments in all {
            assert!(!arguments.contains("s3cret"), "{arguments}");
        }
    };
    let (commit, ()) = tokio::join!(rig.commit_as(&remote, "main", USERNAME, PASSWORD), looked);
    assert_eq!(commit, Ok(repository.commit_of("HEAD")));
}

#[tokio::test]
async fn credentials_follow_no_redirect() {
    let (rig, repository) = (Rig::new(Config::default()).await, Repository::new());
    let other = HttpGit::start(repository.root(), Manner::Password(LOGIN.into())).await;
    let http = HttpGit::start(repository.root(), Manner::Redirect(other.url.clone())).await;
    let remote = format!("{}/repo", http.url);
    let refusal = rig.commit_as(&remote, "main", USERNAME, PASSWORD).await.unwrap_err();
    assert_eq!(refusal.code, Code::Unauthenticated, "{refusal}");
    assert!(other.count() > 0);
    assert_eq!(other.shown(), Vec::<String>::new());
}

#[tokio::test]
async fn a_remote_that_never_answers_is_given_up_with_all_that_was_run_for_it() {
    let config = Config { git_timeout_seconds: 1, ..Config::default() };
    let (rig, repository) = (Rig::new(config).await, Repository::new());
    let http = HttpGit::start(repository.root(), Manner::Open).await;
    http.hold(true);
    let remote = format!("{}/repo", http.url);
    let refusal = rig.commit(&remote, "main").await.unwrap_err();
    assert_eq!(refusal.code, Code::Unavailable);
    assert!(refusal.message.contains("did not answer within 1s"), "{refusal}");
    let gone = async {
        while arguments_of_all().iter().any(|arguments| arguments.contains(&remote)) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), gone).await.expect("git and its helpers are gone");
}

/// The arguments of every process of this machine that we may see.
fn arguments_of_all() -> Vec<String> {
    let processes = std::fs::read_dir("/proc").unwrap();
    let arguments = processes.filter_map(|entry| std::fs::read(entry.ok()?.path().join("cmdline")).ok());
    arguments.map(|bytes| String::from_utf8_lossy(&bytes).replace('\0', " ")).collect()
}
