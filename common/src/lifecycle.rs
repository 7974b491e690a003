//! How a service starts, lives and stops: signals, the service manager, and an orderly end.

mod heartbeat;
mod notify;

use std::{
    any::Any,
    fmt,
    future::Future,
    io,
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use futures::{FutureExt as _, Stream};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    task::JoinHandle,
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use self::{heartbeat::Heartbeat, notify::Notifier};

/// What tasks that were told to stop at once still get, to let go of their files.
const HARD_GRACE: Duration = Duration::from_secs(1);

/// How a service came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopOutcome {
    /// Every task ended by itself.
    Clean,
    /// Tasks were still running at the deadline and were told to stop at once.
    DeadlinePassed,
    /// A second signal told the rest to stop at once.
    Forced,
    /// A task that the service cannot do without has ended before its time; see [`Shutdown::spawn_critical`].
    TaskFailed,
}

impl StopOutcome {
    /// Whether the program ends with exit code 0: it was told to stop and did, even if some tasks took too long. False
    /// means exit code 1.
    pub fn is_success(self) -> bool {
        matches!(self, Self::Clean | Self::DeadlinePassed)
    }
}

/// How a task ended, as far as [`Shutdown::spawn_critical`] cares: with a fault to tell, or simply.
pub trait TaskEnd {
    /// What went wrong, if something did.
    fn fault(self) -> Option<String>;
}

impl TaskEnd for () {
    fn fault(self) -> Option<String> {
        None
    }
}

impl<E: fmt::Display> TaskEnd for Result<(), E> {
    fn fault(self) -> Option<String> {
        self.err().map(|error| error.to_string())
    }
}

/// A service's tasks and the two ways to stop them. Clones speak of the same service.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    soft: CancellationToken,
    hard: CancellationToken,
    tasks: TaskTracker,
    health: Arc<Health>,
}

/// What is known of the tasks that the service cannot do without.
#[derive(Debug, Default)]
struct Health {
    /// The first that ended before its time.
    failed: OnceLock<&'static str>,
    hearts: Mutex<Vec<Heartbeat>>,
}

impl Health {
    fn hearts(&self) -> MutexGuard<'_, Vec<Heartbeat>> {
        self.hearts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shutdown {
    /// A service without tasks that is not stopping.
    pub fn new() -> Self {
        Self::default()
    }

    /// Cancelled when the service is to finish what it has and take nothing new.
    pub fn token(&self) -> CancellationToken {
        self.soft.clone()
    }

    /// Cancelled when the service is to drop everything.
    pub fn hard_token(&self) -> CancellationToken {
        self.hard.clone()
    }

    /// The tasks that a stop waits for.
    pub fn tasks(&self) -> &TaskTracker {
        &self.tasks
    }

    /// Runs `task` as one that a stop waits for.
    pub fn spawn<F>(&self, task: F) -> JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        self.tasks.spawn(task)
    }

    /// Runs a task that the service cannot do without. If it ends or panics before a stop has begun, that is logged, the
    /// service stops in good order, and [`Self::stop`] gives [`StopOutcome::TaskFailed`], with which the program must end
    /// with exit code 1.
    pub fn spawn_critical<F>(&self, name: &'static str, task: F)
    where
        F: Future + Send + 'static,
        F::Output: TaskEnd,
    {
        let shutdown = self.clone();
        // What the task shares with others is not used after it: the service ends.
        let task = AssertUnwindSafe(task).catch_unwind();
        self.tasks.spawn(async move {
            let fault = match task.await {
                Ok(end) => end.fault(),
                Err(panic) => Some(format!("it panicked: {}", message_of(panic.as_ref()))),
            };
            if shutdown.is_stopping() {
                if let Some(error) = fault {
                    tracing::warn!(
                        task = name,
                        error,
                        "a task failed while the service was stopping"
                    );
                }
                return;
            }
            let error = fault.as_deref().unwrap_or("it ended by itself");
            tracing::error!(
                task = name,
                error,
                "a task that the service cannot do without has ended; stopping"
            );
            let _ = shutdown.health.failed.set(name);
            shutdown.begin();
        });
    }

    /// The first task of [`Self::spawn_critical`] that ended before its time.
    pub fn failed_task(&self) -> Option<&'static str> {
        self.health.failed.get().copied()
    }

    /// A heart for a main loop, which [`Self::stuck`] listens to from now on.
    pub fn heartbeat(&self, name: &'static str, allowance: Duration) -> Heartbeat {
        let heart = Heartbeat::new(name, allowance);
        self.health.hearts().push(heart.clone());
        heart
    }

    /// The name of a loop that has not beaten for longer than it was allowed. None once a stop has begun: the loops then
    /// end, and the stop has a deadline of its own.
    pub fn stuck(&self) -> Option<&'static str> {
        if self.is_stopping() {
            return None;
        }
        let hearts = self.health.hearts();
        hearts
            .iter()
            .find(|heart| !heart.is_alive())
            .map(Heartbeat::name)
    }

    /// Pings the service manager for as long as no loop is [`Self::stuck`], until tasks are told to drop everything.
    /// Returns at once if nobody watches.
    pub async fn watchdog(&self, notifier: &Notifier) {
        notifier
            .watchdog(|| self.stuck().is_none(), self.hard_token())
            .await;
    }

    /// Begins an orderly stop; for instance when a task that the service cannot do without has failed.
    pub fn begin(&self) {
        self.soft.cancel();
    }

    /// Whether a stop has begun.
    pub fn is_stopping(&self) -> bool {
        self.soft.is_cancelled()
    }

    /// Begins an orderly stop if none has begun, and waits for the tasks; after `deadline`, or as soon as `force` is ready,
    /// they are told to drop everything.
    pub async fn stop(&self, deadline: Duration, force: impl Future<Output = ()>) -> StopOutcome {
        self.soft.cancel();
        self.tasks.close();
        let outcome = tokio::select! {
            biased;
            () = self.tasks.wait() => StopOutcome::Clean,
            () = force => StopOutcome::Forced,
            () = tokio::time::sleep(deadline) => StopOutcome::DeadlinePassed,
        };
        if outcome != StopOutcome::Clean {
            tracing::warn!(?outcome, tasks = self.tasks.len(), "stopping at once");
            self.hard.cancel();
            // Tasks that do not heed even that end with the runtime.
            let _ = timeout(HARD_GRACE, self.tasks.wait()).await;
        }
        if self.failed_task().is_some() {
            return StopOutcome::TaskFailed;
        }
        outcome
    }

    /// Waits for SIGTERM, SIGINT or [`Self::begin`], tells the service manager, and stops: in good order within `deadline`,
    /// at once on a second signal. For the end of `main`.
    ///
    /// # Errors
    /// If the signals cannot be listened for.
    pub async fn run_until_stopped(
        &self,
        deadline: Duration,
        notifier: &Notifier,
    ) -> io::Result<StopOutcome> {
        let mut signals = StopSignals::new()?;
        tokio::select! {
            name = signals.next() => tracing::info!(signal = name, "stopping"),
            () = self.soft.cancelled() => tracing::info!("stopping"),
        }
        notifier.stopping();
        let force = async {
            let name = signals.next().await;
            tracing::warn!(signal = name, "stopping at once on a second signal");
        };
        let outcome = self.stop(deadline, force).await;
        tracing::info!(?outcome, "stopped");
        Ok(outcome)
    }
}

/// What a panic said.
fn message_of(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("without a message")
}

/// SIGTERM and SIGINT. From its making on, neither ends the process by itself.
#[derive(Debug)]
pub struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignals {
    /// Begins to listen.
    ///
    /// # Errors
    /// If the system does not allow it.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// The next signal's name.
    pub async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// Waits for SIGTERM or SIGINT and tells which one came; for commands that need no orderly stop.
///
/// # Errors
/// If the signals cannot be listened for.
pub async fn wait_for_signal() -> io::Result<&'static str> {
    Ok(StopSignals::new()?.next().await)
}

/// One item for each SIGHUP, the sign to read certificates anew. Never ends.
///
/// # Errors
/// If the signal cannot be listened for.
pub fn reload_signals() -> io::Result<impl Stream<Item = ()> + Send + Unpin> {
    let hangup = signal(SignalKind::hangup())?;
    Ok(Box::pin(futures::stream::unfold(
        hangup,
        |mut hangup| async move {
            hangup.recv().await?;
            Some(((), hangup))
        },
    )))
}

#[cfg(test)]
mod tests;
