//! Where everything that was done is put down: an event's objects and its line go to the server first, then to the folder here.

mod board;

use std::{
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use concord_artaug::{
    course::{Command, Course, course},
    folder::{FolderError, JobFolder},
    image::Image,
    journal::JournalError,
    machine::{Event, Machine},
    store::StoreError,
};
use concord_common::{Clock, Digest, telemetry::peak_rss_bytes};

pub use self::board::Board;
use crate::{
    brake::{Brake, Halt},
    limits::MemoryLimit,
    remote::{Lease, Payload},
};

/// Something that was done, with the bytes of the objects that its event names and nobody has yet.
#[derive(Debug, Clone)]
pub struct Done {
    /// What happened.
    pub event: Event,
    /// The bytes.
    pub objects: Vec<Bytes>,
}

impl Done {
    /// An event that names no new object.
    pub fn plain(event: Event) -> Self {
        Self {
            event,
            objects: Vec::new(),
        }
    }
}

/// A job's desk. Threads may use it at once: one at a time writes, and reading does not wait for the network.
#[derive(Debug)]
pub struct Desk<'a> {
    folder: Mutex<JobFolder>,
    /// Held from an event's staging to its commit.
    writing: Mutex<()>,
    lease: &'a Lease,
    board: &'a Board,
    clock: &'a dyn Clock,
    memory: MemoryLimit,
    /// Longest time of the job.
    time: Duration,
    /// Whether this worker gives the job less disk than the job may take.
    short_of_disk: bool,
    /// For those who wait for something new.
    news: (Mutex<u64>, Condvar),
}

/// How long those who wait for news sleep at most: the brake does not wake them.
const DOZE: Duration = Duration::from_millis(50);

impl<'a> Desk<'a> {
    /// The desk of an open folder; `short_of_disk` if its quota is this worker's own limit and not the job's.
    pub fn new(
        folder: JobFolder,
        lease: &'a Lease,
        board: &'a Board,
        clock: &'a dyn Clock,
        memory: MemoryLimit,
        time: Duration,
        short_of_disk: bool,
    ) -> Self {
        let desk = Self {
            folder: Mutex::new(folder),
            writing: Mutex::new(()),
            lease,
            board,
            clock,
            memory,
            time,
            short_of_disk,
            news: Default::default(),
        };
        {
            let folder = desk.folder();
            lease.time_by(folder.time_worked());
            lease.note_outdated(folder.outdated());
            desk.tell_board(&folder, &[]);
        }
        desk
    }

    fn folder(&self) -> MutexGuard<'_, JobFolder> {
        // A panic while it was held ends the job anyway.
        self.folder.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The lease.
    pub fn lease(&self) -> &'a Lease {
        self.lease
    }

    /// The brake.
    pub fn brake(&self) -> &'a Brake {
        self.lease.brake()
    }

    /// The board.
    pub fn board(&self) -> &'a Board {
        self.board
    }

    /// Looks at the state.
    pub fn look<T>(&self, look: impl FnOnce(&Machine) -> T) -> T {
        look(self.folder().machine())
    }

    /// Looks at the folder.
    pub fn look_at_folder<T>(&self, look: impl FnOnce(&JobFolder) -> T) -> T {
        look(&self.folder())
    }

    /// What to do next.
    pub fn course(&self) -> Course {
        let command = match self.brake().halt() {
            Some(Halt::Cancel) => Command::Cancel,
            Some(_) => Command::Pause,
            None => Command::GoOn,
        };
        let folder = self.folder();
        course(folder.machine(), command, folder.worked(), self.time)
    }

    /// Whether the job's time is used up. What someone waits for the server does not count; see [`Lease`].
    pub fn is_out_of_time(&self) -> bool {
        self.folder().worked() >= self.time
    }

    /// The event that ends the job then.
    pub fn out_of_time(&self) -> Event {
        self.folder().machine().out_of_time(self.time)
    }

    /// Between two pieces of work.
    ///
    /// # Errors
    /// If work is to stop: the brake is pulled, or the memory is used up.
    pub fn check(&self) -> Result<(), Halt> {
        self.check_memory();
        self.brake().check()
    }

    /// Pulls the brake if the process holds too much memory.
    pub fn check_memory(&self) {
        if let Err(halt) = self.memory.check() {
            self.brake().pull(halt);
        }
    }

    /// Notes the most memory that the process has held, for the ledger.
    pub fn note_memory(&self) {
        if let Some(bytes) = peak_rss_bytes() {
            self.folder().note_memory(bytes);
        }
    }

    /// A step of the training under way is done.
    pub fn stepped(&self, step: u64) {
        self.board.stepped(step, self.clock.now());
    }

    /// Work rests from now on.
    pub fn rest(&self) {
        self.folder().rest();
    }

    /// The bytes of an object: from the folder, else from the server. None if neither has it whole.
    ///
    /// # Errors
    /// If the job halts.
    pub fn find(&self, digest: Digest) -> Result<Option<Bytes>, Halt> {
        if let Some(bytes) = self.find_here(digest)? {
            return Ok(Some(bytes));
        }
        let Some(bytes) = self.lease.get(digest)? else {
            return Ok(None);
        };
        let put = self.folder().store_mut().put_as(digest, &bytes);
        put.map_err(|error| self.unkept(error.into()))?;
        Ok(Some(bytes))
    }

    /// The bytes of an object from the folder. None if it does not have it whole.
    ///
    /// # Errors
    /// If the job halts.
    pub fn find_here(&self, digest: Digest) -> Result<Option<Bytes>, Halt> {
        let kept = self.folder().store().get(digest);
        match kept {
            Ok(bytes) => Ok(Some(bytes.into())),
            Err(StoreError::Missing(_) | StoreError::Damaged(_)) => Ok(None),
            Err(error) => Err(self.unkept(error.into())),
        }
    }

    /// The bytes of an object that must be there.
    ///
    /// # Errors
    /// If the job halts, also because the object is lost.
    pub fn object(&self, digest: Digest) -> Result<Bytes, Halt> {
        self.find(digest)?.ok_or_else(|| {
            self.trouble(format!(
                "the object {digest} of the job is lost or damaged, here and on the server; it is made again when a worker takes the job up, unless \
                 that worker's log says why it cannot be: then restore the server's state from a backup, or start the job anew"
            ))
        })
    }

    /// A stored image.
    ///
    /// # Errors
    /// If the job halts, also because it is lost or no image.
    pub fn image(&self, digest: Digest) -> Result<Image, Halt> {
        let bytes = self.object(digest)?;
        Image::from_png(&bytes).map_err(|error| self.fail(format!("the image {digest}: {error}")))
    }

    /// Pulls the brake for a failure.
    pub fn fail(&self, error: impl std::fmt::Display) -> Halt {
        let halt = Halt::failed(error);
        self.brake().pull(halt.clone());
        halt
    }

    /// Pulls the brake for something that only this worker lacks, or lacks now: the job goes on later, or elsewhere.
    pub fn trouble(&self, error: impl std::fmt::Display) -> Halt {
        let halt = Halt::Trouble(error.to_string());
        self.brake().pull(halt.clone());
        halt
    }

    /// Pulls the brake because the folder does not take or give something.
    pub fn unkept(&self, error: FolderError) -> Halt {
        let halt = unkept(error, self.short_of_disk);
        self.brake().pull(halt.clone());
        halt
    }

    /// Keeps objects, here and on the server.
    ///
    /// # Errors
    /// If the job halts.
    pub fn keep(&self, objects: Vec<Bytes>) -> Result<(), Halt> {
        let mut payloads = Vec::with_capacity(objects.len());
        for bytes in objects {
            let put = self.folder().store_mut().put(&bytes);
            let digest = put.map_err(|error| self.unkept(error.into()))?;
            payloads.push((digest, Payload::Bytes(bytes)));
        }
        self.lease.put(&payloads)
    }

    /// Puts down what was done: when this returns, the server has it and it is never done again.
    ///
    /// # Errors
    /// If the job halts.
    pub fn record(&self, done: Vec<Done>) -> Result<(), Halt> {
        self.lease.remove_outdated()?;
        self.keep(done.iter().flat_map(|done| done.objects.clone()).collect())?;
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        for Done { event, .. } in done {
            self.write(&event)?;
        }
        Ok(())
    }

    /// Records an event whose objects are kept.
    fn write(&self, event: &Event) -> Result<(), Halt> {
        let failed = |error: FolderError| self.unkept(error);
        self.note_memory();
        let staged = self.folder().stage(event).map_err(failed)?;
        self.lease
            .append(staged.line.number, std::slice::from_ref(&staged.line.bytes))?;
        let unneeded = {
            let mut folder = self.folder();
            let unneeded = folder.commit(staged).map_err(failed)?;
            self.tell_board(&folder, images(event).as_slice());
            unneeded
        };
        tracing::debug!(event = event.name(), "recorded");
        self.tell_news();
        if unneeded.is_empty() {
            return Ok(());
        }
        self.lease.remove(&unneeded)
    }

    fn tell_board(&self, folder: &JobFolder, images: &[Digest]) {
        let progress = folder.machine().progress();
        let kept = self.lease.kept().max(folder.store().used());
        self.board.note(&progress, kept, images, self.clock.now());
    }

    fn tell_news(&self) {
        let (count, changed) = &self.news;
        *count.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        changed.notify_all();
    }

    /// What has to be given to [`Desk::wait_for_news`], taken before one looks at what may be new.
    pub fn news(&self) -> u64 {
        *self.news.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells those who wait that something has changed that is not recorded.
    pub fn stir(&self) {
        self.tell_news();
    }

    /// Waits until there is something newer than `seen`, or for a moment.
    pub fn wait_for_news(&self, seen: u64) {
        let (count, changed) = &self.news;
        let count = count.lock().unwrap_or_else(PoisonError::into_inner);
        drop(
            changed
                .wait_timeout_while(count, DOZE, |count| *count == seen)
                .unwrap_or_else(PoisonError::into_inner),
        );
    }
}

/// What it means for a job that its folder does not take or give something. A disk, a lock and lines that this version cannot read are
/// this worker's affair; `short_of_disk` if the quota is so too.
pub fn unkept(error: FolderError, short_of_disk: bool) -> Halt {
    match error {
        FolderError::Store(StoreError::Quota {
            quota,
            used,
            wanted,
        }) if short_of_disk => Halt::Trouble(format!(
            "this worker may keep {quota} bytes, less than the job's own `limits.disk`, and keeps {used} for the job: no room for {wanted} more; \
                 raise `limits.disk` in the worker's settings"
        )),
        error @ (FolderError::Store(StoreError::Quota { .. })
        | FolderError::Misfit(_)
        | FolderError::Journal(JournalError::Number { .. } | JournalError::Long { .. })) => {
            Halt::failed(error)
        }
        error => Halt::Trouble(error.to_string()),
    }
}

/// The images that an event tells of.
fn images(event: &Event) -> Vec<Digest> {
    match event {
        Event::Generated { .. }
        | Event::Regenerated { .. }
        | Event::Sampled { .. }
        | Event::Evaluated { .. } => event.objects(),
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use std::{io, path::PathBuf};

    use super::*;

    #[test]
    fn only_what_no_worker_could_keep_fails_the_job() {
        let io = || io::Error::from(io::ErrorKind::StorageFull);
        let path = || PathBuf::from("x");
        let full = || StoreError::Quota {
            quota: 1,
            used: 1,
            wanted: 1,
        };
        let passing: [FolderError; 4] = [
            FolderError::Io {
                path: path(),
                source: io(),
            },
            StoreError::Io {
                path: path(),
                source: io(),
            }
            .into(),
            JournalError::Io {
                path: path(),
                source: io(),
            }
            .into(),
            JournalError::Damaged {
                path: path(),
                line: 7,
                what: "unknown".to_owned(),
            }
            .into(),
        ];
        for error in passing {
            assert!(matches!(unkept(error, false), Halt::Trouble(_)));
        }
        assert!(matches!(unkept(full().into(), true), Halt::Trouble(_)));
        assert!(matches!(unkept(full().into(), false), Halt::Failed(_)));
        let long = JournalError::Long {
            path: path(),
            bytes: 9,
        };
        assert!(matches!(unkept(long.into(), true), Halt::Failed(_)));
    }
}
