//! The log-relay against a real nats-server and an engine that the test plays.

mod bed;
mod faults;

use std::time::Duration;

use anyhow::{Context as _, Result};
use kiln_bus::logs::LogTail;
use kiln_bus::seal::OpenKey;
use kiln_contract::subject;
use kiln_domain::failure::{Failure, FailureReason};
use kiln_domain::transition::Change;
use kiln_log_relay::Config;
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};

use crate::bed::Bed;

const SECRET: &str = "correct horse battery";

#[tokio::test]
async fn every_byte_of_an_output_comes_into_the_log() -> Result<()> {
    let bed = Bed::new().await?;
    let relays = [bed.relay("a").await?, bed.relay("b").await?];
    let mut builds = Vec::new();
    for number in 0..10u8 {
        let mut output = vec![0; 300_000];
        SmallRng::seed_from_u64(number.into()).fill_bytes(&mut output);
        let mut play = bed.build(number, SECRET).await?;
        play.start().await?;
        for piece in output.chunks(7_001 * usize::from(number + 1)) {
            play.write(piece.to_vec());
        }
        builds.push((play, output));
    }
    for (play, output) in &mut builds {
        // All of it is there while the build runs.
        let length = output.len() as u64;
        bed.tail(&play.id, |tail| tail.end == length).await?;
        play.end();
        play.succeed().await?;
        assert!(bed.log(&play.id).await? == *output);
    }
    for relay in relays {
        relay.stop().await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_secret_across_a_takeover_does_not_show() -> Result<()> {
    let bed = Bed::new().await?;
    let first = bed.relay("first").await?;
    let mut play = bed.build(1, SECRET).await?;
    play.start().await?;
    play.write("before correct horse");
    let tail = bed.tail(&play.id, |tail| tail.end > 0).await?;
    assert_eq!(tail.end, 7, "what may be the secret's beginning is held back");
    first.kill(&bed).await?;
    play.write(" bat");
    let second = bed.relay("second").await?;
    bed.tail(&play.id, |now| now.writer != tail.writer).await?;
    second.kill(&bed).await?;
    let _third = bed.relay("third").await?;
    play.write("tery after, and Y29ycmVjdCBob3JzZSBiYXR0ZXJ5\n");
    play.end();
    play.succeed().await?;
    assert_eq!(bed.text(&play.id).await?, "before *** after, and ***\n");
    Ok(())
}

#[tokio::test]
async fn a_relay_that_stops_hands_over_at_once() -> Result<()> {
    let bed = Bed::new().await?;
    let first = bed.relay("first").await?;
    let mut play = bed.build(1, SECRET).await?;
    play.start().await?;
    play.write("one\n");
    let before: LogTail = bed.tail(&play.id, |tail| tail.end == 4).await?;
    let _second = bed.relay("second").await?;
    first.stop().await?;
    let handed_over = bed.tail(&play.id, |tail| tail.writer != before.writer);
    tokio::time::timeout(Duration::from_secs(10), handed_over).await??;
    play.write("two\n");
    play.end();
    play.succeed().await?;
    assert_eq!(bed.text(&play.id).await?, "one\ntwo\n");
    Ok(())
}

#[tokio::test]
async fn all_attempts_are_one_log() -> Result<()> {
    let bed = Bed::new().await?;
    let _relay = bed.relay("a").await?;
    let mut play = bed.build(1, SECRET).await?;
    play.start().await?;
    play.write("first, to the corr");
    play.end();
    play.retry().await?;
    play.start().await?;
    play.write("second\n");
    let end = "first, to the corr\nkiln: attempt 1 was lost; attempt 2 follows\nsecond\n".len() as u64;
    bed.tail(&play.id, |tail| tail.end == end && tail.source.attempt == 2).await?;
    // The machine is gone, with what it has not told.
    bed.engine.vanish(&play.run());
    play.retry().await?;
    play.start().await?;
    play.write("third\n");
    play.end();
    play.succeed().await?;
    assert_eq!(
        bed.text(&play.id).await?,
        "first, to the corr\nkiln: attempt 1 was lost; attempt 2 follows\nsecond\nkiln: what attempt 2 wrote last is gone\n\
         kiln: attempt 2 was lost; attempt 3 follows\nthird\n"
    );
    Ok(())
}

#[tokio::test]
async fn a_build_that_never_started_has_a_complete_log() -> Result<()> {
    let bed = Bed::new().await?;
    let relay = bed.relay("a").await?;
    let mut cancelled = bed.build(1, SECRET).await?;
    cancelled.change(Change::Cancelled { by: None, findings: Default::default() }).await?;
    assert_eq!(bed.text(&cancelled.id).await?, "kiln: the build was cancelled before it started\n");
    relay.stop().await?;

    // Over while no relay lived: the list of what isn't cleaned up tells.
    let mut failed = bed.build(2, SECRET).await?;
    let failure = Failure { reason: FailureReason::QueueExpired, message: format!("no slot for `{SECRET}`") };
    failed.change(Change::Failed { by: None, failure, findings: Default::default() }).await?;
    let _relay = bed.relay("b").await?;
    assert_eq!(bed.text(&failed.id).await?, "kiln: the build failed before it started: no slot for `***`\n");
    Ok(())
}

/// Builders tell how a build ended; what became of it when the last of them was no more, the relay tells.
#[tokio::test]
async fn the_last_line_says_how_the_build_ended() -> Result<()> {
    let bed = Bed::new().await?;
    let _relay = bed.relay("a").await?;
    let findings = kiln_domain::run::Findings::default;
    let mut cancelled = bed.build(1, SECRET).await?;
    cancelled.start().await?;
    cancelled.write("STEP 1");
    cancelled.end();
    cancelled.retry().await?;
    let by = cancelled.holder();
    cancelled.change(Change::CancelRequested { reason: "enough".into() }).await?;
    cancelled.change(Change::Cancelled { by: Some(by.clone()), findings: findings() }).await?;
    assert_eq!(
        bed.text(&cancelled.id).await?,
        "STEP 1\nkiln: attempt 1 was lost; attempt 2 follows\nkiln: the build was cancelled before attempt 2 started\n"
    );
    let mut silent = bed.build(4, SECRET).await?;
    silent.start().await?;
    silent.end();
    silent.change(Change::CancelRequested { reason: "enough".into() }).await?;
    let by = silent.holder();
    silent.change(Change::Cancelled { by: Some(by), findings: findings() }).await?;
    assert_eq!(bed.text(&silent.id).await?, "kiln: the build was cancelled before it wrote anything\n");
    for (number, reason) in [(2, FailureReason::EngineLost), (3, FailureReason::ImageMissing)] {
        let mut failed = bed.build(number, SECRET).await?;
        failed.start().await?;
        failed.write("kiln: done: x\n");
        failed.end();
        let by = failed.holder();
        let failure = Failure { reason, message: format!("`{SECRET}` is not there") };
        failed.change(Change::Failed { by: Some(by.clone()), failure, findings: findings() }).await?;
        assert_eq!(
            bed.text(&failed.id).await?,
            "kiln: done: x\nkiln: the build failed: `***` is not there\n"
        );
    }
    Ok(())
}

#[tokio::test]
async fn without_its_secrets_no_byte_is_written() -> Result<()> {
    let bed = Bed::new().await?;
    let _relay = bed.relay("a").await?;
    let other = OpenKey::from_seed(OpenKey::new_seed()?)?.seal_key();
    let mut play = bed.build_sealed(1, SECRET, &other).await?;
    play.start().await?;
    play.write(format!("{SECRET}\n"));
    play.end();
    play.succeed().await?;
    assert_eq!(
        bed.text(&play.id).await?,
        "kiln: the log is withheld: the build's secrets could not be opened, so they could not be masked\n"
    );
    Ok(())
}

#[tokio::test]
async fn a_log_has_a_limit_and_the_build_goes_on() -> Result<()> {
    let bed = Bed::new().await?;
    let config = || Config { max_log_bytes: 1_000, ..Config::default() };
    let first = bed.relay_with(config(), "a").await?;
    let mut play = bed.build(1, SECRET).await?;
    play.start().await?;
    play.write("x".repeat(999));
    let below = bed.tail(&play.id, |tail| tail.end == 999).await?;
    assert_eq!((below.limited, below.max_bytes), (false, Some(1_000)));
    play.write("yz");
    let above = bed.tail(&play.id, |tail| tail.end > 1_000).await?;
    assert!(above.limited);
    // The next writer knows.
    first.kill(&bed).await?;
    let _second = bed.relay_with(config(), "b").await?;
    play.write("more\n".repeat(1_000));
    play.end();
    play.succeed().await?;
    let line = "\nkiln: the log ends here, at its limit of 1000 bytes; the build goes on\n";
    assert_eq!(bed.text(&play.id).await?, format!("{}y{line}", "x".repeat(999)));
    assert!(bed.tail(&play.id, |tail| tail.complete).await?.limited);
    Ok(())
}

#[tokio::test]
async fn an_output_that_never_ends_is_completed_all_the_same() -> Result<()> {
    let bed = Bed::new().await?;
    let _relay = bed.relay_with(Config { output_patience_seconds: 1, ..Config::default() }, "a").await?;
    let mut play = bed.build(1, SECRET).await?;
    play.start().await?;
    play.write("some");
    play.succeed().await?;
    assert_eq!(
        bed.text(&play.id).await?,
        "some\nkiln: what attempt 1 wrote last could not be read in time\n"
    );
    Ok(())
}

#[tokio::test]
async fn a_log_whose_stream_is_deleted_goes_on_and_says_what_is_lost() -> Result<()> {
    let bed = Bed::new().await?;
    let _relay = bed.relay("a").await?;
    let mut play = bed.build(1, SECRET).await?;
    play.start().await?;
    play.write("before");
    bed.tail(&play.id, |tail| tail.end == 6).await?;
    bed.server.as_ref().context("a server")?.delete_stream(subject::LOGS_STREAM).await?;
    bed.provision().await?;
    play.write("after\n");
    play.end();
    play.succeed().await?;
    bed.tail(&play.id, |tail| tail.complete).await?;
    let line = "\nkiln: the 6 bytes of the log before this line are lost: the bus keeps them no more\n";
    // From the first byte that is there: an offset means what it meant.
    assert_eq!(bed.kept(&play.id).await?, (6, format!("{line}after\n")));
    Ok(())
}

#[tokio::test]
async fn a_log_that_is_left_counts_as_written_no_more() -> Result<()> {
    let bed = Bed::new().await?;
    let relay = bed.relay("a").await?;
    let mut play = bed.build(1, SECRET).await?;
    play.start().await?;
    relay.shows("logs_writing 1").await?;
    relay.shows("max_log_bytes 67108864").await?;
    // The relay drops the tasks of builds that the journal doesn't know any more.
    bed.server.as_ref().context("a server")?.delete_stream(subject::JOURNAL_STREAM).await?;
    bed.provision().await?;
    relay.shows("logs_writing 0").await
}

#[tokio::test]
async fn the_running_step_is_told() -> Result<()> {
    let bed = Bed::new().await?;
    let _relay = bed.relay("a").await?;
    let mut play = bed.build(1, SECRET).await?;
    play.start().await?;
    play.write(format!("STEP 1/2: FROM scratch\nSTEP 2/2: RUN echo {SECRET}\n"));
    let told = async {
        loop {
            if let Some(progress) =
                bed.logs.last_progress(&play.id).await.filter(|told| told.step.number == 2)
            {
                return progress;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let told = tokio::time::timeout(Duration::from_secs(10), told).await?;
    assert_eq!((told.attempt, told.step.of, told.step.name.as_str()), (1, 2, "RUN echo ***"));
    Ok(())
}
