//! Lets the programs and tests of this crate find libtorch without `LD_LIBRARY_PATH`.

use std::{env, fs};

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // Exported by torch-sys (`links = "tch"`) to its direct dependents; absent only when nothing is linked (`tch/doc-only`).
    let Ok(folder) = env::var("DEP_TCH_LIBTORCH_LIB") else {
        return;
    };
    // The folder itself, not the link `deploy/libtorch/current`: a binary must survive the removal of the checkout.
    let folder = fs::canonicalize(&folder)
        .unwrap_or_else(|error| panic!("libtorch's folder {folder}: {error}"));
    // An installed package brings its libtorch along: <prefix>/bin/concord-client, <prefix>/lib/concord/libtorch_cpu.so.
    println!("cargo:rustc-link-arg=-Wl,-rpath,$ORIGIN/../lib/concord");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", folder.display());
}
