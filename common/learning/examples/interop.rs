//! Compares a backbone with a reference file made by `deploy/interop`, in f32 and in f64; fails beyond the promised bounds.
//!
//! `cargo run -p concord-learning --example interop -- BACKBONE_FOLDER REFERENCE_FILE`

use std::{
    env,
    path::{Path, PathBuf},
    process::ExitCode,
};

use concord_learning::{
    LearningError,
    backbone::Backbone,
    reference::{Bounds, Reference},
};
use tch::Kind;

fn main() -> ExitCode {
    let arguments: Vec<PathBuf> = env::args_os().skip(1).map(PathBuf::from).collect();
    let [folder, file] = arguments.as_slice() else {
        eprintln!("usage: interop BACKBONE_FOLDER REFERENCE_FILE");
        return ExitCode::from(2);
    };
    match compare(folder, file) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn compare(folder: &Path, file: &Path) -> Result<bool, LearningError> {
    let reference = Reference::read(file)?;
    let mut good = true;
    for (kind, bounds) in [(Kind::Float, Bounds::F32), (Kind::Double, Bounds::F64)] {
        let backbone = Backbone::load(folder, kind)?;
        let found = reference.compare(&backbone)?;
        let verdict = if found.within(bounds) {
            "good"
        } else {
            "TOO FAR"
        };
        println!(
            "{kind:?}: forward {:.1e} (bound {:.0e}), gradient {:.1e} (bound {:.0e}, largest in {}): {verdict}",
            found.forward, bounds.forward, found.gradient, bounds.gradient, found.worst_parameter,
        );
        good &= found.within(bounds);
    }
    Ok(good)
}
