//! Compiles the .proto files with protox, so that no `protoc` is needed.

use std::{env, fs, path::PathBuf};

use prost::Message as _;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = [
        "proto/concord/v1/types.proto",
        "proto/concord/v1/federation.proto",
        "proto/concord/v1/operator.proto",
        "proto/concord/v1/worker.proto",
    ];
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(files, ["proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("concord.v1.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .bytes(".concord.v1.Chunk.data")
        .codec_path("crate::codec::SizedCodec")
        .compile_fds(descriptors)?;
    Ok(())
}
