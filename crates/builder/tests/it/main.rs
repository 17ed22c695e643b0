//! The builder by itself: a run's folder in, an outcome and an image out. Real git, buildah, BuildKit and registry.

mod bad_input;
mod base_images;
mod buildkit;
mod buildkit_daemon;
mod builds;
mod corpus;
mod credentials;
mod layer_cache;
mod mirrors;
mod platforms;
mod registries;
mod reproducible;
mod run;
mod stops;
