//! A real registry of one's own: Debian's `docker-registry` (upstream's `registry`) as a child process.
//!
//! It listens on a free port of 127.0.0.1, keeps what it is given in a folder that is removed with it, and is
//! killed on drop. Images are put into it by plain HTTP, so that a client under test is not its own witness.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use jiff::Timestamp;
use kiln_domain::reference::{Digest, ImageReference};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::authority::Authority;

/// How long a registry may take to listen.
const START: Duration = Duration::from_secs(20);

/// The one user of a registry with a password.
pub const USERNAME: &str = "kiln";
/// Its password, with a colon on purpose.
pub const PASSWORD: &str = "se:cret word";
/// bcrypt of [`PASSWORD`], the only hash that docker-registry reads.
const PASSWORD_HASH: &str = "$2y$05$kilnkilnkilnkilnkilnkufBcH5WMQqTTT26Ivs.0DS0/qlE/uKde";

pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
pub const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// A running docker-registry.
#[derive(Debug)]
pub struct DockerRegistry {
    folder: TempDir,
    address: String,
    password: bool,
    /// The `tls` of its configuration.
    tls: Option<Value>,
    child: Option<Child>,
    client: reqwest::Client,
}

/// A manifest that was put.
#[derive(Clone, Debug)]
pub struct Put {
    /// When that was done.
    pub at: Timestamp,
    /// `/v2/<repository>/manifests/<tag or digest>`
    pub path: String,
    /// What the client said that it is; empty if it said nothing.
    pub user_agent: String,
}

/// The files of an image's only layer: path without a leading slash, and content. All are executable.
pub type Files<'a> = &'a [(&'a str, &'a [u8])];

impl DockerRegistry {
    /// A registry that anyone may read and write.
    pub async fn start() -> Result<Self> {
        Self::launch(false, None, plain_client()?).await
    }

    /// A registry that asks for [`USERNAME`] and [`PASSWORD`] by a Basic challenge.
    pub async fn start_with_password() -> Result<Self> {
        Self::launch(true, None, plain_client()?).await
    }

    /// A registry with a password that speaks TLS; with `wants_certificate` only to who shows a certificate of the authority.
    pub async fn start_with_tls(authority: &Authority, wants_certificate: bool) -> Result<Self> {
        let [certificate, key] = authority.server();
        let client_authorities: Vec<_> = wants_certificate.then(|| authority.ca()).into_iter().collect();
        let tls = json!({"certificate": certificate, "key": key, "clientcas": client_authorities});
        let ca = reqwest::Certificate::from_pem(&std::fs::read(authority.ca())?)?;
        let mut client = client_builder().tls_certs_only([ca]);
        if wants_certificate {
            let [certificate, key] = authority.client();
            let own = [std::fs::read(certificate)?, std::fs::read(key)?].concat();
            client = client.identity(reqwest::Identity::from_pem(&own)?);
        }
        Self::launch(true, Some(tls), client.build()?).await
    }

    async fn launch(password: bool, tls: Option<Value>, client: reqwest::Client) -> Result<Self> {
        let folder = TempDir::new()?;
        std::fs::write(folder.path().join("htpasswd"), format!("{USERNAME}:{PASSWORD_HASH}\n"))?;
        let mut registry = Self { folder, address: "127.0.0.1:0".into(), password, tls, child: None, client };
        registry.start_again().await?;
        Ok(registry)
    }

    /// `127.0.0.1:port`; it stays the same over [`stop`](Self::stop) and [`start_again`](Self::start_again).
    pub fn address(&self) -> &str {
        &self.address
    }

    /// `name` (`repository[:tag][@digest]`) in this registry.
    pub fn reference(&self, name: &str) -> Result<ImageReference> {
        Ok(format!("{}/{name}", self.address).parse()?)
    }

    /// Kills the registry; its port then refuses, its content stays.
    pub fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Either fails only for a child that has ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Starts a stopped registry on the same address, with the same content; a running one is killed first.
    pub async fn start_again(&mut self) -> Result<()> {
        self.stop();
        let folder = self.folder.path();
        let config = folder.join("config.yml");
        let log = folder.join("log");
        std::fs::write(&config, self.config())?;
        let child = Command::new(binary()?)
            .arg("serve")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(&log)?)
            .spawn()
            .context("start docker-registry")?;
        let child = self.child.insert(child);
        self.address = tokio::time::timeout(START, listening(child, &log))
            .await
            .context("docker-registry does not listen in time")??;
        Ok(())
    }

    /// SIGSTOP: it answers nothing, and its connections stay.
    pub fn pause(&self) -> Result<()> {
        self.signal(Signal::STOP)
    }

    /// SIGCONT after [`pause`](Self::pause).
    pub fn resume(&self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let child = self.child.as_ref().context("the registry does not run")?;
        kill_process(Pid::from_child(child), signal).context("signal the registry")
    }

    /// The manifests that were put since its start, by its own log.
    pub fn puts(&self) -> Result<Vec<Put>> {
        let log = std::fs::read_to_string(self.folder.path().join("log"))?;
        let mut puts = Vec::new();
        for line in log.lines().filter(|line| line.contains("\"response completed\"")) {
            let line: Value = serde_json::from_str(line)?;
            let text = |name: &str| line.get(name).and_then(Value::as_str).unwrap_or_default();
            let path = text("http.request.uri");
            if text("http.request.method") == "PUT" && path.contains("/manifests/") {
                let (at, user_agent) = (text("time").parse()?, text("http.request.useragent").to_owned());
                puts.push(Put { at, path: path.to_owned(), user_agent });
            }
        }
        Ok(puts)
    }

    fn config(&self) -> String {
        let folder = self.folder.path().display();
        let auth = if self.password {
            format!("auth:\n  htpasswd:\n    realm: kiln\n    path: {folder}/htpasswd\n")
        } else {
            String::new()
        };
        let tls = self.tls.as_ref().map(|tls| format!(", tls: {tls}")).unwrap_or_default();
        format!(
            "version: 0.1\nlog: {{accesslog: {{disabled: true}}, formatter: json}}\nstorage:\n  filesystem: {{rootdirectory: {folder}/storage}}\n  \
             delete: {{enabled: true}}\nhttp: {{addr: \"{}\", secret: tests{tls}}}\n{auth}",
            self.address
        )
    }

    /// Pushes a one-layer OCI image as `name` (`repository:tag`); returns its manifest's digest.
    pub async fn push_image(&self, name: &str, platform: &str, files: Files<'_>) -> Result<Digest> {
        let (repository, tag) = split(name)?;
        let manifest = self.put_image(repository, platform, files).await?;
        self.push_manifest(repository, tag, OCI_MANIFEST, &manifest).await
    }

    /// Pushes an OCI index of one-layer images, one for each platform, as `name`; returns the index's digest
    /// and those of its images, in the order given.
    pub async fn push_index(
        &self,
        name: &str,
        images: &[(&str, Files<'_>)],
    ) -> Result<(Digest, Vec<Digest>)> {
        let (repository, tag) = split(name)?;
        let (mut entries, mut digests) = (Vec::new(), Vec::new());
        for (platform, files) in images {
            let manifest = self.put_image(repository, platform, files).await?;
            let digest = Digest::of(&manifest);
            self.push_manifest(repository, digest.as_str(), OCI_MANIFEST, &manifest).await?;
            let (os, architecture, variant) = parts(platform);
            let mut named = json!({"os": os, "architecture": architecture, "variant": variant});
            remove_nulls(&mut named);
            entries.push(json!({
                "mediaType": OCI_MANIFEST, "digest": digest, "size": manifest.len(), "platform": named,
            }));
            digests.push(digest);
        }
        let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).to_string();
        Ok((self.push_manifest(repository, tag, OCI_INDEX, index.as_bytes()).await?, digests))
    }

    /// Pushes an image's blobs, and returns the manifest that is still to be pushed.
    async fn put_image(&self, repository: &str, platform: &str, files: Files<'_>) -> Result<Vec<u8>> {
        let layer = tar(files)?;
        let (os, architecture, variant) = parts(platform);
        let mut config = json!({
            "os": os,
            "architecture": architecture,
            "variant": variant,
            "config": {},
            "history": [{"created_by": "testkit"}],
            "rootfs": {"type": "layers", "diff_ids": [Digest::of(&layer)]},
        });
        remove_nulls(&mut config);
        let config = config.to_string().into_bytes();
        self.push_blob(repository, &layer).await?;
        self.push_blob(repository, &config).await?;
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": descriptor(OCI_CONFIG, &config),
            "layers": [descriptor(OCI_LAYER, &layer)],
        });
        Ok(manifest.to_string().into_bytes())
    }

    /// Pushes a blob; returns its digest.
    pub async fn push_blob(&self, repository: &str, content: &[u8]) -> Result<Digest> {
        let digest = Digest::of(content);
        let url = format!("{}/v2/{repository}/blobs/uploads/?digest={digest}", self.url());
        let answer = self.as_user(self.client.post(url)).send().await?;
        let location = answer.headers().get("location").context("no upload location")?.to_str()?;
        let separator = if location.contains('?') { '&' } else { '?' };
        let put = self.client.put(format!("{location}{separator}digest={digest}")).body(content.to_vec());
        let answer = self.as_user(put).send().await?;
        ensure!(answer.status() == 201, "blob of {repository}: {}", answer.text().await?);
        Ok(digest)
    }

    /// Pushes a manifest, whatever is in it, under a tag or its digest; returns its digest.
    pub async fn push_manifest(
        &self,
        repository: &str,
        selector: &str,
        media_type: &str,
        content: &[u8],
    ) -> Result<Digest> {
        let url = format!("{}/v2/{repository}/manifests/{selector}", self.url());
        let put = self.client.put(url).header("content-type", media_type).body(content.to_vec());
        let answer = self.as_user(put).send().await?;
        ensure!(answer.status() == 201, "manifest of {repository}: {}", answer.text().await?);
        Ok(Digest::of(content))
    }

    /// The manifest under a tag or digest, its media type and bytes; `None` if there is none.
    pub async fn manifest(&self, repository: &str, selector: &str) -> Result<Option<(String, Vec<u8>)>> {
        let url = format!("{}/v2/{repository}/manifests/{selector}", self.url());
        let get =
            self.client.get(url).header("accept", format!("{OCI_MANIFEST}, {OCI_INDEX}, {DOCKER_TYPES}"));
        let answer = self.as_user(get).send().await?;
        if answer.status() == 404 {
            return Ok(None);
        }
        let media_type =
            answer.headers().get("content-type").context("no content type")?.to_str()?.to_owned();
        Ok(Some((media_type, answer.error_for_status()?.bytes().await?.to_vec())))
    }

    /// A blob's content; `None` if there is none.
    pub async fn blob(&self, repository: &str, digest: &Digest) -> Result<Option<Vec<u8>>> {
        let url = format!("{}/v2/{repository}/blobs/{digest}", self.url());
        let answer = self.as_user(self.client.get(url)).send().await?;
        if answer.status() == 404 {
            return Ok(None);
        }
        Ok(Some(answer.error_for_status()?.bytes().await?.to_vec()))
    }

    /// Removes a blob of a repository, whatever refers to it.
    pub async fn delete_blob(&self, repository: &str, digest: &str) -> Result<()> {
        let url = format!("{}/v2/{repository}/blobs/{digest}", self.url());
        let answer = self.as_user(self.client.delete(url)).send().await?;
        ensure!(answer.status() == 202, "blob {digest} of {repository}: {}", answer.text().await?);
        Ok(())
    }

    fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    fn as_user(&self, request: reqwest::RequestBuilder) -> reqwest::RequestBuilder {
        if self.password { request.basic_auth(USERNAME, Some(PASSWORD)) } else { request }
    }
}

const DOCKER_TYPES: &str = "application/vnd.docker.distribution.manifest.v2+json, \
                            application/vnd.docker.distribution.manifest.list.v2+json";

impl Drop for DockerRegistry {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A client for plain HTTP on this host.
pub(crate) fn plain_client() -> Result<reqwest::Client> {
    Ok(client_builder().tls_certs_only([]).build()?)
}

fn client_builder() -> reqwest::ClientBuilder {
    // reqwest wants a provider even for plain HTTP; it fails only where a test has installed one already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().no_proxy()
}

/// Debian's name, or upstream's.
fn binary() -> Result<&'static str> {
    let runs = |name: &&str| {
        let version =
            Command::new(name).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        version.is_ok_and(|status| status.success())
    };
    let found = ["docker-registry", "registry"].into_iter().find(runs);
    found.context("neither docker-registry (Debian) nor registry (upstream) is installed")
}

/// Waits for the line with the address, which the registry writes once it listens.
async fn listening(child: &mut Child, log: &Path) -> Result<String> {
    loop {
        let text = std::fs::read_to_string(log)?;
        if let Some((_, rest)) = text.split_once("listening on ")
            && let Some((address, _)) = rest.split_once('"')
        {
            return Ok(address.trim_end_matches(", tls").to_owned());
        }
        if let Some(status) = child.try_wait()? {
            bail!("docker-registry ended ({status}): {text}");
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn split(name: &str) -> Result<(&str, &str)> {
    name.rsplit_once(':').with_context(|| format!("`{name}` is not repository:tag"))
}

/// An OCI descriptor of a content.
pub fn descriptor(media_type: &str, content: &[u8]) -> Value {
    json!({"mediaType": media_type, "digest": Digest::of(content), "size": content.len()})
}

fn parts(platform: &str) -> (Option<&str>, Option<&str>, Option<&str>) {
    let mut parts = platform.split('/');
    (parts.next(), parts.next(), parts.next())
}

/// A variant that isn't named is left out, not null.
fn remove_nulls(object: &mut Value) {
    if let Value::Object(fields) = object {
        fields.retain(|_, value| !value.is_null());
    }
}

/// An uncompressed tar archive (ustar) with the files, mode 0755, owner root, time zero.
pub fn tar(files: Files<'_>) -> Result<Vec<u8>> {
    let mut archive = Vec::new();
    for (path, content) in files {
        ensure!(path.len() < 100, "{path} is too long for a ustar name");
        let mut header = Vec::with_capacity(512);
        // name, mode, uid, gid, size, mtime, checksum (blank while it is computed), type, link name, magic.
        header.extend_from_slice(path.as_bytes());
        header.resize(100, 0);
        header.extend_from_slice(b"0000755\x000000000\x000000000\0");
        header.extend_from_slice(format!("{:011o}\0", content.len()).as_bytes());
        header.extend_from_slice(b"00000000000\0        0");
        header.resize(257, 0);
        header.extend_from_slice(b"ustar\x0000");
        header.resize(512, 0);
        let checksum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header.splice(148..156, format!("{checksum:06o}\0 ").into_bytes());
        archive.append(&mut header);
        archive.extend_from_slice(content);
        archive.resize(archive.len().next_multiple_of(512), 0);
    }
    archive.resize(archive.len() + 1024, 0);
    Ok(archive)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_is_read_by_the_real_tar() {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("a.tar");
        std::fs::write(&path, tar(&[("etc/a", b"hello"), ("b", &[7; 600])]).unwrap()).unwrap();
        let done = Command::new("tar").arg("-xf").arg(&path).arg("-C").arg(folder.path()).status().unwrap();
        assert!(done.success());
        assert_eq!(std::fs::read(folder.path().join("etc/a")).unwrap(), b"hello");
        assert_eq!(std::fs::read(folder.path().join("b")).unwrap(), [7; 600]);
    }

    #[tokio::test]
    async fn an_image_survives_a_restart_on_the_same_address() {
        let mut registry = DockerRegistry::start().await.unwrap();
        let digest = registry.push_image("a/b:1", "linux/amd64", &[("x", b"y")]).await.unwrap();
        let puts = registry.puts().unwrap();
        assert_eq!(puts.iter().map(|put| put.path.as_str()).collect::<Vec<_>>(), ["/v2/a/b/manifests/1"]);
        let address = registry.address().to_owned();
        registry.start_again().await.unwrap();
        assert_eq!(registry.address(), address);
        let (_, manifest) = registry.manifest("a/b", "1").await.unwrap().unwrap();
        assert_eq!(Digest::of(&manifest), digest);
    }
}
