//! Where torch work runs: one OS thread, the settings of libtorch, and repeatable random draws.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Mutex, PoisonError},
    thread::JoinHandle,
};

use tch::{Kind, Tensor};
// Only channels are used; nothing in this crate is async except waiting for a job.
use tokio::sync::{mpsc, oneshot};

use crate::error::LearningError;

/// Jobs that may wait for the thread; more callers than that wait for a place.
const QUEUE: usize = 8;

/// Autograd and libtorch's own code are at home on the main thread's usual stack size.
const STACK_BYTES: usize = 8 << 20;

type Job = Box<dyn FnOnce() + Send>;

/// How libtorch may use the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TorchSettings {
    /// Threads that one operation may use. On small tensors one thread can beat two.
    pub intra_op_threads: usize,
}

/// The OS thread that owns all torch work of a process. Jobs run one after another, in the order they were queued.
///
/// A panic in a job becomes an error of that job; the thread goes on. When this handle is dropped, the jobs already queued still run
/// and the thread ends after them; [`TorchThread::join`] waits for that.
#[derive(Debug)]
pub struct TorchThread {
    jobs: mpsc::Sender<Job>,
    thread: JoinHandle<()>,
}

impl TorchThread {
    /// Starts the thread and applies the settings to it.
    ///
    /// # Errors
    /// [`LearningError::Config`] for a thread count of zero, [`LearningError::Io`] if the system gives no thread.
    pub fn start(settings: TorchSettings) -> Result<Self, LearningError> {
        let threads = settings.intra_op_threads;
        if threads == 0 {
            return Err(LearningError::Config(
                "torch threads must be at least 1, not 0".to_owned(),
            ));
        }
        let (jobs, mut queue) = mpsc::channel::<Job>(QUEUE);
        let thread = std::thread::Builder::new()
            .name("torch".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                // OpenMP keeps this setting per thread, so it is made here and not by the caller.
                use_threads(threads);
                while let Some(job) = queue.blocking_recv() {
                    job();
                }
            })
            .map_err(|source| LearningError::io("torch thread", source))?;
        Ok(Self { jobs, thread })
    }

    /// Runs a job on the thread and waits for its result without blocking the async runtime.
    ///
    /// A job whose caller has gone before its turn came is skipped; one that has begun runs to its end.
    ///
    /// # Errors
    /// What the job returns; [`LearningError::Panicked`] if it panics; [`LearningError::Stopped`] if the thread is gone.
    pub async fn run<R, F>(&self, name: &'static str, job: F) -> Result<R, LearningError>
    where
        R: Send + 'static,
        F: FnOnce() -> Result<R, LearningError> + Send + 'static,
    {
        let (job, result) = package(name, job);
        self.jobs
            .send(job)
            .await
            .map_err(|_| LearningError::Stopped(name))?;
        result.await.unwrap_or(Err(LearningError::Stopped(name)))
    }

    /// [`TorchThread::run`] for callers outside an async runtime.
    ///
    /// # Errors
    /// As [`TorchThread::run`].
    ///
    /// # Panics
    /// When called from async code.
    pub fn run_blocking<R, F>(&self, name: &'static str, job: F) -> Result<R, LearningError>
    where
        R: Send + 'static,
        F: FnOnce() -> Result<R, LearningError> + Send + 'static,
    {
        let (job, result) = package(name, job);
        self.jobs
            .blocking_send(job)
            .map_err(|_| LearningError::Stopped(name))?;
        result
            .blocking_recv()
            .unwrap_or(Err(LearningError::Stopped(name)))
    }

    /// Closes the queue, lets the jobs in it finish and waits for the thread. Blocks.
    pub fn join(self) {
        drop(self.jobs);
        // A job's panic is caught, so the thread itself has nothing to report.
        let _ = self.thread.join();
    }
}

/// Lets the operations that this OS thread calls use so many threads (at least 1). OpenMP keeps the number per calling thread.
pub fn use_threads(count: usize) {
    // A thread that has not used libtorch yet takes over, at its first operation, whatever number was set last in the whole process; asking makes it do
    // so now.
    let _ = tch::get_num_threads();
    tch::set_num_threads(i32::try_from(count).unwrap_or(i32::MAX).max(1));
}

/// How many threads the operations that this OS thread calls may use.
pub fn threads_in_use() -> usize {
    usize::try_from(tch::get_num_threads()).unwrap_or(1)
}

/// Wraps a job so that it reports its result, or its panic, through the channel.
fn package<R, F>(name: &'static str, job: F) -> (Job, oneshot::Receiver<Result<R, LearningError>>)
where
    R: Send + 'static,
    F: FnOnce() -> Result<R, LearningError> + Send + 'static,
{
    let (report, result) = oneshot::channel();
    let packed = Box::new(move || {
        if report.is_closed() {
            return;
        }
        // A job that panicked inside `tch::no_grad` leaves gradients off on this thread: every job starts with them on.
        let outcome =
            tch::with_grad(|| catch_unwind(AssertUnwindSafe(job))).unwrap_or_else(|payload| {
                Err(LearningError::Panicked {
                    job: name,
                    message: panic_text(payload.as_ref()),
                })
            });
        // The caller may have gone meanwhile; then nobody wants the result.
        let _ = report.send(outcome);
    });
    (packed, result)
}

fn panic_text(payload: &(dyn Any + Send)) -> String {
    payload
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without a message".to_owned())
}

/// libtorch's CPU generator is one per process, so seeding and drawing must not be torn apart by another thread's.
static GENERATOR: Mutex<()> = Mutex::new(());

/// Seeds libtorch's generator and runs `draw` right after it: the same seed gives the same values, whatever ran before.
///
/// Every random draw of this crate goes through here (tch has no generator objects). `draw` must not call `seeded` again.
///
/// # Errors
/// What `draw` returns.
pub fn seeded<R>(
    seed: u64,
    draw: impl FnOnce() -> Result<R, LearningError>,
) -> Result<R, LearningError> {
    let _alone = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    tch::manual_seed(seed as i64);
    draw()
}

/// Standard normal values of the given shape; equals Python's `torch.manual_seed(seed); torch.randn(shape)` bit for bit.
///
/// # Errors
/// [`LearningError::Torch`] for an impossible shape or kind.
pub fn seeded_randn(seed: u64, shape: &[i64], kind: Kind) -> Result<Tensor, LearningError> {
    seeded(seed, || {
        Ok(Tensor::f_randn(shape, (kind, tch::Device::Cpu))?)
    })
}

/// A permutation of `0..n`; equals Python's `torch.manual_seed(seed); torch.randperm(n)`.
///
/// # Errors
/// [`LearningError::Torch`] if libtorch cannot make it.
pub fn seeded_permutation(seed: u64, n: usize) -> Result<Vec<usize>, LearningError> {
    let drawn = seeded(seed, || {
        Ok(Tensor::f_randperm(
            n as i64,
            (Kind::Int64, tch::Device::Cpu),
        )?)
    })?;
    let mut places = vec![0_i64; n];
    drawn.f_copy_data(&mut places, n)?;
    Ok(places.into_iter().map(|place| place as usize).collect())
}

#[cfg(test)]
mod tests;
