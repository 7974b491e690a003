//! Uploads in progress: one file each, named by the upload's id.
//!
//! The bytes go from the stream into the file as they come; a running hash and a look at every value go along with them, so
//! that a whole payload is never in memory. The file's length is the offset at which an upload goes on, also after a
//! restart of the server. Once its contribution is recorded the file stays where it is until the round has ended.

use std::{
    collections::{BTreeSet, HashMap},
    fs::{self, File, OpenOptions},
    io::{self, Seek as _},
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use concord_common::chunk::{ChunkAssembler, Expected, Received, ResumeError};
use concord_proto::v1;
use tokio_util::sync::CancellationToken;

use crate::{config::Durability, error::Failure, ids::hex, writeback::Writeback};

mod sync;
#[cfg(test)]
mod tests;

use sync::GroupSync;

/// Names an upload and its file.
pub type UploadId = [u8; 16];

/// The folder of uploads.
#[derive(Debug)]
pub struct Spool {
    folder: PathBuf,
    durability: Durability,
    group: Option<GroupSync>,
    turns: Arc<Mutex<HashMap<UploadId, Turn>>>,
}

/// Who is working on an upload.
#[derive(Debug, Clone, Default)]
struct Turn {
    /// Asks the holder to let go.
    cut: CancellationToken,
    /// The holder has let go.
    over: CancellationToken,
}

/// The right to work on an upload; there is one at a time.
#[derive(Debug)]
pub struct UploadTurn {
    id: UploadId,
    turn: Turn,
    turns: Arc<Mutex<HashMap<UploadId, Turn>>>,
}

impl UploadTurn {
    /// Cancelled when somebody else wants to go on with the upload.
    pub fn cut(&self) -> CancellationToken {
        self.turn.cut.clone()
    }
}

impl Drop for UploadTurn {
    fn drop(&mut self) {
        lock(&self.turns).remove(&self.id);
        self.turn.over.cancel();
    }
}

fn lock(turns: &Mutex<HashMap<UploadId, Turn>>) -> MutexGuard<'_, HashMap<UploadId, Turn>> {
    turns.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Spool {
    /// Opens the folder, making it if it is not there.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn open(folder: &Path, durability: Durability) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        let group = match durability {
            Durability::Power => Some(GroupSync::new(folder)),
            Durability::Process => None,
        };
        Ok(Self {
            folder: folder.to_owned(),
            durability,
            group,
            turns: Arc::default(),
        })
    }

    /// Where an upload's bytes are.
    pub fn path(&self, id: &UploadId) -> PathBuf {
        self.folder.join(hex(id))
    }

    /// Takes the right to work on an upload; whoever has it is asked to let go and waited for.
    pub async fn take_turn(&self, id: UploadId) -> UploadTurn {
        loop {
            let holder = {
                let mut turns = lock(&self.turns);
                let Some(holder) = turns.get(&id) else {
                    let turn = Turn::default();
                    turns.insert(id, turn.clone());
                    return UploadTurn {
                        id,
                        turn,
                        turns: Arc::clone(&self.turns),
                    };
                };
                holder.clone()
            };
            holder.cut.cancel();
            holder.over.cancelled().await;
        }
    }

    /// True while somebody works on the upload.
    pub fn is_busy(&self, id: &UploadId) -> bool {
        lock(&self.turns).contains_key(id)
    }

    /// The byte at which an upload goes on. Blocking, but only for a look at the file's length.
    ///
    /// # Errors
    /// If the file is there and its length cannot be read.
    pub fn offset(&self, id: &UploadId, payload_bytes: u64) -> io::Result<u64> {
        match fs::metadata(self.path(id)) {
            Ok(metadata) if metadata.len() <= payload_bytes => Ok(metadata.len()),
            // Nothing that was received; the session starts over.
            Ok(_) => Ok(0),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
            Err(error) => Err(error),
        }
    }

    /// Goes on with an upload; what is there is hashed and checked again. Blocking.
    ///
    /// # Errors
    /// If the file cannot be opened or read. Bytes that do not pass the checks are thrown away instead.
    pub fn resume(&self, turn: UploadTurn, expected: Expected) -> io::Result<Session> {
        let path = self.path(&turn.id);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)?;
        let assembler = match ChunkAssembler::resume(expected.clone(), &mut file) {
            Ok(assembler) => assembler,
            Err(ResumeError::Read(error)) => return Err(error),
            Err(ResumeError::Content(refusal)) => {
                tracing::warn!(path = %path.display(), %refusal, "an upload starts again at its first byte");
                file.set_len(0)?;
                file.rewind()?;
                ChunkAssembler::new(expected)
            }
        };
        Ok(Session {
            writeback: Writeback::new(self.durability, assembler.offset()),
            assembler,
            file: Arc::new(file),
            turn,
        })
    }

    /// Makes a session's bytes durable if so configured, together with those of other sessions that wait for the same.
    ///
    /// # Errors
    /// If the disk does not confirm; the bytes must then not be acknowledged.
    pub async fn sync(&self, session: &Session) -> Result<(), Failure> {
        match &self.group {
            None => Ok(()),
            Some(group) => group
                .sync(Arc::clone(&session.file))
                .await
                .map_err(Failure::io("cannot sync an upload to the disk")),
        }
    }

    /// Deletes an upload's bytes; nothing happens if there are none. Blocking.
    ///
    /// # Errors
    /// If the file is there and cannot be deleted.
    pub fn delete(&self, id: &UploadId) -> io::Result<()> {
        match fs::remove_file(self.path(id)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Deletes every file that is none of `keep`, and gives their number. Only for the start of the server.
    ///
    /// # Errors
    /// If the folder cannot be read or a file cannot be deleted.
    pub fn sweep(&self, keep: &BTreeSet<UploadId>) -> io::Result<u64> {
        let names: BTreeSet<String> = keep.iter().map(|id| hex(id)).collect();
        let mut deleted = 0;
        for entry in fs::read_dir(&self.folder)? {
            let entry = entry?;
            if !entry
                .file_name()
                .to_str()
                .is_some_and(|name| names.contains(name))
            {
                fs::remove_file(entry.path())?;
                deleted += 1;
            }
        }
        Ok(deleted)
    }
}

/// One upload being received. Its methods block; it is handed to a worker thread and back.
#[derive(Debug)]
pub struct Session {
    assembler: ChunkAssembler,
    file: Arc<File>,
    writeback: Writeback,
    turn: UploadTurn,
}

impl Session {
    /// Checks a chunk and writes it to the file.
    ///
    /// # Errors
    /// The refusal of the chunk: the session goes on as if it had not come. Or an I/O error: the session is of no more use.
    pub fn push(&mut self, chunk: &v1::Chunk) -> Result<(), Failure> {
        let offset = self.assembler.offset();
        self.assembler.accept(chunk)?;
        self.file
            .write_all_at(&chunk.data, offset)
            .map_err(Failure::io("cannot write an upload"))?;
        self.writeback.written(&self.file, self.assembler.offset());
        Ok(())
    }

    /// Ends the payload.
    ///
    /// # Errors
    /// `TRUNCATED` or `DIGEST_MISMATCH`.
    pub fn finish(&self) -> Result<Received, Failure> {
        Ok(self.assembler.finish()?)
    }

    /// The byte that must come next.
    pub fn offset(&self) -> u64 {
        self.assembler.offset()
    }

    /// Cancelled when somebody else wants to go on with the upload.
    pub fn cut(&self) -> CancellationToken {
        self.turn.cut()
    }
}
