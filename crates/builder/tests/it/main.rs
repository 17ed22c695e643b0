//! The builder by itself: a run's folder in, an outcome and an image out. Real git, buildah and registry.

mod bad_input;
mod builds;
mod credentials;
mod registries;
mod run;
mod stops;
