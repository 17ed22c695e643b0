//! The public gRPC API, compiled from the `.proto` files beside this crate. Nothing here is written by hand.

/// `kiln.v1`: the native API.
#[allow(clippy::all, clippy::disallowed_methods, unreachable_pub, missing_docs, reason = "generated")]
pub mod kiln_v1 {
    tonic::include_proto!("kiln.v1");
}

/// The compiled descriptors of every file, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
