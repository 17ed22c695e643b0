//! Which images are kept warm: those of the list, and those that builds used; looked at anew from time to time.

use std::collections::{BTreeMap, HashMap};

use jiff::Timestamp;
use kiln_bus::view::View;
use kiln_domain::record::Record;
use kiln_domain::reference::ImageReference;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::Config;
use crate::metrics::Image;
use crate::shelf::Kept;
use crate::used::most_used;
use crate::warm::{Means, Warm};

/// Finished builds that are looked at for the images that they used.
pub(crate) const BUILDS_LOOKED_AT: usize = 2_000;

/// The tasks that keep images warm, one for each.
pub(crate) struct Choice<'a> {
    config: &'a Config,
    means: &'a Means,
    kept: HashMap<String, CancellationToken>,
    tasks: TaskTracker,
}

impl<'a> Choice<'a> {
    pub(crate) fn new(config: &'a Config, means: &'a Means) -> Self {
        Self { config, means, kept: HashMap::new(), tasks: TaskTracker::new() }
    }

    /// Keeps the chosen images warm until `stop`.
    pub(crate) async fn keep(mut self, view: &View, stop: &CancellationToken) {
        // The list needs no journal: it is kept warm from the first moment.
        self.choose(&[], stop);
        if self.config.used_images > 0 {
            let looking = async {
                view.caught_up().await;
                loop {
                    let finished = |record: &Record| record.state.is_terminal();
                    let builds = view.newest(None, |entry| finished(&entry.record), BUILDS_LOOKED_AT);
                    let records: Vec<&Record> = builds.iter().map(|(_, entry)| &entry.record).collect();
                    self.choose(&records, stop);
                    tokio::time::sleep(self.config.used_interval()).await;
                }
            };
            stop.run_until_cancelled(looking).await;
        }
        stop.cancelled().await;
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Begins with the images that are new, and ends with those that are no longer chosen.
    fn choose(&mut self, builds: &[&Record], stop: &CancellationToken) {
        let wanted = self.wanted(builds);
        self.means.shelf.hold(wanted.iter().map(|(name, (_, kept))| (name.clone(), kept.clone())).collect());
        self.kept.retain(|name, task| {
            let stays = wanted.contains_key(name);
            if !stays {
                task.cancel();
                self.means.metrics.forget(&Image { reference: name.clone() });
            }
            stays
        });
        let new: Vec<_> = wanted.iter().filter(|(name, _)| !self.kept.contains_key(*name)).collect();
        let count = u32::try_from(new.len()).unwrap_or(u32::MAX);
        for (place, (name, (reference, kept))) in (0..).zip(new) {
            let image = Warm::new(self.config, reference.clone(), kept.configured.is_some(), self.means);
            let task = stop.child_token();
            self.tasks.spawn(task.clone().run_until_cancelled_owned(image.keep(place, count)));
            self.kept.insert(name.clone(), task);
        }
    }

    fn wanted(&self, builds: &[&Record]) -> BTreeMap<String, (ImageReference, Kept)> {
        let mut wanted: BTreeMap<String, (ImageReference, Kept)> = BTreeMap::new();
        // What can't be parsed was refused at the start.
        let listed = self.config.refs.iter().filter_map(|text| text.parse::<ImageReference>().ok());
        for (place, reference) in listed.enumerate() {
            let entry = wanted.entry(reference.to_string()).or_insert((reference, Kept::default()));
            entry.1.configured.get_or_insert(place);
        }
        let half_life = self.config.used_half_life();
        let used = most_used(builds.iter().copied(), now(), half_life, self.config.used_images);
        for (place, (reference, used)) in used.into_iter().enumerate() {
            let entry = wanted.entry(reference.to_string()).or_insert((reference, Kept::default()));
            entry.1.used = Some((place, used));
        }
        wanted
    }
}

#[expect(clippy::disallowed_methods, reason = "a build's age is counted from the stream's wall-clock time")]
fn now() -> Timestamp {
    Timestamp::now()
}
