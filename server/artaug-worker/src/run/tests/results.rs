//! Results, and the files below the job's folder in which they are put together.

use std::{fs, path::PathBuf};

use concord_common::job::artaug::ArtaugSpec;

use super::{
    held_up::{begun, was_held_up},
    *,
};
use crate::stages::Parts;

#[test]
fn results_are_put_together_below_the_jobs_own_folder() {
    let server = Arc::new(FakeServer::new(SPEC));
    let folder = tempfile::tempdir().unwrap();
    let mut worker = worker(&server, folder.path());
    let workshop = FakeWorkshop::default();
    let told = Arc::clone(&workshop.told);
    worker.workshop = Box::new(workshop);
    worker.run();
    succeeded(&server);
    let own = folder.path().join("jobs/job-1");
    let folders = &told.lock().unwrap().folders;
    let names = folders
        .iter()
        .map(|below| below.strip_prefix(&own).unwrap());
    let names: BTreeSet<&Path> = names.collect();
    assert_eq!(names, BTreeSet::from(["exports", "fused"].map(Path::new)));
}

#[test]
fn what_a_kill_left_of_results_is_removed_when_the_job_is_taken_up_again() {
    let server = begun(30);
    let folder = tempfile::tempdir().unwrap();
    let left = ["exports", "fused"].map(|name| folder.path().join("jobs/job-1").join(name));
    for folder in &left {
        fs::create_dir_all(folder.join("unet")).unwrap();
        fs::write(folder.join("unet/half"), "half").unwrap();
    }
    let mut bare = worker(&server, folder.path());
    bare.workshop = Box::new(FakeWorkshop {
        is_bare: true,
        ..FakeWorkshop::default()
    });
    bare.run();
    assert!(left.iter().all(|folder| !folder.exists()));
    was_held_up(&server, "[allowed.endpoints.vision]");
}

#[test]
fn a_full_disk_holds_the_job_up_and_is_not_kept_full() {
    for (fault, name) in [
        ("no room for exports", "exports"),
        ("no room for all", "fused"),
    ] {
        let server = Arc::new(FakeServer::new(SPEC));
        server.state().grants = 1;
        let folder = tempfile::tempdir().unwrap();
        let mut full = worker(&server, folder.path());
        full.workshop = faulty(fault);
        full.run();
        let own = folder.path().join("jobs/job-1");
        assert!(own.join("journal.jsonl").exists());
        assert!(!own.join(name).exists());
        was_held_up(&server, "no storage space");
    }
}

/// A workshop on a machine that loses the manifest of the first iteration in the second.
struct Forgetful {
    inner: FakeWorkshop,
    server: Arc<FakeServer>,
    manifest: PathBuf,
}

impl Workshop for Forgetful {
    fn parts(&self, spec: &ArtaugSpec, brake: &Brake) -> Result<Parts, PartsError> {
        let mut parts = self.inner.parts(spec, brake)?;
        let (server, manifest) = (Arc::clone(&self.server), self.manifest.clone());
        // The base is looked at whenever a model is made from it.
        parts.tools.base = Box::new(move || {
            if !events(&server, "decided").is_empty() {
                let _ = fs::remove_file(&manifest);
            }
            Ok(Vec::new())
        });
        Ok(parts)
    }
}

#[test]
fn a_file_of_the_record_that_cannot_be_read_holds_the_job_up() {
    let server = Arc::new(FakeServer::new(SPEC));
    server.state().grants = 1;
    let folder = tempfile::tempdir().unwrap();
    let mut forgetful = worker(&server, folder.path());
    forgetful.workshop = Box::new(Forgetful {
        inner: FakeWorkshop::default(),
        server: Arc::clone(&server),
        manifest: folder.path().join("jobs/job-1/manifest-1.jsonl"),
    });
    forgetful.run();
    assert_eq!(events(&server, "decided").len(), 2);
    was_held_up(&server, "manifest-1.jsonl");
}
