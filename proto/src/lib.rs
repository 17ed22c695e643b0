//! The public gRPC APIs, and those of Gitpod's services that we speak to, compiled from the `.proto` files beside this crate. Nothing here is written by hand.

/// `kiln.v1`: the native API.
#[allow(clippy::all, clippy::disallowed_methods, unreachable_pub, missing_docs, reason = "generated")]
pub mod kiln_v1 {
    tonic::include_proto!("kiln.v1");
}

/// `builder`: the API of Gitpod's image-builder-mk3.
#[allow(clippy::all, clippy::disallowed_methods, unreachable_pub, missing_docs, reason = "generated")]
pub mod builder {
    tonic::include_proto!("builder");
}

/// `contentservice`: the initializers of Gitpod's workspaces.
#[allow(clippy::all, clippy::disallowed_methods, unreachable_pub, missing_docs, reason = "generated")]
pub mod contentservice {
    tonic::include_proto!("contentservice");
}

/// `wsman`: Gitpod's ws-manager.
#[allow(clippy::all, clippy::disallowed_methods, unreachable_pub, missing_docs, reason = "generated")]
pub mod wsman {
    tonic::include_proto!("wsman");
}

/// The compiled descriptors of the APIs that the gateway serves, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
