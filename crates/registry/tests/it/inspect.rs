//! `inspect::repository` on real registries, and on none.

use kiln_domain::finding::Verdict;
use kiln_registry::Config;
use kiln_registry::inspect::repository;
use kiln_testkit::registry::DockerRegistry;

#[tokio::test]
async fn a_registry_answers_takes_uploads_wants_credentials_or_is_away() {
    let mut open = DockerRegistry::start().await.unwrap();
    let closed = DockerRegistry::start_with_password().await.unwrap();
    let open_at = format!("{}/team/images", open.address());
    let found = repository(Config::default(), &open_at).await;
    assert_eq!((found.verdict, found.says.as_str()), (Verdict::Ok, "it answers, and takes uploads"));
    let found = repository(Config::default(), &format!("{}/x", closed.address())).await;
    assert!(found.verdict == Verdict::Ok && found.says.contains("wants credentials"), "{found:?}");
    open.stop();
    let found = repository(Config::default(), &open_at).await;
    assert!(found.verdict == Verdict::Problem && found.says.contains("connection refused"), "{found:?}");
    let found = repository(Config::default(), "no repository").await;
    assert_eq!(found.verdict, Verdict::Problem, "{found:?}");
}
