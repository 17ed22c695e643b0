//! A log over HTTP/1.1, as curl and browsers read it.

use anyhow::{Context as _, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_domain::id::{BuildId, ImageKey};
use kiln_proto::kiln_v1::builds_client::BuildsClient;
use kiln_proto::kiln_v1::{BuildLogInfoRequest, BuildLogsRequest, BuildStatusRequest};
use reqwest::{RequestBuilder, Response, StatusCode, Version};
use serde_json::Value;
use tokio::time::timeout;

use crate::bed::{Bed, LONG};

/// Bytes of every value, over several chunks.
fn bytes(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 7 + at / 251) as u8).collect()
}

fn header(answer: &Response, name: &str) -> String {
    answer.headers().get(name).map_or("", |value| value.to_str().unwrap()).to_owned()
}

async fn problem(request: RequestBuilder) -> Result<(u16, String, String)> {
    let answer = timeout(LONG, request.send()).await??;
    assert_eq!(header(&answer, "content-type"), "application/problem+json");
    let status = answer.status().as_u16();
    let body: Value = serde_json::from_slice(&answer.bytes().await?)?;
    assert_eq!(body["status"], status);
    Ok((status, body["reason"].as_str().unwrap().into(), body["detail"].as_str().unwrap().into()))
}

#[tokio::test]
async fn a_finished_log_is_a_file_of_bytes() -> Result<()> {
    let bed = Bed::new().await?;
    let mut play = bed.build(1).await?;
    let whole = bytes(150_000);
    for piece in whole.chunks(40_001) {
        play.write(piece.to_vec()).await?;
    }
    play.end().await?;
    let path = play.path();

    let answer = bed.get(&path).send().await?;
    assert_eq!((answer.status(), answer.version()), (StatusCode::OK, Version::HTTP_11));
    for (name, value) in [
        ("content-type", "text/plain"),
        ("content-length", "150000"),
        ("accept-ranges", "bytes"),
        ("x-content-type-options", "nosniff"),
        ("kiln-log-offset", "0"),
        ("kiln-log-complete", "true"),
    ] {
        assert_eq!(header(&answer, name), value, "{name}");
    }
    assert!(answer.bytes().await? == whole);

    let answer = bed.head(&path).send().await?;
    assert_eq!((answer.status(), header(&answer, "content-length")), (StatusCode::OK, "150000".into()));
    assert!(answer.bytes().await?.is_empty());

    for (range, from, to) in [
        ("bytes=0-0", 0, 1),
        ("bytes=40000-40001", 40_000, 40_002),
        ("bytes=100000-", 100_000, 150_000),
        ("bytes=149999-999999", 149_999, 150_000),
        ("bytes=-1", 149_999, 150_000),
        ("bytes=-200000", 0, 150_000),
    ] {
        let answer = bed.get(&path).header("range", range).send().await?;
        assert_eq!(answer.status(), StatusCode::PARTIAL_CONTENT, "{range}");
        assert_eq!(header(&answer, "content-range"), format!("bytes {from}-{}/150000", to - 1));
        assert_eq!(header(&answer, "content-length"), (to - from).to_string());
        assert!(answer.bytes().await? == whole[from..to], "{range}");
        let answer = bed.head(&path).header("range", range).send().await?;
        assert_eq!(header(&answer, "content-length"), (to - from).to_string());
    }
    for (query, from) in
        [("?follow", 0), ("?offset=5", 5), ("?follow&tail=9", 149_991), ("?offset=150000", 150_000)]
    {
        let answer = bed.get(&format!("{path}{query}")).send().await?;
        assert_eq!((answer.status(), header(&answer, "kiln-log-offset")), (StatusCode::OK, from.to_string()));
        assert!(answer.bytes().await? == whole[from..], "{query}");
    }
    bed.until_readers(0).await?;
    bed.end().await
}

#[tokio::test]
async fn a_growing_log_is_followed_to_its_end() -> Result<()> {
    let bed = Bed::new().await?;
    let mut play = bed.build(1).await?;
    // Before a byte is written.
    let follow = bed.get(&format!("{}?follow", play.path())).send();
    let mut early = timeout(LONG, follow).await.context("its head waits for a byte")??;
    assert_eq!((early.status(), header(&early, "content-length")), (StatusCode::OK, String::new()));
    play.write("one\n").await?;
    assert_eq!(timeout(LONG, early.chunk()).await??.context("ended")?, "one\n");

    // What is there now, of a log that grows: its length may not be called the whole's.
    let answer = bed.get(&play.path()).header("range", "bytes=1-").send().await?;
    assert_eq!(header(&answer, "content-range"), "bytes 1-3/*");
    assert_eq!(header(&answer, "kiln-log-complete"), "false");
    assert_eq!(answer.bytes().await?, "ne\n");

    let mut late = bed.get(&format!("{}?follow&offset=2", play.path())).send().await?;
    assert_eq!(late.chunk().await?.context("ended")?, "e\n");
    play.write("two\n").await?;
    assert_eq!(timeout(LONG, late.chunk()).await??.context("ended")?, "two\n");
    play.end().await?;
    assert_eq!(timeout(LONG, late.chunk()).await??, None);
    assert_eq!(timeout(LONG, early.bytes()).await??, "two\n");
    bed.end().await
}

#[tokio::test]
async fn what_can_not_be_read_is_said_with_its_reason() -> Result<()> {
    let bed = Bed::new().await?;
    let mut play = bed.build(1).await?;
    let path = play.path();
    let said = async |request: RequestBuilder, status: u16, reason: &str, words: &str| {
        let (got, told, detail) = problem(request).await?;
        assert_eq!((got, &*told), (status, reason), "{detail}");
        assert!(detail.contains(words), "{detail}");
        anyhow::Ok(())
    };
    said(bed.get(&path), 404, "log-not-begun", "not begun yet").await?;
    play.write("0123456789").await?;
    let other = BuildId::new(&ImageKey::of("r/x:y"), [9; 10]);
    said(bed.get(&format!("/v1/builds/{other}/log?follow")), 404, "unknown-build", "never was").await?;
    said(bed.get("/v1/builds/x/log"), 400, "invalid-request", "id: ").await?;
    said(bed.get(&format!("{path}?folow")), 400, "invalid-request", "folow: ").await?;
    said(bed.get(&format!("{path}?offset=11")), 416, "out-of-range", "ends at byte 10").await?;
    said(bed.get(&format!("{path}?follow&offset=11")), 416, "out-of-range", "ends at byte 10").await?;
    said(bed.get(&path).header("range", "bytes=10-"), 416, "out-of-range", "ends at byte 10").await?;
    let unsatisfied = bed.get(&path).header("range", "bytes=10-").send().await?;
    assert_eq!(header(&unsatisfied, "content-range"), "bytes */10");
    let both = bed.get(&format!("{path}?follow")).header("range", "bytes=1-");
    said(both, 400, "invalid-request", "Range: ").await?;
    let events = bed.get(&path).header("accept", "text/event-stream").header("last-event-id", "11");
    said(events, 416, "out-of-range", "ends at byte 10").await?;
    let events = bed.get(&path).header("accept", "text/event-stream").header("last-event-id", "x");
    said(events, 400, "invalid-request", "Last-Event-ID: ").await?;
    said(bed.get("/v1/builds"), 404, "unknown-path", "/log").await?;
    said(bed.post(&path), 405, "method-not-allowed", "GET or HEAD").await?;
    assert_eq!(header(&bed.post(&path).send().await?, "allow"), "GET,HEAD");

    // The record is kept longer than the log.
    let mut past = bed.build(2).await?;
    past.cancel().await?;
    bed.until_over(&past.id).await?;
    said(bed.get(&past.path()), 404, "log-expired", "retention").await?;
    bed.end().await
}

#[tokio::test]
async fn grpc_is_answered_on_the_same_port() -> Result<()> {
    let bed = Bed::new().await?;
    let mut play = bed.build(1).await?;
    play.write("a log").await?;
    play.end().await?;
    let channel =
        tonic::transport::Channel::from_shared(format!("http://{}", bed.address))?.connect().await?;
    let mut client = BuildsClient::new(channel.clone());
    let request = BuildLogsRequest { id: play.id.to_string(), follow: true, start: None };
    let mut chunks = client.build_logs(request).await?.into_inner();
    let mut log = Vec::new();
    while let Some(chunk) = chunks.message().await? {
        log.extend(chunk.content);
    }
    assert_eq!(log, b"a log");
    let request = BuildLogInfoRequest { id: play.id.to_string() };
    let info = client.build_log_info(request.clone()).await?.into_inner();
    assert_eq!(
        (info.length, info.first_offset, info.chunks, info.complete, info.limited),
        (5, 0, 3, true, false)
    );
    let (stored, expires) = (info.last_stored_at.unwrap(), info.last_expires_at.unwrap());
    assert_eq!(expires.seconds - stored.seconds, 3600);
    assert_eq!((info.max_age.unwrap().seconds, info.all_logs_max_bytes), (3600, 256 << 20));
    assert!(info.all_logs_bytes > info.length);
    // Of a log that is not there it is said why.
    let mut none = bed.build(2).await?;
    let request = BuildLogInfoRequest { id: none.id.to_string() };
    let waits = client.build_log_info(request.clone()).await.unwrap_err();
    assert_eq!(waits.code(), tonic::Code::NotFound);
    assert!(waits.message().contains("not begun yet"), "{waits}");
    none.cancel().await?;
    bed.until_over(&none.id).await?;
    let expired = client.build_log_info(request).await.unwrap_err();
    assert_eq!(expired.code(), tonic::Code::NotFound);
    assert!(expired.message().contains("retention"), "{expired}");
    let unknown = client.build_status(BuildStatusRequest { id: "x".into() }).await.unwrap_err();
    assert_eq!(unknown.code(), tonic::Code::InvalidArgument);
    // A service that isn't there is answered in gRPC's own words.
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await?;
    let codec = tonic_prost::ProstCodec::<BuildStatusRequest, ()>::default();
    let path = "/kiln.v9.Builds/Nothing".parse()?;
    let refused = grpc.unary(tonic::Request::new(BuildStatusRequest::default()), path, codec).await;
    assert_eq!(refused.unwrap_err().code(), tonic::Code::Unimplemented);
    bed.end().await
}

/// Server-Sent Events as a browser takes them: name, id and data of each.
struct Events {
    answer: Response,
    text: Vec<u8>,
}

impl Events {
    async fn open(bed: &Bed, path: &str, last: Option<&str>) -> Result<Self> {
        let mut request = bed.get(path).header("accept", "text/event-stream");
        if let Some(last) = last {
            request = request.header("last-event-id", last);
        }
        let answer = timeout(LONG, request.send()).await??;
        assert_eq!(answer.status(), StatusCode::OK);
        assert_eq!(header(&answer, "content-type"), "text/event-stream");
        Ok(Self { answer, text: Vec::new() })
    }

    async fn next(&mut self) -> Result<Option<(String, String, Value)>> {
        loop {
            if let Some(end) = self.text.windows(2).position(|two| two == b"\n\n") {
                let block: Vec<u8> = self.text.drain(..end + 2).collect();
                let block = String::from_utf8(block)?;
                let field = |name| block.lines().find_map(|line| line.strip_prefix(name)).map(str::to_owned);
                if let (Some(name), Some(id), Some(data)) = (field("event: "), field("id: "), field("data: "))
                {
                    return Ok(Some((name, id, serde_json::from_str(&data)?)));
                }
                continue;
            }
            match timeout(LONG, self.answer.chunk()).await?? {
                Some(chunk) => self.text.extend_from_slice(&chunk),
                None => return Ok(None),
            }
        }
    }
}

fn carried(data: &Value) -> Vec<u8> {
    match data["base64"].as_str() {
        Some(base64) => STANDARD.decode(base64).unwrap(),
        None => data["text"].as_str().unwrap().as_bytes().to_vec(),
    }
}

#[tokio::test]
async fn a_browser_that_is_cut_off_again_and_again_gets_every_byte_once() -> Result<()> {
    let bed = Bed::new().await?;
    let mut play = bed.build(1).await?;
    let whole = [bytes(20_000), "é\r\n\x1b[31m€ \u{1f525}\n".repeat(200).into_bytes()].concat();
    let (mut got, mut last, mut cuts) = (Vec::new(), None::<String>, 0);
    let mut pieces = whole.chunks(211);
    loop {
        if let Some(piece) = pieces.next() {
            play.write(piece.to_vec()).await?;
        } else if got.len() == whole.len() {
            play.end().await?;
        }
        let mut events = Events::open(&bed, &play.path(), last.as_deref()).await?;
        let (name, id, data) = events.next().await?.context("ended without an end")?;
        cuts += 1;
        last = Some(id.clone());
        if name == "end" {
            assert_eq!(
                (id.as_str(), &data["state"], &data["complete"]),
                ("end", &"CANCELLED".into(), &true.into())
            );
            assert_eq!(data["length"], whole.len());
            assert!(events.next().await?.is_none());
            break;
        }
        assert_eq!((name.as_str(), &data["offset"]), ("log", &got.len().into()));
        got.extend(carried(&data));
        assert_eq!(id, got.len().to_string());
    }
    assert!(got == whole);
    assert!(cuts >= 100, "{cuts}");
    // A browser connects anew after the end, too, unless it is told not to.
    let request = bed.get(&play.path()).header("accept", "text/event-stream").header("last-event-id", "end");
    assert_eq!(request.send().await?.status(), StatusCode::NO_CONTENT);
    bed.end().await
}

#[tokio::test]
async fn readers_that_are_gone_are_freed_and_those_that_stay_are_told_of_a_shutdown() -> Result<()> {
    let bed = Bed::new().await?;
    let mut play = bed.build(1).await?;
    play.write("begun\n").await?;
    let path = format!("{}?follow", play.path());
    let mut gone = Vec::new();
    for _ in 0..10 {
        let mut text = bed.get(&path).send().await?;
        assert_eq!(text.chunk().await?.context("ended")?, "begun\n");
        let mut events = Events::open(&bed, &play.path(), None).await?;
        events.next().await?.context("ended")?;
        gone.push((text, events));
    }
    let mut stays = bed.get(&path).send().await?;
    stays.chunk().await?.context("ended")?;
    let mut listens = Events::open(&bed, &play.path(), None).await?;
    listens.next().await?.context("ended")?;
    bed.until_readers(22).await?;
    // The log is silent: nothing is written by which they would be missed.
    drop(gone);
    bed.until_readers(2).await?;
    bed.stop.cancel();
    // Not as if the log were at its end.
    assert!(timeout(LONG, stays.chunk()).await?.is_err());
    assert!(listens.next().await?.is_none());
    bed.end().await
}
