//! Compiles the `.proto` files: protox in place of protoc, so that nothing need be installed.

use prost::Message as _;

const FILES: [&str; 2] = ["kiln/v1/build.proto", "builder/imgbuilder.proto"];

#[expect(clippy::disallowed_methods, reason = "a build script is configured by cargo, and answers it, so")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let descriptors = protox::compile(FILES, ["."])?;
    let out = std::path::PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    // For gRPC reflection.
    std::fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    for folder in ["builder", "contentservice", "kiln"] {
        println!("cargo:rerun-if-changed={folder}");
    }
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
