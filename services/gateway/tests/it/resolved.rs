//! What a resolver said a moment ago, and who is given it again.

use anyhow::{Result, ensure};
use kiln_proto::kiln_v1 as api;

use crate::desk::Desk;

#[tokio::test]
async fn an_answer_for_all_is_given_again_for_a_moment_and_no_other() -> Result<()> {
    let desk = Desk::set().await?;
    let request =
        |reference: &str| api::ResolveBaseImageRequest { r#ref: reference.into(), ..Default::default() };
    let ask = async |request| {
        Ok::<_, anyhow::Error>(desk.client.clone().resolve_base_image(request).await?.into_inner())
    };
    // The played resolver numbers its answers.
    let fresh = || request("registry.test/fresh:1");
    let mut given_again = false;
    // On a busy machine the moment may be over before the second question comes.
    for _ in 0..20 {
        let (first, second) = (ask(fresh()).await?, ask(fresh()).await?);
        given_again |= first.r#ref == second.r#ref && second.cached;
    }
    ensure!(given_again, "each question went to the resolver");

    let own = || api::RegistryAuth {
        credentials: [("registry.test".to_owned(), "bWU6c2VjcmV0".to_owned())].into(),
        ..Default::default()
    };
    let all = || api::RegistryAuth { allow_all: true, ..Default::default() };
    for other in [
        request("registry.test/stale:1"),
        api::ResolveBaseImageRequest { refresh: true, ..fresh() },
        api::ResolveBaseImageRequest { auth: Some(own()), ..fresh() },
        api::ResolveBaseImageRequest { auth: Some(all()), ..fresh() },
    ] {
        let (first, second) = (ask(other.clone()).await?, ask(other).await?);
        ensure!(first.r#ref != second.r#ref && !second.cached, "{first:?} {second:?}");
    }
    // A refresh is the newest word for those who come after it.
    let refreshed = ask(api::ResolveBaseImageRequest { refresh: true, ..fresh() }).await?;
    let number = |answer: &api::ResolveBaseImageResponse| -> Result<u64> {
        Ok(u64::from_str_radix(answer.r#ref.rsplit(':').next().unwrap_or_default(), 16)?)
    };
    ensure!(number(&ask(fresh()).await?)? >= number(&refreshed)?, "an older answer was given");
    Ok(())
}
