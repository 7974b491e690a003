//! What goes on while images are drawn.

use super::*;
use crate::testing::Overlap;

/// The first answer, score and write are given only once the second batch is begun, and that is drawn only once they are asked for.
#[test]
fn advising_scoring_and_writing_go_on_while_images_are_drawn() {
    let overlap = Arc::new(Overlap::default());
    let server = Arc::new(FakeServer::new(SPEC));
    server.state().overlap = Some(Arc::clone(&overlap));
    let folder = tempfile::tempdir().unwrap();
    let mut worker = worker(&server, folder.path());
    worker.workshop = Box::new(FakeWorkshop {
        overlap: Some(Arc::clone(&overlap)),
        ..FakeWorkshop::default()
    });
    worker.run();
    succeeded(&server);
    assert!(overlap.took_place(), "{overlap:?}");
    assert_eq!(
        server.lasting_results(),
        undisturbed(SPEC).lasting_results()
    );
}
