//! The running step, which is no part of a build's record.

use std::time::Duration;

use anyhow::{Context as _, Result};
use kiln_proto::kiln_v1::{ListBuildsRequest, WatchBuildRequest};
use tokio::time::timeout;

use crate::bed::{Bed, LONG};

#[tokio::test]
async fn the_running_step_is_watched_and_listed() -> Result<()> {
    let bed = Bed::new().await?;
    let mut client = bed.client().await?;
    let mut play = bed.build(1).await?;
    let _waits = bed.build(2).await?;
    play.start().await?;
    let request = WatchBuildRequest { id: play.id.to_string() };
    let mut builds = client.watch_build(request).await?.into_inner();
    builds.message().await?.context("no record")?;
    for number in [1, 2] {
        play.step(number, 3).await?;
        let watching = async {
            loop {
                let build = builds.message().await?.context("the watch ended")?;
                if let Some(step) = build.current_step.filter(|step| step.number == number) {
                    return anyhow::Ok(step);
                }
            }
        };
        let step = timeout(LONG, watching).await.context("the step is not told")??;
        assert_eq!((step.of, step.name), (3, format!("RUN step-{number}")));
        // Whoever watches has heard it: so has the list.
        let listed = client.list_builds(ListBuildsRequest::default()).await?.into_inner().builds;
        let steps: Vec<_> =
            listed.iter().map(|build| build.current_step.as_ref().map(|step| step.number)).collect();
        assert_eq!(steps, [None, Some(number)]);
    }
    // Told before a gateway began: it is there to be asked for.
    let later = Bed::beside(&bed).await?;
    let mut client = later.client().await?;
    let reading = async {
        loop {
            let listed = client.list_builds(ListBuildsRequest::default()).await?.into_inner().builds;
            if listed.iter().any(|build| build.current_step.as_ref().is_some_and(|step| step.number == 2)) {
                return anyhow::Ok(());
            }
            // The step is stored after it was told.
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(LONG, reading).await.context("it is not listed")??;
    later.end().await?;
    bed.end().await
}
