//! Leases: seen by others, ended at once on release, and lapsed for who was paused.

use std::time::Duration;

use anyhow::{Result, ensure};
use kiln_bus::holders::{Holders, Member};
use kiln_bus::seal::OpenKey;
use kiln_bus::{BusError, Lease};
use kiln_domain::id::InstanceId;
use kiln_testkit::nats;
use kiln_testkit::wire::Wire;
use tokio_util::task::TaskTracker;

use crate::parts::{connect, provisioned};

async fn seen(holders: &Holders, wanted: impl Fn(&[InstanceId]) -> bool) -> Result<()> {
    let mut changes = holders.changes();
    let wait = async {
        while !wanted(&holders.live()) {
            changes.changed().await?;
        }
        Ok::<_, anyhow::Error>(())
    };
    tokio::time::timeout(Duration::from_secs(20), wait).await?
}

const ORCHESTRATOR: Member<'_> = Member { role: "orchestrator", life: "", host: None, seal_key: None };
const RELAY: Member<'_> = Member { role: "log-relay", ..ORCHESTRATOR };

#[tokio::test]
async fn holders_see_each_other_and_a_release_at_once() -> Result<()> {
    let server = nats::run_server().await?;
    let bus = provisioned(&server.url(), 1).await?;
    let tasks = TaskTracker::new();
    let first = Holders::start(&bus, ORCHESTRATOR, Lease::default(), &tasks).await?;
    let second =
        Holders::start(&connect(&server.url()).await?, ORCHESTRATOR, Lease::default(), &tasks).await?;
    let relay = Holders::start(&connect(&server.url()).await?, RELAY, Lease::default(), &tasks).await?;
    let (me, other) = (first.me().unwrap(), second.me().unwrap());
    seen(&first, |live| live.len() == 2).await?;
    ensure!(first.live().contains(&other) && second.live().contains(&other));
    ensure!(!first.live().contains(&relay.me().unwrap()), "another role is not counted");
    ensure!(!first.confirm_dead(&other).await?, "a live one is not dead");
    second.release().await;
    seen(&first, |live| live == [me.clone()]).await?;
    ensure!(first.confirm_dead(&other).await?);
    ensure!(!first.confirm_dead(&me).await?, "nobody takes over from himself");
    ensure!(first.confirm_dead(&InstanceId::new("orchestrator", 1)?).await?, "who never was is dead");
    Ok(())
}

#[tokio::test]
async fn an_instance_id_is_never_used_twice() -> Result<()> {
    let server = nats::run_server().await?;
    let bus = provisioned(&server.url(), 1).await?;
    let tasks = TaskTracker::new();
    let first = Holders::start(&bus, ORCHESTRATOR, Lease::default(), &tasks).await?;
    let before = first.me();
    first.release().await;
    let second = Holders::start(&bus, ORCHESTRATOR, Lease::default(), &tasks).await?;
    ensure!(before != second.me());
    Ok(())
}

#[tokio::test]
async fn a_former_lifes_leases_end_at_once() -> Result<()> {
    let server = nats::run_server().await?;
    let bus = provisioned(&server.url(), 1).await?;
    let tasks = TaskTracker::new();
    let former = Holders::start(&bus, Member { life: "first", ..ORCHESTRATOR }, Lease::default(), &tasks)
        .await?
        .me()
        .unwrap();
    let other =
        Holders::start(&bus, Member { life: "other", ..ORCHESTRATOR }, Lease::default(), &tasks).await?;
    ensure!(!other.confirm_dead(&former).await?);
    bus.end_leases("first").await?;
    ensure!(other.confirm_dead(&former).await?);
    let third =
        Holders::start(&bus, Member { life: "second", ..ORCHESTRATOR }, Lease::default(), &tasks).await?;
    ensure!(!third.confirm_dead(&other.me().unwrap()).await?, "another's stands");
    Ok(())
}

#[tokio::test]
async fn a_second_host_is_refused_where_builders_are_bound_to_one() -> Result<()> {
    let server = nats::run_server().await?;
    let bus = provisioned(&server.url(), 1).await?;
    let tasks = TaskTracker::new();
    let here =
        Holders::start(&bus, Member { host: Some("here"), ..ORCHESTRATOR }, Lease::default(), &tasks).await?;
    Holders::start(&bus, RELAY, Lease::default(), &tasks).await?;
    Holders::start(&bus, Member { host: Some("here"), ..RELAY }, Lease::default(), &tasks).await?;
    let refused =
        Holders::start(&bus, Member { host: Some("there"), ..RELAY }, Lease::default(), &tasks).await.err();
    ensure!(refused.is_some_and(|error| error.to_string().contains("bound to another")), "it was let in");
    ensure!(here.me().is_some());
    Ok(())
}

#[tokio::test]
async fn a_release_may_be_mixed_with_the_one_that_named_the_boot_alone() -> Result<()> {
    let server = nats::run_server().await?;
    let bus = provisioned(&server.url(), 1).await?;
    let tasks = TaskTracker::new();
    let old =
        Holders::start(&bus, Member { host: Some("boot"), ..ORCHESTRATOR }, Lease::default(), &tasks).await?;
    let new = Holders::start(&bus, Member { host: Some("boot/folder"), ..RELAY }, Lease::default(), &tasks);
    ensure!(new.await.is_ok(), "a release is mixed with the one before it");
    let elsewhere =
        Holders::start(&bus, Member { host: Some("other/folder"), ..RELAY }, Lease::default(), &tasks);
    ensure!(elsewhere.await.is_err());
    ensure!(old.me().is_some());
    Ok(())
}

#[tokio::test]
async fn who_would_seal_or_open_with_another_key_is_refused_while_one_lives() -> Result<()> {
    let server = nats::run_server().await?;
    let bus = provisioned(&server.url(), 1).await?;
    let tasks = TaskTracker::new();
    let key = || anyhow::Ok(OpenKey::from_seed(OpenKey::new_seed()?)?.seal_key());
    let (one, another) = (key()?, key()?);
    bus.check_seal_key(&another).await?;
    let orchestrator = Member { seal_key: Some(&one), ..ORCHESTRATOR };
    let orchestrator = Holders::start(&bus, orchestrator, Lease::default(), &tasks).await?;
    Holders::start(&bus, Member { seal_key: Some(&one), ..RELAY }, Lease::default(), &tasks)
        .await?
        .release()
        .await;
    bus.check_seal_key(&one).await?;
    let stranger = Member { seal_key: Some(&another), ..RELAY };
    let refused = Holders::start(&bus, stranger, Lease::default(), &tasks).await.err();
    for refused in [refused, bus.check_seal_key(&another).await.err()] {
        ensure!(
            matches!(&refused, Some(BusError::Refused { detail, .. }) if detail.contains("another key")),
            "{refused:?}"
        );
    }
    // When nobody lives, the key may be another.
    orchestrator.release().await;
    bus.check_seal_key(&another).await?;
    Holders::start(&bus, stranger, Lease::default(), &tasks).await?;
    Ok(())
}

#[tokio::test]
async fn who_is_cut_off_stops_acting_before_others_may_take_over_and_comes_back_as_another() -> Result<()> {
    let server = nats::run_server().await?;
    let bus = provisioned(&server.url(), 1).await?;
    let wire = Wire::to(&server.address()).await?;
    let (tasks, lease) = (TaskTracker::new(), Lease::of_seconds(3));
    let cut_off = connect(&format!("nats://{}", wire.address())).await?;
    let cut_off = Holders::start(&cut_off, ORCHESTRATOR, lease, &tasks).await?;
    let other = Holders::start(&bus, ORCHESTRATOR, lease, &tasks).await?;
    let before = cut_off.me().unwrap();
    seen(&other, |live| live.contains(&before)).await?;
    wire.freeze();
    seen(&other, |live| !live.contains(&before)).await?;
    ensure!(other.confirm_dead(&before).await?);
    ensure!(cut_off.me().as_ref() != Some(&before), "it would still act");
    wire.restore();
    seen(&other, |live| live.len() == 2).await?;
    // Its own answer may come a moment after the others' news.
    let after = loop {
        match cut_off.me() {
            Some(after) => break after,
            None => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    };
    ensure!(after != before);
    Ok(())
}
