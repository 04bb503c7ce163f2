//! Turns proto/ into Rust, without protoc.

#![allow(clippy::print_stdout)] // How a build script speaks to cargo.

use std::path::PathBuf;

use protox::prost::Message;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = [
        "activation",
        "admin",
        "common",
        "generation",
        "monitor",
        "policy",
        "probe",
    ]
    .map(|name| format!("inwit/v1/{name}.proto"));
    println!("cargo:rerun-if-changed=proto");
    // The shipped library is embedded.
    println!("cargo:rerun-if-changed=probes/library");

    let descriptors = protox::compile(files, ["proto"])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?).join("inwit_descriptor.bin");
    // Reflection serves these bytes.
    std::fs::write(out, descriptors.encode_to_vec())?;

    tonic_prost_build::configure()
        .bytes(".")
        .codec_path("crate::rpc::codec::Codec")
        .compile_fds(descriptors)?;
    Ok(())
}
