//! What trainings drew on their way, as far as a gallery shows it.

use concord_common::Digest;

use super::*;
use crate::machine::{Sampled, Stage, Training};

fn sampled(iteration: u32, step: u64, images: Vec<Digest>) -> Event {
    Event::Sampled {
        iteration,
        training: Training::First,
        result: Sampled {
            step,
            images,
            forwards: 8,
        },
    }
}

/// Records four samples after each of the first 20 steps of the training under way.
fn record_samples(job: &mut JobFolder) {
    let iteration = job.machine().iteration();
    for step in 1..=20 {
        let png = picture(step).to_png().unwrap();
        let image = job.store_mut().put(&png).unwrap();
        let event = sampled(iteration, step.into(), vec![image; 4]);
        job.record(&event).unwrap();
        // Those of a step come once.
        assert!(job.machine().check(&event).is_err());
    }
}

fn shown_steps(curve: &Curve) -> Vec<u64> {
    assert!(curve.samples.iter().all(|(_, images)| images.len() == 4));
    curve.samples.iter().map(|(step, _)| *step).collect()
}

#[test]
fn a_gallery_shows_some_samples_of_every_training_and_the_last() {
    let folder = tempfile::tempdir().unwrap();
    let mut job = job_with_images_until(folder.path(), false, |machine| {
        machine.stage() == Stage::TrainFirst
    });
    record_samples(&mut job);
    assert!(job.machine().check(&sampled(1, 26, vec![])).is_err());
    drop(job);
    let job = job_with_images(folder.path(), false);
    let mut fetch = |digest| job.store().get(digest).ok();
    let gallery = Gallery::of_job(&job, "icons", vec![], Extent::default(), &mut fetch).unwrap();
    assert_eq!(shown_steps(&gallery.curves[0]), [3, 6, 10, 13, 16, 20]);
    assert_eq!(gallery.curves[0].sampled, 20);
    assert!(gallery.curves[1].samples.is_empty());
    check_nesting(&gallery.to_html().unwrap());
}

#[test]
fn the_newest_samples_are_shown_as_far_as_pictures_go_and_the_page_says_how_many_are_not() {
    let folder = tempfile::tempdir().unwrap();
    let stops: [fn(&Machine) -> bool; 3] = [
        |machine| machine.iteration() == 1 && machine.stage() == Stage::TrainFirst,
        |machine| machine.iteration() == 2 && machine.stage() == Stage::TrainFirst,
        |machine| machine.iteration() == 3 && machine.stage() == Stage::TrainFirst,
    ];
    for stop in stops {
        record_samples(&mut job_with_images_until(folder.path(), false, stop));
    }
    let job = job_with_images(folder.path(), false);
    let mut fetched = 0;
    let mut fetch = |digest| {
        fetched += 1;
        job.store().get(digest).ok()
    };
    let mut shown = |samples: usize| {
        let extent = Extent {
            kept: 0,
            rejected: 0,
            held_out: 0,
            samples,
            ..Extent::default()
        };
        Gallery::of_job(&job, "icons", vec![], extent, &mut fetch).unwrap()
    };
    // All six steps of the newest, two of the one before, and two pictures that are no whole step.
    let gallery = shown(6 * 4 + 2 * 4 + 2);
    let trainings = [0, 3, 6].map(|place| shown_steps(&gallery.curves[place]));
    assert_eq!(trainings[0], Vec::<u64>::new());
    assert_eq!(trainings[1], [10, 20]);
    assert_eq!(trainings[2], [3, 6, 10, 13, 16, 20]);
    assert_eq!(gallery.curves[8].name, "control on X', iteration 3");
    let html = gallery.to_html().unwrap();
    check_nesting(&html);
    for number in [0, 2, 6] {
        let said = format!("samples: showing {number} of 20<");
        assert_eq!(html.matches(&said).count(), 1, "{number}");
    }
    let bare = shown(0);
    assert!(bare.curves.iter().all(|curve| curve.samples.is_empty()));
    // What is not shown is not read either: nine curves each time, and the pictures of the first page.
    assert_eq!(fetched, 9 + 8 * 4 + 9);
}
