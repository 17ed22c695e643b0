//! Releases that share a bus: what an older one wrote is read by this one, and what a newer one writes is carried on.
//!
//! `fixtures/` holds, for each release, every message of its streams as a server had them after [`story`]: a line of JSON for
//! each. `KILN_BLESS=1 cargo test -p kiln-bus --test it versions` records those of the present release anew; files of former
//! releases are never written again.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use async_nats::HeaderMap;
use async_nats::jetstream;
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::stream::LastRawMessageErrorKind;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures::StreamExt as _;
use kiln_bus::Bus;
use kiln_bus::journal::{AppendError, Entry, Journal};
use kiln_bus::logs::{Logs, Source as LogSource, Start, Until};
use kiln_bus::seal::OpenKey;
use kiln_bus::secrets::{self, SecretsBucket};
use kiln_bus::view::View;
use kiln_contract::secrets::{RegistryAuth, Secrets};
use kiln_contract::{bucket, subject};
use kiln_domain::engine::{Cursor, Handle};
use kiln_domain::failure::{Failure, FailureReason};
use kiln_domain::id::{BuildId, ImageKey};
use kiln_domain::record::{Record, State};
use kiln_domain::reference::Digest;
use kiln_domain::run::{Base, Findings};
use kiln_domain::source::{DockerfileSource, Source};
use kiln_domain::step::Step;
use kiln_domain::transition::{Change, EVENTS, Illegal};
use kiln_testkit::nats::{self, NatsServer};
use kiln_testkit::records;
use secrecy::ExposeSecret as _;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::parts::{instance, provisioned};

const SOON: Duration = Duration::from_secs(20);

/// One message of a stream.
#[derive(Debug, Serialize, Deserialize)]
struct Recorded {
    stream: String,
    subject: String,
    headers: BTreeMap<String, String>,
    /// Base64 where it is no text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    text: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    base64: Option<String>,
}

/// A file: what opens the secrets in it, and its messages.
#[derive(Debug, Serialize, Deserialize)]
struct Head {
    /// Of a key that was made for the recording and opens nothing else.
    seed: String,
}

struct Fixture {
    head: Head,
    messages: Vec<Recorded>,
}

impl Recorded {
    fn payload(&self) -> Result<Bytes> {
        match (&self.text, &self.base64) {
            (Some(text), _) => Ok(text.clone().into()),
            (None, Some(base64)) => Ok(STANDARD.decode(base64)?.into()),
            (None, None) => Ok(Bytes::new()),
        }
    }
}

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

impl Fixture {
    fn read(path: &PathBuf) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        let mut lines = text.lines();
        let head = serde_json::from_str(lines.next().context("it is empty")?)?;
        Ok(Self { head, messages: lines.map(serde_json::from_str).collect::<Result<_, _>>()? })
    }

    fn write(&self, path: &PathBuf) -> Result<()> {
        let mut text = serde_json::to_string(&self.head)? + "\n";
        for message in &self.messages {
            text += &(serde_json::to_string(message)? + "\n");
        }
        Ok(std::fs::write(path, text)?)
    }

    /// Sends everything as it was sent then, in a bus that is empty.
    async fn replay(&self, js: &jetstream::Context) -> Result<()> {
        for message in &self.messages {
            let mut headers = HeaderMap::new();
            for (name, value) in &message.headers {
                headers.insert(name.as_str(), value.as_str());
            }
            let publish = PublishMessage::build().headers(headers).payload(message.payload()?);
            let sent = js.send_publish(message.subject.clone(), publish).await?.await;
            sent.with_context(|| format!("replay {}", message.subject))?;
        }
        Ok(())
    }

    fn of<'a>(&'a self, stream: &'a str) -> impl Iterator<Item = &'a Recorded> {
        self.messages.iter().filter(move |message| message.stream == stream)
    }

    /// The last event of each build, as its JSON.
    fn builds(&self) -> Result<BTreeMap<BuildId, serde_json::Value>> {
        let mut builds = BTreeMap::new();
        for event in self.of(subject::JOURNAL_STREAM) {
            let (id, _) = subject::parse_event(&event.subject)?;
            builds.insert(id, serde_json::from_slice(&event.payload()?)?);
        }
        Ok(builds)
    }
}

/// Everything that a release writes: every event, a log with a take-over, and sealed secrets.
async fn story(bus: &Bus, key: &OpenKey) -> Result<()> {
    let journal = Journal::open(bus).await?;
    let (by, other) = (instance(1)?, instance(2)?);
    let findings = Findings {
        steps: vec![Step {
            number: 1,
            of: 2,
            name: "FROM registry.test/source:1".into(),
            started_at: "2026-01-02T03:04:05Z".parse()?,
            duration_ms: Some(1_234),
            cached: true,
        }],
        bases: vec![Base { reference: "registry.test/source:1".into(), digest: Some(Digest::of(b"base")) }],
        images: Vec::new(),
        build_tool: "buildah 1.28".into(),
    };
    let claim = |by: &_| Change::Claimed { by: Clone::clone(by) };
    let start = || Change::Started {
        by: by.clone(),
        handle: Handle::new("run 1"),
        engine: "local".into(),
        build_tool: String::new(),
    };
    let cancel = || Change::CancelRequested { reason: "enough".into() };
    let join = || Change::Joined { owner: "bob".into(), request: "r2".into() };
    let lost = || Change::Retrying { by: by.clone(), why: "the builder was lost".into() };
    let failure = Failure::new(FailureReason::Dockerfile, "step 2/2 failed with exit code 1");
    let succeed =
        Change::Succeeded { by: by.clone(), digest: Digest::of(b"image"), findings: findings.clone() };
    let fail = Change::Failed { by: Some(by.clone()), failure, findings };
    let cancelled = Change::Cancelled { by: None, findings: Findings::default() };
    let builds = [
        vec![join(), claim(&by), start(), succeed],
        vec![claim(&by), start(), lost(), start(), fail],
        vec![cancelled],
        vec![claim(&by), Change::Released { by: by.clone(), why: None }],
        vec![claim(&by), claim(&other), cancel()],
    ];
    for (n, changes) in (0u8..).zip(builds) {
        let mut record = records::queued(&format!("i{n}"), [n; 10])?;
        record.requests = vec!["r1".into()];
        record.labels = [("team".to_owned(), "blue".to_owned())].into();
        record.traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into();
        if n == 1 {
            record.base_exists = false;
            record.commit = Some("c".repeat(40));
            record.source = Source::Dockerfile(dockerfile()?);
        }
        let mut tail = journal.append(None, &Change::Queued(Box::new(record)), &by).await?;
        for change in changes {
            tail = journal.append(Some(&tail), &change, &by).await?;
        }
    }

    let (logs, id) = (Logs::new(bus), build(0)?);
    let source = |at: &str| LogSource { attempt: 1, cursor: Cursor::new(at) };
    let mut writer = logs.claim(&id, &by, None).await?;
    writer.append("STEP 1/2: FROM scratch\n".into(), source("23"), false).await?;
    let mut writer = logs.claim(&id, &other, logs.tail(&id).await?.as_ref()).await?;
    writer.append(Bytes::from_static(b"\xff not text\n"), source("34"), false).await?;
    writer.append(Bytes::new(), source("34"), true).await?;

    let mounts = [("npmrc".to_owned(), STANDARD.encode("token"))].into();
    let credentials = [("registry.test".to_owned(), "ann:pass".to_owned())].into();
    let registry = RegistryAuth { credentials, ..RegistryAuth::default() };
    let all = Secrets {
        git_username: "ann".into(),
        git_password: "pass".into(),
        git_one_time_url: String::new(),
        registry,
        mounts,
        workspace: None,
    };
    let sealed = secrets::seal(&key.seal_key(), &all)?;
    SecretsBucket::open(bus).await?.put(&build(3)?, sealed).await?;
    Ok(())
}

fn dockerfile() -> Result<DockerfileSource> {
    Ok(DockerfileSource {
        remote_uri: "https://git.test/x.git".into(),
        revision: "main".into(),
        path: "docker/Dockerfile".into(),
        context_path: "docker".into(),
        version: "v1".into(),
        build_args: [("A".to_owned(), "1".to_owned())].into(),
        target: "final".into(),
        platform: Some("linux/amd64".parse()?),
        platforms: Vec::new(),
        provenance: false,
        reproducible: false,
        unknown: BTreeMap::new(),
        checkout_location: None,
    })
}

fn build(n: u8) -> Result<BuildId> {
    Ok(records::queued(&format!("i{n}"), [n; 10])?.id)
}

/// Everything that lies in a stream.
async fn record(js: &jetstream::Context, stream: &str) -> Result<Vec<Recorded>> {
    let held = js.get_stream(stream).await?;
    let last = held.cached_info().state.last_sequence;
    let mut recorded = Vec::new();
    for sequence in 1..=last {
        let message = match held.get_raw_message(sequence).await {
            Ok(message) => message,
            Err(error) if error.kind() == LastRawMessageErrorKind::NoMessageFound => continue,
            Err(error) => return Err(error.into()),
        };
        let headers = message.headers.iter().filter_map(|(name, values)| {
            values.first().map(|value| (name.to_string(), value.as_str().to_owned()))
        });
        let (text, base64) = match String::from_utf8(message.payload.to_vec()) {
            Ok(text) => (Some(text), None),
            Err(_) => (None, Some(STANDARD.encode(&message.payload))),
        };
        recorded.push(Recorded {
            stream: stream.into(),
            subject: message.subject.to_string(),
            headers: headers.collect(),
            text,
            base64,
        });
    }
    Ok(recorded)
}

async fn by_hand(server: &NatsServer) -> Result<jetstream::Context> {
    Ok(jetstream::new(async_nats::connect(server.url()).await?))
}

/// Records the present release's file if that is asked for.
async fn bless() -> Result<()> {
    #[expect(clippy::disallowed_methods, reason = "how a person asks the test to write the file")]
    if std::env::var_os("KILN_BLESS").is_none() {
        return Ok(());
    }
    let server = nats::run_server().await?;
    let bus = provisioned(&server.url(), 1).await?;
    let seed = OpenKey::new_seed()?;
    story(&bus, &OpenKey::from_seed(seed.clone())?).await?;
    let js = by_hand(&server).await?;
    let mut messages = Vec::new();
    for stream in [subject::JOURNAL_STREAM, subject::LOGS_STREAM, &format!("KV_{}", bucket::SECRETS)] {
        messages.extend(record(&js, stream).await?);
    }
    let fixture = Fixture { head: Head { seed: seed.expose_secret().to_owned() }, messages };
    std::fs::create_dir_all(folder())?;
    fixture.write(&folder().join(concat!("release-", env!("CARGO_PKG_VERSION"), ".jsonl")))
}

async fn view(bus: &Bus) -> Result<View> {
    let view = View::start(bus, 100, &TaskTracker::new(), &CancellationToken::new());
    tokio::time::timeout(SOON, view.caught_up()).await?;
    Ok(view)
}

#[tokio::test]
async fn what_every_release_wrote_is_read_by_this_one() -> Result<()> {
    bless().await?;
    let mut files: Vec<_> =
        std::fs::read_dir(folder())?.map(|file| file.map(|file| file.path())).collect::<Result<_, _>>()?;
    files.sort();
    let present = concat!("release-", env!("CARGO_PKG_VERSION"), ".jsonl");
    ensure!(files.iter().any(|file| file.ends_with(present)), "{present} is missing: record it");
    for file in files {
        is_read(&Fixture::read(&file)?).await.with_context(|| file.display().to_string())?;
    }
    Ok(())
}

async fn is_read(fixture: &Fixture) -> Result<()> {
    let server = nats::run_server().await?;
    let bus = provisioned(&server.url(), 1).await?;
    fixture.replay(&by_hand(&server).await?).await?;
    let (view, journal) = (view(&bus).await?, Journal::open(&bus).await?);

    let builds = fixture.builds()?;
    let events: BTreeSet<_> =
        fixture.of(subject::JOURNAL_STREAM).filter_map(|event| event.subject.rsplit('.').next()).collect();
    ensure!(EVENTS.iter().all(|event| events.contains(event)), "not every event is recorded: {events:?}");
    for (id, recorded) in &builds {
        let seen = view.get(id).with_context(|| format!("{id} is not seen"))?;
        ensure!(journal.last_of_build(id).await?.as_ref() == Some(&*seen));
        // Nothing of it was left out, and what is new has a default.
        let read = serde_json::to_value(&seen.record)?;
        for (field, value) in recorded.as_object().context("a record")? {
            let times =
                matches!(field.as_str(), "queued_at" | "started_at" | "attempt_started_at" | "finished_at");
            ensure!(
                times || read.get(field) == Some(value),
                "{id}: {field} is {:?}, not {value}",
                read.get(field)
            );
        }
        ensure!(seen.record.unknown.is_empty(), "{id}: {:?}", seen.record.unknown);
        ensure!(seen.record.state != State::Unknown && seen.record.source.is_known());
        // It can be gone on with.
        if !seen.record.state.is_terminal() && seen.record.cancel.is_none() {
            let by = instance(9)?;
            journal.append(Some(&seen), &Change::Claimed { by: by.clone() }, &by).await?;
        }
    }

    let mut logs: BTreeMap<BuildId, Vec<u8>> = BTreeMap::new();
    for chunk in fixture.of(subject::LOGS_STREAM) {
        let log = logs.entry(subject::parse_build_suffix(&chunk.subject)?).or_default();
        log.extend_from_slice(&chunk.payload()?);
    }
    ensure!(!logs.is_empty());
    for (id, expected) in logs {
        let until = Until::Complete { over: CancellationToken::new() };
        let chunks = Logs::new(&bus).read(&id, Start::Beginning, until).collect::<Vec<_>>();
        let chunks = tokio::time::timeout(SOON, chunks).await.context("the log does not end")?;
        let chunks = chunks.into_iter().collect::<Result<Vec<_>, _>>()?;
        let log: Vec<u8> = chunks.iter().flat_map(|chunk| chunk.bytes.clone()).collect();
        ensure!(log == expected && chunks.last().is_some_and(|chunk| chunk.complete));
    }

    let bucket = SecretsBucket::open(&bus).await?;
    let ids = bucket.builds().await?;
    ensure!(!ids.is_empty());
    for id in ids {
        let sealed = bucket.get(&id).await?.context("an entry")?;
        let opened = secrets::open(&OpenKey::from_seed(fixture.head.seed.clone().into())?, &sealed)?;
        ensure!(opened.git_password == "pass" && opened.mounts.contains_key("npmrc"));
    }
    Ok(())
}

/// Appends what this release would not: a record as JSON, under any event's name.
async fn append_newer(
    js: &jetstream::Context,
    id: &BuildId,
    event: &str,
    record: &serde_json::Value,
) -> Result<u64> {
    let mut headers = HeaderMap::new();
    headers.insert("ce-id", format!("{id}-{event}").as_str());
    headers.insert("ce-priority", "of a newer release");
    let publish = PublishMessage::build().headers(headers).payload(serde_json::to_vec(record)?.into());
    Ok(js.send_publish(subject::event(id, event), publish).await?.await?.sequence)
}

#[tokio::test]
async fn what_a_newer_release_writes_is_carried_on() -> Result<()> {
    let server = nats::run_server().await?;
    let bus = provisioned(&server.url(), 1).await?;
    let js = by_hand(&server).await?;
    let journal = Journal::open(&bus).await?;
    let by = instance(1)?;
    let newer = |n: u8, change: fn(&mut serde_json::Value)| {
        let mut record: Record = records::queued(&format!("n{n}"), [n; 10])?;
        record.source = Source::Dockerfile(dockerfile()?);
        let mut json = serde_json::to_value(&record)?;
        change(&mut json);
        anyhow::Ok((record.id, json))
    };

    // An event of an unknown name, in a known state, with fields that are unknown, also deep inside.
    let (paused, json) = newer(1, |record| {
        record["priority"] = 7.into();
        record["source"]["dockerfile"]["frontend"] = serde_json::json!({"image": "x", "options": [1, 2]});
    })?;
    let at = append_newer(&js, &paused, "reprioritized", &json).await?;
    // A state, a reason and a kind of source that are unknown.
    let (held, json) = newer(2, |record| record["state"] = "ON_HOLD".into())?;
    append_newer(&js, &held, "held", &json).await?;
    let (failed, json) = newer(3, |record| {
        record["state"] = "FAILED".into();
        record["reason"] = "SOLAR_FLARE".into();
    })?;
    append_newer(&js, &failed, "failed", &json).await?;
    let (archive, json) = newer(4, |record| {
        record["source"] = serde_json::json!({"oci_archive": {"uri": "https://a.test/b"}})
    })?;
    append_newer(&js, &archive, "queued", &json).await?;
    // What no release can read must not hide what follows it.
    let (broken, _) = newer(5, |_| {})?;
    append_newer(&js, &broken, "queued", &"no record".into()).await?;
    let (last, json) = newer(6, |_| {})?;
    let end = append_newer(&js, &last, "queued", &json).await?;

    let view = view(&bus).await?;
    ensure!(view.reached(end, SOON).await);
    let seen = |id: &BuildId| view.get(id).with_context(|| format!("{id} is not seen"));
    ensure!(seen(&paused)?.event == "reprioritized" && seen(&paused)?.sequence == at);
    ensure!(seen(&held)?.record.state == State::Unknown && !State::Unknown.is_terminal());
    ensure!(seen(&failed)?.record.reason == Some(FailureReason::Unknown));
    ensure!(!seen(&archive)?.record.source.is_known() && !seen(&paused)?.record.source.is_known());
    ensure!(view.get(&broken).is_none() && view.get(&last).is_some());

    // A later append of this release keeps all of it, byte for byte in meaning.
    for (id, fields) in [(&paused, ["priority", "source"]), (&archive, ["source", "labels"])] {
        let before = seen(id)?;
        let after = journal.append(Some(&before), &Change::Claimed { by: by.clone() }, &by).await?;
        let (before, after) = (raw(&js, &before).await?, raw(&js, &after).await?);
        for field in fields {
            ensure!(before.get(field) == after.get(field), "{field}: {before} became {after}");
        }
    }
    // A build in a state whose rules it doesn't know is not its to change, nor is its image to be built again.
    let held = seen(&held)?;
    let claim = journal.append(Some(&held), &Change::Claimed { by: by.clone() }, &by).await;
    ensure!(matches!(claim, Err(AppendError::Illegal(Illegal::NewerState { .. }))), "{claim:?}");
    let id = BuildId::new(&ImageKey::of("registry.test/workspace:n2"), [9; 10]);
    let again = Record { id, ..records::queued("n2", [9; 10])? };
    let again = journal.append(Some(&held), &Change::Queued(Box::new(again)), &by).await;
    ensure!(matches!(again, Err(AppendError::Illegal(Illegal::NewerState { .. }))), "{again:?}");
    Ok(())
}

/// An event as it lies in the stream.
async fn raw(js: &jetstream::Context, entry: &Entry) -> Result<serde_json::Value> {
    let message = js.get_stream(subject::JOURNAL_STREAM).await?.get_raw_message(entry.sequence).await?;
    Ok(serde_json::from_slice(&message.payload)?)
}

#[tokio::test]
async fn a_chunk_and_secrets_with_more_in_them_are_read() -> Result<()> {
    let server = nats::run_server().await?;
    let bus = provisioned(&server.url(), 1).await?;
    let js = by_hand(&server).await?;
    let id = build(1)?;
    let mut headers = HeaderMap::new();
    for (name, value) in [
        (kiln_contract::header::LOG_WRITER, "log-relay-0000000000000007"),
        (kiln_contract::header::LOG_OFFSET, "0"),
        (kiln_contract::header::LOG_SOURCE_CURSOR, "1 6"),
        (kiln_contract::header::LOG_COMPLETE, "true"),
        ("Kiln-Stream", "stderr"),
    ] {
        headers.insert(name, value);
    }
    js.publish_with_headers(subject::log(&id), headers, "a line".into()).await?.await?;
    let chunks: Vec<_> = Logs::new(&bus).read(&id, Start::Beginning, Until::Now).collect().await;
    let chunks = chunks.into_iter().collect::<Result<Vec<_>, _>>()?;
    ensure!(chunks.iter().map(|chunk| &chunk.bytes[..]).eq([b"a line"]), "{chunks:?}");

    let key = OpenKey::from_seed(OpenKey::new_seed()?)?;
    let json = serde_json::json!({"git_password": "pass", "ssh_key": "new", "registry": {"realm": "new"}});
    let sealed = key.seal_key().seal(&serde_json::to_vec(&json)?)?;
    ensure!(secrets::open(&key, &sealed)?.git_password == "pass");
    Ok(())
}
