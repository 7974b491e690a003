//! How far the job is, for the next sign of life.

use std::sync::{Mutex, MutexGuard, PoisonError};

use concord_artaug::machine::{Estimate, Pace, Progress};
use concord_common::{Digest, Timestamp, telemetry::peak_rss_bytes};
use concord_proto::v1;

/// Digests of images that a progress carries.
const IMAGES: usize = 4;

/// The newest progress.
#[derive(Debug, Default)]
pub struct Board(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    pace: Pace,
    shown: v1::ArtaugProgress,
    last: Option<Progress>,
}

impl Board {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in where the job stands, the bytes kept, and images just made, the oldest first.
    pub fn note(&self, progress: &Progress, kept: u64, images: &[Digest], now: Timestamp) {
        let mut state = self.state();
        state.shown.bytes_kept = kept;
        for image in images {
            state.shown.last_images.insert(0, image.to_vec());
        }
        state.shown.last_images.truncate(IMAGES);
        state.show(progress, now);
    }

    /// A step of the training under way is done; the journal tells of checkpoints only.
    pub fn stepped(&self, step: u64, now: Timestamp) {
        let mut state = self.state();
        if let Some(last) = state.last {
            let done = step.max(last.done);
            state.show(&Progress { done, ..last }, now);
        }
    }

    /// What the next sign of life says.
    pub fn progress(&self) -> v1::ArtaugProgress {
        let mut shown = self.state().shown.clone();
        shown.peak_memory = peak_rss_bytes().unwrap_or(0);
        shown
    }
}

impl State {
    fn show(&mut self, progress: &Progress, now: Timestamp) {
        // Steps are told as they come, checkpoints of them afterwards.
        let before = self
            .last
            .filter(|last| (last.iteration, last.stage) == (progress.iteration, progress.stage));
        let progress = &Progress {
            done: before.map_or(0, |before| before.done).max(progress.done),
            ..*progress
        };
        let estimate = self.pace.note(progress, now);
        let shown = &mut self.shown;
        shown.iteration = progress.iteration;
        shown.iterations = progress.iterations;
        progress.stage.name().clone_into(&mut shown.stage);
        shown.done = progress.done;
        shown.total = progress.total;
        shown.per_second = estimate.map_or(0.0, |estimate| estimate.per_second);
        shown.remaining = estimate
            .and_then(|Estimate { remaining, .. }| remaining)
            .and_then(|remaining| prost_types::Duration::try_from(remaining).ok());
        self.last = Some(*progress);
    }
}

#[cfg(test)]
mod tests {
    use concord_artaug::machine::Stage;

    use super::*;

    #[test]
    fn progress_has_a_rate_the_last_images_and_the_peak_of_memory() {
        let board = Board::default();
        let at = |stage, done| Progress {
            iteration: 1,
            iterations: 3,
            stage,
            done,
            total: 100,
        };
        let images: Vec<Digest> = (0..6_u8).map(|number| Digest::of(&[number])).collect();
        board.note(&at(Stage::Generate, 0), 5, &images[..1], Timestamp(0));
        board.note(&at(Stage::Generate, 10), 9, &images[1..], Timestamp(5_000));
        let shown = board.progress();
        assert_eq!((shown.done, shown.total, shown.bytes_kept), (10, 100, 9));
        assert!((shown.per_second - 2.0).abs() < 1e-9);
        assert_eq!(shown.remaining.unwrap().seconds, 45);
        let newest: Vec<Vec<u8>> = images
            .iter()
            .rev()
            .take(4)
            .map(|image| image.to_vec())
            .collect();
        assert_eq!(shown.last_images, newest);
        assert!(shown.peak_memory > 0);

        board.note(&at(Stage::TrainFirst, 20), 9, &[], Timestamp(6_000));
        board.stepped(22, Timestamp(8_000));
        let shown = board.progress();
        assert_eq!((shown.stage.as_str(), shown.done), ("train-first", 22));
        assert!((shown.per_second - 1.0).abs() < 1e-9);
        // A step that is told late takes nothing back.
        board.stepped(3, Timestamp(9_000));
        assert_eq!(board.progress().done, 22);
        board.note(&at(Stage::TrainFirst, 20), 9, &[], Timestamp(9_500));
        assert_eq!(board.progress().done, 22);
    }
}
