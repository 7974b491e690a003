//! Lets the programs and tests of this crate find libtorch without `LD_LIBRARY_PATH`.

use std::{env, fs, path::Path};

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // Exported by torch-sys (`links = "tch"`) to its direct dependents; absent only when nothing is linked (`tch/doc-only`).
    let Ok(folder) = env::var("DEP_TCH_LIBTORCH_LIB") else {
        println!("cargo:rustc-env=CONCORD_LIBTORCH=none");
        return;
    };
    // The folder itself, not the link `deploy/libtorch/current`: a binary must survive the removal of the checkout.
    let folder = fs::canonicalize(&folder)
        .unwrap_or_else(|error| panic!("libtorch's folder {folder}: {error}"));
    // An installed package brings its libtorch along: <prefix>/bin/concord-client, <prefix>/lib/concord/libtorch_cpu.so.
    println!("cargo:rustc-link-arg=-Wl,-rpath,$ORIGIN/../lib/concord");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", folder.display());
    println!(
        "cargo:rustc-env=CONCORD_LIBTORCH={}",
        version(folder.parent().unwrap_or(&folder))
    );
}

/// The version of a libtorch, as its own files have it: `build-version`, or `version.py` in a Python package.
fn version(libtorch: &Path) -> String {
    let of = |file: &str, prefix: &str| {
        let text = fs::read_to_string(libtorch.join(file)).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix(prefix))?;
        let version = line.trim().trim_matches(['\'', '"']).to_owned();
        (!version.is_empty()).then_some(version)
    };
    of("build-version", "")
        .or_else(|| of("version.py", "__version__ = "))
        .unwrap_or_else(|| "unknown".to_owned())
}
