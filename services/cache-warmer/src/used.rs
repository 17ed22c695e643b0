//! Which images builds really used, from the journal's records. Pure: the same records give the same list in every replica.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use kiln_domain::record::Record;
use kiln_domain::reference::ImageReference;
use kiln_domain::source::Source;

/// What builds made of one image.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Use {
    pub(crate) builds: u32,
    pub(crate) last: Timestamp,
    /// A build counts one on the day that it ends, and half as much after each half-life.
    weight: f64,
}

/// The images that finished builds used, the most used first, at most `limit`.
///
/// A reference with a digest is left out: its answer does not age. What can't be parsed (a FROM of a stage, `scratch`) is
/// no image.
pub(crate) fn most_used<'a>(
    builds: impl Iterator<Item = &'a Record>,
    now: Timestamp,
    half_life: Duration,
    limit: usize,
) -> Vec<(ImageReference, Use)> {
    let mut uses: BTreeMap<String, (ImageReference, Use)> = BTreeMap::new();
    for record in builds {
        let Some(finished) = record.finished_at else { continue };
        let age = Duration::try_from(now.duration_since(finished)).unwrap_or_default();
        let weight = (-age.as_secs_f64() / half_life.as_secs_f64()).exp2();
        let mut images: Vec<ImageReference> =
            images(record).filter(|image| image.digest().is_none()).collect();
        images.sort_by_cached_key(ToString::to_string);
        images.dedup();
        for image in images {
            let new = Use { builds: 0, last: finished, weight: 0.0 };
            let (_, used) = uses.entry(image.to_string()).or_insert((image, new));
            used.builds += 1;
            used.last = used.last.max(finished);
            used.weight += weight;
        }
    }
    let mut uses: Vec<_> = uses.into_values().collect();
    // Stable: equal weights stay in the order of their names.
    uses.sort_by(|(_, one), (_, other)| other.weight.total_cmp(&one.weight));
    uses.truncate(limit);
    uses
}

fn images(record: &Record) -> impl Iterator<Item = ImageReference> + '_ {
    let copied = match &record.source {
        Source::Image(image) => Some(image.clone()),
        Source::Dockerfile(_) => None,
    };
    copied.into_iter().chain(record.bases.iter().filter_map(|base| base.reference.parse().ok()))
}

#[cfg(test)]
mod tests {
    use kiln_domain::id::{BuildId, ImageKey};
    use kiln_domain::run::Base;
    use kiln_domain::source::DockerfileSource;

    use super::*;

    const DAY: i64 = 24 * 60 * 60;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(seconds).unwrap()
    }

    fn build(finished: Option<i64>, bases: &[&str]) -> Record {
        let source = Source::Dockerfile(DockerfileSource {
            remote_uri: "https://git.test/a.git".into(),
            revision: String::new(),
            path: String::new(),
            context_path: String::new(),
            version: String::new(),
            build_args: BTreeMap::new(),
            target: String::new(),
            checkout_location: None,
            platform: None,
        });
        let id = BuildId::new(&ImageKey::of("r/t:x"), [1; 10]);
        let bases = bases.iter().map(|text| Base { reference: (*text).into(), digest: None }).collect();
        Record {
            finished_at: finished.map(at),
            bases,
            ..Record::accepted(id, "r/t:x".into(), "r/b:x".into(), source, "ann".into())
        }
    }

    fn names(builds: &[Record], limit: usize) -> Vec<String> {
        let used = most_used(builds.iter(), at(10 * DAY), Duration::from_secs(24 * 60 * 60), limit);
        used.into_iter().map(|(image, _)| image.to_string()).collect()
    }

    #[test]
    fn what_was_used_lately_comes_before_what_was_used_often_long_ago() {
        let old = build(Some(2 * DAY), &["r.io/old:1"]);
        let builds =
            [old.clone(), old.clone(), old.clone(), old, build(Some(9 * DAY), &["r.io/new:1", "r.io/new:1"])];
        assert_eq!(names(&builds, 9), ["r.io/new:1", "r.io/old:1"]);
        assert_eq!(names(&builds, 1), ["r.io/new:1"]);
        let used = most_used(builds.iter(), at(10 * DAY), Duration::from_secs(86_400), 9);
        let counts: Vec<_> = used.iter().map(|(_, used)| (used.builds, used.last)).collect();
        assert_eq!(
            counts,
            [(1, at(9 * DAY)), (4, at(2 * DAY))],
            "a base named twice in one build is used once"
        );
    }

    #[test]
    fn names_of_one_image_are_one_and_what_does_not_age_is_none() {
        let pinned = format!("r.io/x@sha256:{}", "0".repeat(64));
        let builds = [
            build(Some(DAY), &["docker.io/library/ubuntu", "ubuntu:latest", &pinned, "NOT/an image"]),
            build(None, &["r.io/of-a-running-build:1"]),
        ];
        let names = names(&builds, 9);
        assert_eq!(names.len(), 1, "{names:?}");
        assert!(names[0].ends_with("ubuntu:latest"), "{names:?}");
    }
}
