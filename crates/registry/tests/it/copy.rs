use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use kiln_domain::reference::{Digest, ImageReference};
use kiln_registry::{Access, Config, Error, OciRegistry, Problem, Registry as _};
use kiln_testkit::registry::{DockerRegistry, Files};
use tokio::sync::watch;

use crate::{LONG, amd64, at_once, client};
use kiln_testkit::front::{Front, Reply};

const FILES: Files<'_> = &[("bin/hello", b"hello")];

async fn copy(from: &ImageReference, to: &ImageReference, access: &Access) -> Result<Digest, Error> {
    client().copy(from, to, Some(&amd64()), access, &mut |_| Ok(Box::new(()))).await
}

/// Everything of the image is there, byte for byte.
async fn assert_same(
    from: (&DockerRegistry, &str),
    to: (&DockerRegistry, &str),
    to_tag: &str,
    digest: &Digest,
) {
    let source = from.0.manifest(from.1, digest.as_str()).await.unwrap().unwrap();
    assert_eq!(to.0.manifest(to.1, to_tag).await.unwrap().unwrap(), source);
    let manifest: serde_json::Value = serde_json::from_slice(&source.1).unwrap();
    let layers = manifest["layers"].as_array().unwrap().iter();
    for descriptor in layers.chain([&manifest["config"]]) {
        let digest: Digest = descriptor["digest"].as_str().unwrap().parse().unwrap();
        let content = from.0.blob(from.1, &digest).await.unwrap().unwrap();
        assert_eq!(to.0.blob(to.1, &digest).await.unwrap(), Some(content));
    }
}

fn through(front: &Front, name: &str) -> ImageReference {
    format!("{}/{name}", front.address).parse().unwrap()
}

async fn forwarding(registry: &DockerRegistry) -> Front {
    let upstream = registry.address().to_owned();
    Front::start(move |_| Reply::Forward(upstream.clone())).await.unwrap()
}

#[tokio::test]
async fn within_a_registry_blobs_are_mounted_not_moved() {
    let registry = DockerRegistry::start().await.unwrap();
    let digest = registry.push_image("base/app:1", "linux/amd64", FILES).await.unwrap();
    let front = forwarding(&registry).await;
    let copied =
        copy(&through(&front, "base/app:1"), &through(&front, "ws/app:x"), &at_once()).await.unwrap();
    assert_eq!(copied, digest);
    assert_same((&registry, "base/app"), (&registry, "ws/app"), "x", &digest).await;
    assert_eq!(front.count("POST", "mount="), 2);
    assert_eq!(front.count("PUT", "/blobs/"), 0);
    assert_eq!(front.count("PUT", "/manifests/x"), 1);
}

#[tokio::test]
async fn what_is_there_is_not_mounted_again() {
    let registry = DockerRegistry::start().await.unwrap();
    registry.push_image("base/app:1", "linux/amd64", FILES).await.unwrap();
    let front = forwarding(&registry).await;
    for tag in ["ws/app:x", "ws/app:y"] {
        copy(&through(&front, "base/app:1"), &through(&front, tag), &at_once()).await.unwrap();
        assert_eq!(front.count("POST", ""), 2, "{tag}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_copies_at_once_of_images_with_the_same_layers() {
    let registry = DockerRegistry::start().await.unwrap();
    let digest = registry.push_image("base:1", "linux/amd64", FILES).await.unwrap();
    let from = registry.reference("base:1").unwrap();
    let copies = (0..100).map(|number| {
        let (from, to) = (from.clone(), registry.reference(&format!("ws:{number}")).unwrap());
        async move { copy(&from, &to, &Access::anonymous(LONG)).await }
    });
    for copied in futures::future::join_all(copies).await {
        assert_eq!(copied.unwrap(), digest);
    }
}

/// docker-registry answers so while another copy mounts the same blobs.
#[tokio::test]
async fn a_manifest_that_is_refused_for_blobs_that_are_there_is_put_again() {
    let registry = DockerRegistry::start().await.unwrap();
    let digest = registry.push_image("app:1", "linux/amd64", FILES).await.unwrap();
    let refusing = async |times: usize| {
        let (upstream, puts) = (registry.address().to_owned(), AtomicUsize::new(0));
        Front::start(move |asked| {
            let refused = asked.is("PUT", "/manifests/") && puts.fetch_add(1, Ordering::Relaxed) < times;
            let codes = br#"{"errors":[{"code":"DIGEST_INVALID"},{"code":"MANIFEST_BLOB_UNKNOWN"}]}"#;
            if refused { Reply::status(400).body(*codes) } else { Reply::Forward(upstream.clone()) }
        })
        .await
        .unwrap()
    };
    let front = refusing(2).await;
    let copied = copy(&through(&front, "app:1"), &through(&front, "ws:1"), &Access::anonymous(LONG)).await;
    assert_eq!(copied.unwrap(), digest);
    // What stays refused is told.
    let front = refusing(usize::MAX).await;
    let copied = copy(&through(&front, "app:1"), &through(&front, "ws:2"), &Access::anonymous(LONG)).await;
    assert!(matches!(copied, Err(Error::Rejected { status: 400, .. })), "{copied:?}");
    assert_eq!(front.count("PUT", "/manifests/"), 5);
}

#[tokio::test]
async fn a_registry_without_mounts_is_uploaded_to() {
    let registry = DockerRegistry::start().await.unwrap();
    let digest = registry.push_image("base/app:1", "linux/amd64", FILES).await.unwrap();
    let upstream = registry.address().to_owned();
    let front = Front::start(move |asked| {
        if asked.target.contains("mount=") { Reply::status(405) } else { Reply::Forward(upstream.clone()) }
    })
    .await
    .unwrap();
    copy(&through(&front, "base/app:1"), &through(&front, "ws/app:x"), &at_once()).await.unwrap();
    assert_same((&registry, "base/app"), (&registry, "ws/app"), "x", &digest).await;
    assert_eq!(front.count("PUT", "/blobs/"), 2);
}

#[tokio::test]
async fn a_new_tag_in_the_same_repository_moves_nothing() {
    let registry = DockerRegistry::start().await.unwrap();
    let digest = registry.push_image("app:1", "linux/amd64", FILES).await.unwrap();
    let front = forwarding(&registry).await;
    copy(&through(&front, "app:1"), &through(&front, "app:2"), &at_once()).await.unwrap();
    assert_same((&registry, "app"), (&registry, "app"), "2", &digest).await;
    assert_eq!(front.count("POST", ""), 0);
}

#[tokio::test]
async fn across_registries_twice_the_second_time_nothing_moves() {
    let (here, there) = (DockerRegistry::start().await.unwrap(), DockerRegistry::start().await.unwrap());
    let big = vec![42; 6 << 20];
    let files: Files<'_> = &[("bin/hello", b"hello"), ("big", &big)];
    let digest = here.push_image("app:1", "linux/amd64", files).await.unwrap();
    let front = forwarding(&there).await;
    let (from, to) = (here.reference("app:1").unwrap(), through(&front, "deep/er/copy:1"));
    for _ in 0..2 {
        assert_eq!(copy(&from, &to, &at_once()).await.unwrap(), digest);
        assert_eq!(front.count("PUT", "/blobs/"), 2);
    }
    assert_same((&here, "app"), (&there, "deep/er/copy"), "1", &digest).await;
}

#[tokio::test]
async fn of_an_index_one_platform_is_copied() {
    let (here, there) = (DockerRegistry::start().await.unwrap(), DockerRegistry::start().await.unwrap());
    let images: [(&str, Files<'_>); 2] =
        [("linux/arm64", &[("a", b"arm")]), ("linux/amd64", &[("a", b"amd")])];
    let (_, digests) = here.push_index("app:1", &images).await.unwrap();
    let (from, to) = (here.reference("app:1").unwrap(), there.reference("app:1").unwrap());
    assert_eq!(copy(&from, &to, &at_once()).await.unwrap(), digests[1]);
    assert_same((&here, "app"), (&there, "app"), "1", &digests[1]).await;
    assert_eq!(there.manifest("app", digests[0].as_str()).await.unwrap(), None);
    let error = client()
        .copy(&from, &to, Some(&"linux/s390x".parse().unwrap()), &at_once(), &mut |_| Ok(Box::new(())))
        .await
        .unwrap_err();
    assert!(matches!(error, Error::NoPlatform { .. }), "{error}");
}

#[tokio::test]
async fn before_the_put_the_caller_may_stop_it() {
    let registry = DockerRegistry::start().await.unwrap();
    let digest = registry.push_image("app:1", "linux/amd64", FILES).await.unwrap();
    let (from, to) = (registry.reference("app:1").unwrap(), registry.reference("ws:1").unwrap());
    let mut told = Vec::new();
    let error = client()
        .copy(&from, &to, Some(&amd64()), &at_once(), &mut |digest| {
            told.push(digest.clone());
            Err(io::Error::other("revoked"))
        })
        .await
        .unwrap_err();
    assert_eq!(told, [digest]);
    assert!(matches!(&error, Error::Stopped(source) if source.to_string() == "revoked"), "{error}");
    assert_eq!(registry.manifest("ws", "1").await.unwrap(), None);
}

#[tokio::test]
async fn a_put_that_is_tried_again_is_announced_again() {
    let registry = DockerRegistry::start().await.unwrap();
    registry.push_image("app:1", "linux/amd64", FILES).await.unwrap();
    let (upstream, puts) = (registry.address().to_owned(), AtomicUsize::new(0));
    let front = Front::start(move |asked| {
        let first = asked.is("PUT", "/manifests/") && puts.fetch_add(1, Ordering::Relaxed) == 0;
        if first { Reply::Hangup } else { Reply::Forward(upstream.clone()) }
    })
    .await
    .unwrap();
    let mut announced = 0;
    let (from, to) = (through(&front, "app:1"), through(&front, "ws:1"));
    client()
        .copy(&from, &to, Some(&amd64()), &Access::anonymous(LONG), &mut |_| {
            announced += 1;
            Ok(Box::new(()))
        })
        .await
        .unwrap();
    assert_eq!(announced, 2);
}

#[tokio::test]
async fn a_put_that_has_begun_is_not_broken_off_at_the_deadline() {
    let registry = DockerRegistry::start().await.unwrap();
    let digest = registry.push_image("app:1", "linux/amd64", FILES).await.unwrap();
    let upstream = registry.address().to_owned();
    let (let_go, held) = watch::channel(false);
    let front = Front::start(move |asked| match asked.is("PUT", "/manifests/") {
        true => Reply::ForwardOnce(held.clone(), upstream.clone()),
        false => Reply::Forward(upstream.clone()),
    })
    .await
    .unwrap();
    let (from, to) = (through(&front, "app:1"), through(&front, "ws:1"));
    let access = Access::anonymous(Duration::from_secs(3));
    let late = async {
        tokio::time::sleep_until(access.deadline + Duration::from_millis(50)).await;
        assert_eq!(front.count("PUT", "/manifests/"), 1, "it has not begun: this test tests nothing");
        let_go.send_replace(true);
    };
    let (client, platform) = (client(), amd64());
    let mut go = |_: &Digest| -> io::Result<Box<dyn Send>> { Ok(Box::new(())) };
    let (copied, ()) = tokio::join!(client.copy(&from, &to, Some(&platform), &access, &mut go), late);
    assert_eq!(copied.unwrap(), digest);
}

#[tokio::test]
async fn a_layer_that_is_cut_is_fetched_again() {
    let (here, there) = (DockerRegistry::start().await.unwrap(), DockerRegistry::start().await.unwrap());
    let big = vec![7; 3 << 20];
    let digest = here.push_image("app:1", "linux/amd64", &[("big", &big)]).await.unwrap();
    let (upstream, cuts) = (here.address().to_owned(), AtomicUsize::new(0));
    let front = Front::start(move |asked| {
        // The first is of the config, to look at; then come the layer and the config to be copied.
        let cut = asked.is("GET", "/blobs/") && (1..=2).contains(&cuts.fetch_add(1, Ordering::Relaxed));
        if cut { Reply::ForwardCut(upstream.clone(), 1 << 20) } else { Reply::Forward(upstream.clone()) }
    })
    .await
    .unwrap();
    copy(&through(&front, "app:1"), &there.reference("app:1").unwrap(), &at_once()).await.unwrap();
    assert_same((&here, "app"), (&there, "app"), "1", &digest).await;
}

#[tokio::test]
async fn a_layer_that_is_not_what_it_should_be_arrives_nowhere() {
    let (here, there) = (DockerRegistry::start().await.unwrap(), DockerRegistry::start().await.unwrap());
    let digest = here.push_image("app:1", "linux/amd64", FILES).await.unwrap();
    let manifest = here.manifest("app", digest.as_str()).await.unwrap().unwrap().1;
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    let layer: Digest = manifest["layers"][0]["digest"].as_str().unwrap().parse().unwrap();
    let size = usize::try_from(manifest["layers"][0]["size"].as_u64().unwrap()).unwrap();
    for wrong in [size, size + 1] {
        let (upstream, path) = (here.address().to_owned(), format!("/blobs/{layer}"));
        let front = Front::start(move |asked| {
            if asked.is("GET", &path) {
                Reply::status(200).body(vec![0; wrong])
            } else {
                Reply::Forward(upstream.clone())
            }
        })
        .await
        .unwrap();
        let error = copy(&through(&front, "app:1"), &there.reference("app:1").unwrap(), &at_once())
            .await
            .unwrap_err();
        assert!(
            matches!(&error, Error::Broken { reference, .. } if reference.contains(layer.as_str())),
            "{error}"
        );
        assert_eq!(error.registry(), Some(front.address.as_str()));
        assert_eq!(there.blob("app", &layer).await.unwrap(), None);
        assert_eq!(there.manifest("app", "1").await.unwrap(), None);
    }
}

#[tokio::test]
async fn a_push_registry_that_is_away_is_waited_for_and_another_is_not() {
    let (here, mut there) = (DockerRegistry::start().await.unwrap(), DockerRegistry::start().await.unwrap());
    let digest = here.push_image("app:1", "linux/amd64", FILES).await.unwrap();
    there.stop();
    let (from, to) = (here.reference("app:1").unwrap(), there.reference("app:1").unwrap());
    let mut access = at_once();
    let error = copy(&from, &to, &access).await.unwrap_err();
    let refused = matches!(&error, Error::Unavailable { problem: Problem::Refused, .. });
    assert!(refused && error.registry() == Some(there.address()), "{error}");

    access.insist_on = Some(there.address().to_owned());
    let client = client();
    let platform = amd64();
    let mut go = |_: &Digest| -> io::Result<Box<dyn Send>> { Ok(Box::new(())) };
    let mut copying = client.copy(&from, &to, Some(&platform), &access, &mut go);
    // It is at it, and does not give up.
    let early = tokio::time::timeout(Duration::from_millis(300), &mut copying).await;
    assert!(early.is_err(), "{early:?}");
    let (copied, started) = tokio::join!(copying, there.start_again());
    started.unwrap();
    assert_eq!(copied.unwrap(), digest);
}

#[tokio::test]
async fn an_upload_that_stands_still_is_begun_anew() {
    let here = DockerRegistry::start().await.unwrap();
    here.push_image("app:1", "linux/amd64", FILES).await.unwrap();
    let front = Front::start(|asked| match asked.method.as_str() {
        "HEAD" => Reply::status(404),
        "POST" => Reply::status(202).header("location", "/upload"),
        _ => Reply::Silence,
    })
    .await
    .unwrap();
    let client = OciRegistry::new(Config {
        stall_timeout: Duration::from_millis(50),
        parallel_blobs: 1,
        ..Config::default()
    });
    let (from, to) = (here.reference("app:1").unwrap(), through(&front, "app:1"));
    let error = client
        .copy(&from, &to, Some(&amd64()), &Access::anonymous(LONG), &mut |_| Ok(Box::new(())))
        .await
        .unwrap_err();
    assert!(matches!(&error, Error::Unavailable { problem: Problem::Timeout, .. }), "{error}");
    assert_eq!(error.registry(), Some(front.address.as_str()));
    assert_eq!(front.count("PUT", "/upload"), 5);
}
