//! How a service starts, lives and stops: signals, the service manager, and an orderly end.

mod notify;

use std::{future::Future, io, time::Duration};

use futures::Stream;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    task::JoinHandle,
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use self::notify::Notifier;

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
}

/// A service's tasks and the two ways to stop them. Clones speak of the same service.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    soft: CancellationToken,
    hard: CancellationToken,
    tasks: TaskTracker,
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
