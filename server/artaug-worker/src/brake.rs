//! Why work on a job stops, and how everyone who works on it hears of that.

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use concord_artaug::{
    endpoint::Until,
    engine::{EngineError, Go},
};
use tokio::{sync::watch, time};

/// Why work on a job stops before the job is finished. The later in this list, the more it outweighs the others.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Halt {
    /// The worker is told to stop.
    #[error("the worker stops")]
    Stop,
    /// An operator paused the job.
    #[error("the job is paused")]
    Pause,
    /// Something that the job needs cannot be had now, or not on this worker: it goes on later, or elsewhere.
    #[error("{0}")]
    Trouble(String),
    /// The job cannot be finished.
    #[error("{0}")]
    Failed(String),
    /// Another worker may have the job: nothing may be written any more.
    #[error("the lease is lost: {0}")]
    Lost(String),
    /// An operator cancelled the job. With that the lease is lost too, so what is told of that in the same moment says less.
    #[error("the job is cancelled")]
    Cancel,
}

impl Halt {
    /// Whether what is under way may be brought to an end and kept.
    pub fn is_gentle(&self) -> bool {
        matches!(self, Self::Stop | Self::Pause)
    }

    /// A failure with what could not be done.
    pub fn failed(error: impl std::fmt::Display) -> Self {
        Self::Failed(error.to_string())
    }
}

/// The brake of one job: pulled once, by whoever has a reason; looked at by all who work.
#[derive(Debug)]
pub struct Brake {
    state: Mutex<State>,
    pulled: Condvar,
    /// When what is under way is dropped, for those who wait elsewhere.
    dropped: watch::Sender<Option<time::Instant>>,
    /// How long a gentle halt waits for what is under way.
    patience: Duration,
}

#[derive(Debug, Default)]
struct State {
    halt: Option<(Halt, Instant)>,
    /// What is done already is put down.
    saving: bool,
    over: bool,
}

impl Brake {
    /// A brake that nobody has pulled.
    pub fn new(patience: Duration) -> Self {
        Self {
            state: Mutex::default(),
            pulled: Condvar::new(),
            dropped: watch::Sender::new(None),
            patience,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Pulls it; the weightiest reason stays, of equal ones the first.
    pub fn pull(&self, halt: Halt) {
        let mut state = self.state();
        match &mut state.halt {
            Some((known, _)) if rank(known) >= rank(&halt) => {}
            // The patience counts from the first.
            Some((known, _)) => *known = halt,
            none => *none = Some((halt, Instant::now())),
        }
        self.pulled.notify_all();
        let at = state.halt.as_ref().and_then(|halt| self.dropped_at(halt));
        self.dropped.send_replace(at.map(time::Instant::from_std));
    }

    /// When what is under way is dropped.
    fn dropped_at(&self, (halt, since): &(Halt, Instant)) -> Option<Instant> {
        if halt.is_gentle() {
            since.checked_add(self.patience)
        } else {
            Some(*since)
        }
    }

    /// How long calls may go on that wait for somebody elsewhere, and cannot ask [`Brake::go`] meanwhile.
    pub fn until(&self) -> Until {
        Until::new(self.dropped.subscribe())
    }

    /// Why work stops, if it does.
    pub fn halt(&self) -> Option<Halt> {
        self.state().halt.as_ref().map(|(halt, _)| halt.clone())
    }

    /// Between two pieces of work.
    ///
    /// # Errors
    /// The reason, if it is pulled.
    pub fn check(&self) -> Result<(), Halt> {
        self.halt().map_or(Ok(()), Err)
    }

    /// In the middle of a piece of work: a stop and a pause let it end for a while.
    pub fn go(&self) -> Go {
        let state = self.state();
        let Some((halt, since)) = &state.halt else {
            return Go::On;
        };
        let waits = state.saving || since.elapsed() < self.patience;
        if halt.is_gentle() && waits {
            Go::On
        } else {
            Go::Stop
        }
    }

    /// Puts down what is done already: a stop and a pause wait for that even if they wait for nothing else any more. By one thread at a time.
    pub fn save_first<T>(&self, save: impl FnOnce() -> T) -> T {
        self.state().saving = true;
        let saved = save();
        self.state().saving = false;
        saved
    }

    /// In the middle of a piece of work, for those who do not ask [`Brake::go`].
    ///
    /// # Errors
    /// The reason, if the piece of work is to be dropped.
    pub fn check_now(&self) -> Result<(), Halt> {
        match self.go() {
            Go::On => Ok(()),
            Go::Stop => self.check(),
        }
    }

    /// What an engine's error means for the job.
    pub fn of_engine(&self, error: EngineError) -> Halt {
        match error {
            EngineError::Stopped => self
                .halt()
                .unwrap_or_else(|| Halt::failed("the engine stopped by itself")),
            EngineError::Local(what) => Halt::Trouble(format!(
                "{what}; see to the disk, the file system or the memory of this worker, or let another one take the job"
            )),
            error @ (EngineError::Unusable(_) | EngineError::Failed(_)) => Halt::failed(error),
        }
    }

    /// Waits, at most until the brake is pulled.
    ///
    /// # Errors
    /// The reason, if it is.
    pub fn wait(&self, time: Duration) -> Result<(), Halt> {
        let state = self.state();
        let (state, _) = self
            .pulled
            .wait_timeout_while(state, time, |state| state.halt.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        match &state.halt {
            Some((halt, _)) => Err(halt.clone()),
            None => Ok(()),
        }
    }

    /// Work on the job has ended; those who [`Brake::wait_for_end`] are let go.
    pub fn end(&self) {
        self.state().over = true;
        self.pulled.notify_all();
    }

    /// Waits, at most until the work has ended; true if it has.
    pub fn wait_for_end(&self, time: Duration) -> bool {
        let state = self.state();
        let (state, _) = self
            .pulled
            .wait_timeout_while(state, time, |state| !state.over)
            .unwrap_or_else(PoisonError::into_inner);
        state.over
    }
}

/// The place in the list.
fn rank(halt: &Halt) -> u8 {
    match halt {
        Halt::Stop => 0,
        Halt::Pause => 1,
        Halt::Trouble(_) => 2,
        Halt::Failed(_) => 3,
        Halt::Lost(_) => 4,
        Halt::Cancel => 5,
    }
}

/// The worker's own stop: SIGTERM pulls the brake of the job in hand, and nothing new is begun.
#[derive(Debug, Default)]
pub struct Stop {
    state: Mutex<Stopping>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Stopping {
    told: bool,
    job: Option<Arc<Brake>>,
}

impl Stop {
    fn state(&self) -> MutexGuard<'_, Stopping> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the worker to stop.
    pub fn tell(&self) {
        let mut state = self.state();
        state.told = true;
        if let Some(job) = &state.job {
            job.pull(Halt::Stop);
        }
        self.changed.notify_all();
    }

    /// Whether the worker is told to stop.
    pub fn is_told(&self) -> bool {
        self.state().told
    }

    /// A job is in hand.
    pub fn take_up(&self, brake: &Arc<Brake>) {
        let mut state = self.state();
        if state.told {
            brake.pull(Halt::Stop);
        }
        state.job = Some(Arc::clone(brake));
    }

    /// No job is in hand any more.
    pub fn put_down(&self) {
        self.state().job = None;
    }

    /// Waits, at most until a stop; true if there is one.
    pub fn wait(&self, time: Duration) -> bool {
        let state = self.state();
        let (state, _) = self
            .changed
            .wait_timeout_while(state, time, |state| !state.told)
            .unwrap_or_else(PoisonError::into_inner);
        state.told
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_weightiest_reason_stays() {
        let brake = Brake::new(Duration::from_hours(1));
        assert_eq!((brake.halt(), brake.go()), (None, Go::On));
        brake.pull(Halt::Stop);
        brake.pull(Halt::Pause);
        brake.pull(Halt::Stop);
        assert_eq!(brake.halt(), Some(Halt::Pause));
        // What is under way may end.
        assert_eq!(brake.go(), Go::On);
        assert!(brake.check().is_err() && brake.check_now().is_ok());
        brake.pull(Halt::Lost("taken".to_owned()));
        brake.pull(Halt::Lost("again".to_owned()));
        assert_eq!(brake.halt(), Some(Halt::Lost("taken".to_owned())));
        assert_eq!(brake.go(), Go::Stop);
        brake.pull(Halt::Cancel);
        brake.pull(Halt::Lost("taken".to_owned()));
        assert_eq!(brake.halt(), Some(Halt::Cancel));
    }

    #[test]
    fn patience_ends() {
        let brake = Brake::new(Duration::ZERO);
        brake.pull(Halt::Stop);
        assert_eq!(brake.go(), Go::Stop);
        assert_eq!(brake.of_engine(EngineError::Stopped), Halt::Stop);
    }

    #[test]
    fn what_is_done_is_put_down_though_patience_has_ended_unless_it_may_not_be() {
        let brake = Brake::new(Duration::ZERO);
        brake.pull(Halt::Pause);
        assert_eq!(brake.save_first(|| brake.check_now()), Ok(()));
        assert_eq!(brake.check_now(), Err(Halt::Pause));
        brake.pull(Halt::Cancel);
        assert_eq!(brake.save_first(|| brake.check_now()), Err(Halt::Cancel));
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_elsewhere_goes_on_until_the_patience_ends_and_no_longer_if_the_lease_is_lost() {
        let within = async |until: &Until, minutes| {
            let come = time::timeout(Duration::from_mins(minutes), until.come());
            come.await.is_ok()
        };
        for halt in [Halt::Cancel, Halt::Lost("taken".to_owned())] {
            let brake = Brake::new(Duration::from_hours(1));
            let until = brake.until();
            brake.pull(Halt::Stop);
            brake.pull(halt);
            assert!(within(&until, 1).await);
        }
        let brake = Brake::new(Duration::from_hours(1));
        let until = brake.until();
        assert!(!within(&until, 0).await);
        brake.pull(Halt::Pause);
        assert!(!within(&until, 50).await);
        // One that is begun only now has the same time.
        assert!(within(&brake.until(), 20).await && within(&until, 0).await);
    }

    #[test]
    fn what_only_this_machine_cannot_do_holds_the_job_up_and_what_no_engine_could_fails_it() {
        let brake = Brake::new(Duration::ZERO);
        let stale = "/models/m/unet: Stale file handle".to_owned();
        let Halt::Trouble(reason) = brake.of_engine(EngineError::Local(stale.clone())) else {
            panic!("it ends the job")
        };
        assert!(reason.starts_with(&stale), "{reason}");
        for error in [
            EngineError::Unusable("no number".to_owned()),
            EngineError::Failed("no convergence".to_owned()),
        ] {
            let text = error.to_string();
            assert_eq!(brake.of_engine(error), Halt::Failed(text));
        }
    }

    #[test]
    fn a_stop_pulls_the_brake_of_the_job_in_hand_and_of_the_next() {
        let stop = Stop::default();
        let first = Arc::new(Brake::new(Duration::ZERO));
        stop.take_up(&first);
        assert!(first.check().is_ok() && !stop.wait(Duration::ZERO));
        stop.tell();
        assert_eq!(first.halt(), Some(Halt::Stop));
        assert!(stop.wait(Duration::from_hours(1)));
        let next = Arc::new(Brake::new(Duration::ZERO));
        stop.take_up(&next);
        assert_eq!(next.wait(Duration::from_hours(1)), Err(Halt::Stop));
    }
}
