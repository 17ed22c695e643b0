//! Compiles the `.proto` files: protox in place of protoc, so that nothing need be installed.

use prost::Message as _;

/// What the gateway serves.
const SERVED: [&str; 2] = ["kiln/v1/build.proto", "builder/imgbuilder.proto"];
/// What we ask of others.
const ASKED: [&str; 1] = ["wsman/core.proto"];

#[expect(clippy::disallowed_methods, reason = "a build script is configured by cargo, and answers it, so")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let out = std::path::PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    // For gRPC reflection.
    std::fs::write(out.join("descriptors.bin"), protox::compile(SERVED, ["."])?.encode_to_vec())?;
    for folder in ["builder", "contentservice", "kiln", "wsman"] {
        println!("cargo:rerun-if-changed={folder}");
    }
    tonic_prost_build::configure().compile_fds(protox::compile(SERVED.iter().chain(&ASKED), ["."])?)?;
    Ok(())
}
