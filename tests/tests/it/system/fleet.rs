//! The roles as processes of their own, two of each that holds something.

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
