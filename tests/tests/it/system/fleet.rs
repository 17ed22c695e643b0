//! The roles as processes of their own, two of each that holds something.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use futures::StreamExt as _;
use kiln_bus::Connect;
use kiln_bus::journal::Journal;
use kiln_bus::seal::OpenKey;
use kiln_proto::kiln_v1 as api;
use kiln_proto::kiln_v1::builds_client::BuildsClient;
use kiln_testkit::fleet::Fleet;
use kiln_testkit::installation::program;
use kiln_testkit::workshop::Workshop;
use secrecy::ExposeSecret as _;
use tonic::transport::Channel;

use super::{DOCKERFILE, begun, dockerfile, is_over};

const SOON: Duration = Duration::from_secs(60);

const ROLES: [&str; 8] = [
    "gateway",
    "gateway",
    "resolver",
    "orchestrator",
    "orchestrator",
    "log-relay",
    "log-relay",
    "cache-warmer",
];

#[tokio::test(flavor = "multi_thread")]
async fn ten_calls_at_two_gateways_and_two_orchestrators_are_one_build() -> Result<()> {
    let workshop = Workshop::new().await?;
    let seed = OpenKey::new_seed()?;
    let fleet = Fleet::start(&program()?, &workshop.registry, seed.expose_secret(), &ROLES).await?;
    let repository = workshop.repository(&[("Dockerfile", DOCKERFILE)], &["."])?;
    let clients = fleet.clients().await?;
    let asked = (0..10).map(|n| {
        let mut client = clients[n % 2].clone();
        let request =
            api::BuildImageRequest { owner: format!("owner-{n}"), ..dockerfile(&repository.uri, |_| {}) };
        async move { client.build_image(request).await }
    });
    let answers = futures::future::try_join_all(asked).await.with_context(|| fleet.log())?;
    let answers: Vec<_> = answers.into_iter().map(tonic::Response::into_inner).collect();
    ensure!(answers.iter().filter(|answer| !answer.joined).count() == 1, "{answers:?}");
    let ids: Vec<_> = answers.into_iter().map(|answer| Ok(begun(answer)?.id)).collect::<Result<_>>()?;
    ensure!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
    let logs = (0..10).map(|n| whole_log(clients[n % 2].clone(), &ids[0]));
    let logs = futures::future::try_join_all(logs).await.with_context(|| fleet.log())?;
    ensure!(logs.iter().all(|log| *log == logs[0] && !log.is_empty()), "ten followers, one log");
    let over = end(clients[1].clone(), &ids[0]).await?;
    ensure!(over.state() == api::BuildState::Succeeded && over.attempt == 1, "{over:?}\n{}", fleet.log());
    // One terminal event, and it is the last.
    let bus =
        Connect { url: fleet.nats.url(), user: None, password: None, name: "test".into() }.connect().await?;
    let last = Journal::open(&bus).await?.last_of_build(&ids[0].parse()?).await?.context("a record")?;
    ensure!(last.event == "succeeded" && last.record.owners().count() == 10, "{last:?}");
    let mut events = std::pin::pin!(
        kiln_bus::events::subscribe(&fleet.nats.url(), kiln_bus::events::From::Beginning).await?
    );
    let mut ends = 0;
    while let Some(event) = events.next().await {
        let event = event?;
        ends += usize::from(event.data["state"] != "QUEUED" && event.data["state"] != "RUNNING");
        if event.sequence >= last.sequence {
            break;
        }
    }
    ensure!(ends == 1, "{ends} terminal events");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_outlives_the_orchestrator_and_the_relay_that_had_it() -> Result<()> {
    let workshop = Workshop::new().await?;
    let seed = OpenKey::new_seed()?;
    let roles = ["gateway", "resolver", "orchestrator", "log-relay"];
    let mut fleet = Fleet::start(&program()?, &workshop.registry, seed.expose_secret(), &roles).await?;
    let step = "RUN [\"/bin/busybox\", \"sh\", \"-c\", \"echo before; /bin/busybox sleep 5; echo after\"]\n";
    let repository = workshop.repository(&[("Dockerfile", &format!("{DOCKERFILE}{step}"))], &["."])?;
    let client = fleet.clients().await?.into_iter().next().context("a gateway")?;
    let build = begun(client.clone().build_image(dockerfile(&repository.uri, |_| {})).await?.into_inner())?;
    let request = api::BuildLogsRequest { id: build.id.clone(), follow: true, start: None };
    let mut chunks = client.clone().build_logs(request).await?.into_inner();
    let mut log = Vec::new();
    while !String::from_utf8_lossy(&log).contains("before") {
        log.extend(chunks.message().await?.context("the log ended")?.content);
    }
    // Whoever has it is killed, others come.
    for role in ["orchestrator", "log-relay"] {
        fleet.add(role).await?;
        fleet.kill(role).await?;
    }
    let whole = whole_log(client.clone(), &build.id).await.with_context(|| fleet.log())?;
    let over = end(client, &build.id).await?;
    let text = String::from_utf8_lossy(&whole);
    ensure!(over.state() == api::BuildState::Succeeded && over.attempt == 1, "{over:?}\n{}", fleet.log());
    ensure!(whole.starts_with(&log), "what was read stands");
    for line in ["before", "after"] {
        ensure!(text.lines().filter(|l| *l == line).count() == 1, "`{line}`:\n{text}");
    }
    Ok(())
}

/// From one orchestrator that sleeps past its lease to a second, and on SIGTERM of that one back to the first, which has woken:
/// all the while one builder, and nobody acts for whom it is no longer.
#[tokio::test(flavor = "multi_thread")]
async fn a_build_outlives_the_sleep_of_one_holder_and_the_end_of_the_next() -> Result<()> {
    let workshop = Workshop::new().await?;
    let seed = OpenKey::new_seed()?;
    let roles = ["gateway", "resolver", "orchestrator", "log-relay"];
    let mut fleet = Fleet::start(&program()?, &workshop.registry, seed.expose_secret(), &roles).await?;
    // A step that takes until its connection is closed.
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await?;
    let wait = format!("/bin/busybox nc 127.0.0.1 {} </dev/null; echo after", listener.local_addr()?.port());
    let step = format!("RUN [\"/bin/busybox\", \"sh\", \"-c\", \"{wait}\"]\n");
    let repository = workshop.repository(&[("Dockerfile", &format!("{DOCKERFILE}{step}"))], &["."])?;
    let client = fleet.clients().await?.into_iter().next().context("a gateway")?;
    let build = begun(client.clone().build_image(dockerfile(&repository.uri, |_| {})).await?.into_inner())?;
    let (step, _) = tokio::time::timeout(SOON, listener.accept()).await.with_context(|| fleet.log())??;
    fleet.add("orchestrator").await?;
    fleet.process("orchestrator", 0)?.pause()?;
    fleet.said("taking build").await?;
    fleet.process("orchestrator", 0)?.resume()?;
    fleet.said("is no longer ours").await?;
    fleet.said("going on as orchestrator-").await?;
    fleet.process("orchestrator", 1)?.ask_to_end()?;
    until_claimed(&fleet, &build.id, 3).await?;
    drop(step);
    let over = end(client.clone(), &build.id).await?;
    let log = whole_log(client, &build.id).await?;
    ensure!(over.state() == api::BuildState::Succeeded && over.attempt == 1, "{over:?}\n{}", fleet.log());
    let text = String::from_utf8_lossy(&log);
    ensure!(text.lines().filter(|line| *line == "after").count() == 1, "{text}");
    let events = events(&fleet, &build.id).await?;
    let expected = ["queued", "claimed", "started", "claimed", "released", "claimed", "succeeded"];
    ensure!(events == expected, "{events:?}\n{}", fleet.log());
    Ok(())
}

/// Waits until a build was claimed so often.
async fn until_claimed(fleet: &Fleet, id: &str, claims: u32) -> Result<()> {
    let bus =
        Connect { url: fleet.nats.url(), user: None, password: None, name: "test".into() }.connect().await?;
    let (journal, id) = (Journal::open(&bus).await?, id.parse()?);
    let claimed = async {
        while journal.last_of_build(&id).await?.is_none_or(|last| last.record.claims < claims) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    };
    tokio::time::timeout(SOON, claimed).await.with_context(|| fleet.log())?
}

/// The names of a finished build's events.
async fn events(fleet: &Fleet, id: &str) -> Result<Vec<String>> {
    let events = kiln_bus::events::subscribe(&fleet.nats.url(), kiln_bus::events::From::Beginning).await?;
    let mut events = std::pin::pin!(events);
    let mut names = Vec::new();
    while let Some(event) = events.next().await.transpose()? {
        if event.build == id {
            names.push(event.kind.rsplit('.').nth(1).context("a name")?.to_owned());
        }
        if names.last().is_some_and(|name| ["succeeded", "failed", "cancelled"].contains(&name.as_str())) {
            break;
        }
    }
    Ok(names)
}

async fn whole_log(mut client: BuildsClient<Channel>, id: &str) -> Result<Vec<u8>> {
    let request = api::BuildLogsRequest { id: id.to_owned(), follow: true, start: None };
    let mut chunks = client.build_logs(request).await?.into_inner();
    let mut log = Vec::new();
    while let Some(chunk) = chunks.message().await? {
        log.extend(chunk.content);
    }
    Ok(log)
}

async fn end(mut client: BuildsClient<Channel>, id: &str) -> Result<api::Build> {
    let mut builds = client.watch_build(api::WatchBuildRequest { id: id.to_owned() }).await?.into_inner();
    while let Some(build) = builds.message().await? {
        if is_over(&build) {
            return Ok(build);
        }
    }
    anyhow::bail!("the watch ended before the build")
}
