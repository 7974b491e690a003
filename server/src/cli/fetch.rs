//! A job's results as files of a folder.
//!
//! The server is not trusted with names or bytes: a name that is no plain relative path is refused before anything is
//! written, and a file gets its name only when its bytes have the announced digest. What was received before an
//! interruption is kept under `.concord-parts` and taken up again.

use std::{
    collections::BTreeSet,
    fs::{self, File, TryLockError},
    io::{self, Read as _, Seek as _, Write as _},
    path::{Path, PathBuf},
    time::Duration,
};

use concord_common::{
    Digest,
    chunk::{DEFAULT_CHUNK_BYTES, MAX_CHUNK_BYTES, StreamDigest},
    fsutil::sync_folder,
};
use concord_proto::v1;
use futures::{Stream, StreamExt as _};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tempfile::TempPath;
use tokio::time::Instant;
use tonic::Status;

use super::{CliError, Exit, exit_of, names, output::artaug::FetchedFile};

#[cfg(test)]
mod tests;

/// Where parts of files lie, below the folder that they are for.
const PARTS: &str = ".concord-parts";
/// How long a server may send nothing before fetching is given up.
const PATIENCE: Duration = Duration::from_mins(1);
const RETRY: Duration = Duration::from_secs(1);
/// Anything shorter needs no bar.
const BAR_AFTER: Duration = Duration::from_secs(2);

/// Where objects come from: a server, or a test.
pub(super) trait Source {
    /// The pieces of an object.
    type Pieces: Stream<Item = Result<v1::GetArtefactResponse, Status>> + Unpin;

    /// Opens an object at an offset.
    async fn open(&mut self, request: v1::GetArtefactRequest) -> Result<Self::Pieces, Status>;
}

/// A file that is to be there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wanted {
    /// Its name at the server, which passed [`names::relative`], or one of ours.
    pub(super) name: String,
    /// Where it is to be, below the folder.
    pub(super) path: PathBuf,
    /// Of its content.
    pub(super) digest: Digest,
    /// Its size.
    pub(super) bytes: u64,
    /// Whether other content of that name is replaced instead of refused.
    pub(super) replaces: bool,
}

impl Wanted {
    /// An artefact under a path of our own choice.
    pub(super) fn named(artefact: &v1::Artefact, path: PathBuf) -> Result<Self, CliError> {
        let digest = Digest::try_from(artefact.digest.as_slice()).map_err(|error| {
            CliError::Untrusted(format!(
                "the server names the artefact `{}` without a digest: {error}",
                names::plain(&artefact.name)
            ))
        })?;
        Ok(Self {
            name: artefact.name.clone(),
            path,
            digest,
            bytes: artefact.bytes,
            replaces: false,
        })
    }
}

/// The files for some artefacts.
///
/// # Errors
/// `Untrusted` if a name does not stay below the folder, or two of them are for one file.
pub(super) fn plan(artefacts: &[v1::Artefact]) -> Result<Vec<Wanted>, CliError> {
    let wanted = artefacts
        .iter()
        .map(|artefact| {
            let path = names::relative(&artefact.name).map_err(|problem| {
                CliError::Untrusted(format!(
                    "the server names an artefact `{}`, which is no plain relative path: {problem}; nothing was \
                     written. Others can be fetched with --name",
                    names::plain(&artefact.name)
                ))
            })?;
            Wanted::named(artefact, path)
        })
        .collect::<Result<Vec<_>, CliError>>()?;
    match names::clash(wanted.iter().map(|file| file.name.as_str())) {
        None => Ok(wanted),
        Some(name) => Err(CliError::Untrusted(format!(
            "the server names the artefact `{name}` twice, or as a file and as a folder; nothing was written"
        ))),
    }
}

/// Brings files into a folder, which is made if it is missing. What is there with the same content stays; other content is
/// refused before anything is fetched.
pub(super) async fn fetch<S: Source>(
    source: &mut S,
    job_id: &str,
    folder: &Path,
    wanted: &[Wanted],
    shows_bar: bool,
) -> Result<Vec<FetchedFile>, CliError> {
    let mut missing = BTreeSet::new();
    for file in wanted {
        if !is_there(folder, file)? {
            missing.insert(file.name.as_str());
        }
    }
    let total = wanted
        .iter()
        .filter(|file| missing.contains(file.name.as_str()))
        .fold(0_u64, |sum, file| sum.saturating_add(file.bytes));
    let mut bar = Bar::new(total, shows_bar);
    if !missing.is_empty() {
        let parts = folder.join(PARTS);
        fs::create_dir_all(&parts).map_err(|error| unusable("make the folder", &parts, &error))?;
    }
    for file in wanted {
        if missing.contains(file.name.as_str()) {
            one(source, job_id, folder, file, &mut bar).await?;
        }
    }
    // Parts of files that another command wants may still lie there.
    let _ = fs::remove_dir(folder.join(PARTS));
    bar.finish();
    Ok(wanted
        .iter()
        .map(|file| FetchedFile {
            name: file.name.clone(),
            digest: file.digest.to_string(),
            bytes: file.bytes,
            written: missing.contains(file.name.as_str()),
        })
        .collect())
}

fn unusable(verb: &str, path: &Path, error: &io::Error) -> CliError {
    CliError::Usage(format!("cannot {verb} {}: {error}", path.display()))
}

/// True if the file is there with this content.
fn is_there(folder: &Path, file: &Wanted) -> Result<bool, CliError> {
    let mut path = folder.to_owned();
    let mut parts = file.path.components().peekable();
    while let Some(part) = parts.next() {
        path.push(part);
        // A link would lead out of the folder.
        let found = match fs::symlink_metadata(&path) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(unusable("look at", &path, &error)),
        };
        let is_last = parts.peek().is_none();
        if is_last != found.is_file() || is_last == found.is_dir() {
            return Err(CliError::Usage(format!(
                "{} is in the way of the artefact `{}`: it is no {}; move it away or choose another folder",
                path.display(),
                file.name,
                if is_last { "file" } else { "folder" }
            )));
        }
        if is_last {
            let same = found.len() == file.bytes
                && hash(&mut open(&path)?).is_ok_and(|hasher| is_digest(&hasher, file.digest));
            if !same && !file.replaces {
                return Err(CliError::Usage(format!(
                    "{} is there with other content than the artefact `{}`; say --replace, move it away, or choose another folder",
                    path.display(),
                    file.name
                )));
            }
            return Ok(same);
        }
    }
    Ok(false)
}

fn open(path: &Path) -> Result<File, CliError> {
    File::open(path).map_err(|error| unusable("read", path, &error))
}

fn hash(file: &mut File) -> io::Result<blake3::Hasher> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; DEFAULT_CHUNK_BYTES];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(hasher),
            Ok(count) => hasher.update(&buffer[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
    }
}

fn is_digest(hasher: &blake3::Hasher, digest: Digest) -> bool {
    Digest::from(hasher.finalize()) == digest
}

/// Fetches one file and gives it its name.
async fn one<S: Source>(
    source: &mut S,
    job_id: &str,
    folder: &Path,
    file: &Wanted,
    bar: &mut Bar,
) -> Result<(), CliError> {
    let path = folder.join(PARTS).join(file.digest.to_string());
    let mut part = Part::open(path, file.bytes)?;
    let resumed = part.written > 0;
    bar.advance(part.written);
    receive(source, job_id, file, &mut part, bar).await?;
    if resumed && !is_digest(&part.hasher, file.digest) {
        // What lay there may have been damaged here: once more, from the first byte on.
        part.restart()?;
        receive(source, job_id, file, &mut part, bar).await?;
    }
    if !is_digest(&part.hasher, file.digest) {
        let found = Digest::from(part.hasher.finalize());
        part.discard();
        return Err(CliError::Untrusted(format!(
            "the artefact `{}` came with the digest {found} instead of {}; nothing of it was kept",
            file.name, file.digest
        )));
    }
    let target = folder.join(&file.path);
    part.publish(&target, file)
}

/// Receives what is missing of a part, over several streams if need be.
async fn receive<S: Source>(
    source: &mut S,
    job_id: &str,
    file: &Wanted,
    part: &mut Part,
    bar: &mut Bar,
) -> Result<(), CliError> {
    let mut stalled: Option<Instant> = None;
    while part.written < file.bytes {
        let before = part.written;
        let problem = match stream(source, job_id, file, part, bar).await {
            Ok(()) if part.written == file.bytes => return Ok(()),
            Ok(()) => CliError::Untrusted(format!(
                "the server ended the artefact `{}` after {} of {} bytes, again and again",
                file.name, part.written, file.bytes
            )),
            Err(CliError::Status(status))
                if matches!(exit_of(&status), Exit::Unreachable | Exit::Busy) =>
            {
                CliError::Status(status)
            }
            Err(other) => return Err(other),
        };
        if part.written > before {
            stalled = None;
        }
        if stalled.get_or_insert_with(Instant::now).elapsed() > PATIENCE {
            return Err(problem);
        }
        tokio::time::sleep(RETRY).await;
    }
    Ok(())
}

/// Follows one stream to its end, which may come before the file's.
async fn stream<S: Source>(
    source: &mut S,
    job_id: &str,
    file: &Wanted,
    part: &mut Part,
    bar: &mut Bar,
) -> Result<(), CliError> {
    let request = v1::GetArtefactRequest {
        job_id: job_id.to_owned(),
        digest: file.digest.to_vec(),
        offset: part.written,
    };
    let mut pieces = in_time(source.open(request)).await??;
    let mut digest = StreamDigest::new();
    while let Some(piece) = in_time(pieces.next()).await? {
        let piece = piece?;
        let checked = check(&piece, part.written, file.bytes, &mut digest);
        let chunk = checked.map_err(|problem| {
            CliError::Untrusted(format!(
                "the server sends the artefact `{}` wrongly at byte {}: {problem}",
                file.name, part.written
            ))
        })?;
        part.append(&chunk.data)?;
        bar.advance(chunk.data.len() as u64);
    }
    Ok(())
}

/// What a server is waited for.
pub(super) async fn in_time<T>(answer: impl Future<Output = T>) -> Result<T, Status> {
    let silent = |_| {
        let seconds = PATIENCE.as_secs();
        Status::deadline_exceeded(format!("the server sent nothing for {seconds} s"))
    };
    tokio::time::timeout(PATIENCE, answer).await.map_err(silent)
}

/// The chunk of a piece, if it is the one that must come next.
fn check<'a>(
    piece: &'a v1::GetArtefactResponse,
    at: u64,
    total: u64,
    digest: &mut StreamDigest,
) -> Result<&'a v1::Chunk, String> {
    let chunk = piece.chunk.as_ref().ok_or("a message has no bytes")?;
    let size = chunk.data.len();
    if piece.total != total {
        return Err(format!(
            "it has {} bytes now, the list said {total}",
            piece.total
        ));
    }
    if !(1..=MAX_CHUNK_BYTES).contains(&size) {
        return Err(format!("a chunk has {size} bytes"));
    }
    if chunk.offset != at {
        return Err(format!("a chunk is for byte {}", chunk.offset));
    }
    if at + size as u64 > total {
        return Err(format!("it goes beyond its {total} bytes"));
    }
    if chunk.digest != digest.then(&chunk.data).as_bytes() {
        return Err("a chunk has another digest than it says".to_owned());
    }
    Ok(chunk)
}

/// What has been received of a file.
struct Part {
    path: PathBuf,
    file: File,
    hasher: blake3::Hasher,
    written: u64,
}

impl Part {
    /// Takes up what is there; a part that is too long is begun anew.
    fn open(path: PathBuf, most: u64) -> Result<Self, CliError> {
        let opened = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path);
        let mut file = opened.map_err(|error| unusable("write", &path, &error))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(CliError::Usage(format!(
                    "another command fetches into the same folder: it uses {}; wait until it has ended",
                    path.display()
                )));
            }
            Err(TryLockError::Error(error)) => return Err(unusable("lock", &path, &error)),
        }
        let hasher = hash(&mut file).map_err(|error| unusable("read", &path, &error))?;
        let mut part = Self {
            written: hasher.count(),
            path,
            file,
            hasher,
        };
        if part.written > most {
            part.restart()?;
        }
        Ok(part)
    }

    fn restart(&mut self) -> Result<(), CliError> {
        let emptied = self.file.set_len(0).and_then(|()| self.file.rewind());
        emptied.map_err(|error| unusable("write", &self.path, &error))?;
        self.hasher = blake3::Hasher::new();
        self.written = 0;
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), CliError> {
        self.file
            .write_all(bytes)
            .map_err(|error| unusable("write", &self.path, &error))?;
        self.hasher.update(bytes);
        self.written += bytes.len() as u64;
        Ok(())
    }

    fn discard(self) {
        // It is of no use to anybody; if it cannot be removed, the next command finds it damaged and begins anew.
        let _ = fs::remove_file(&self.path);
    }

    /// Gives the part its name, durably.
    fn publish(self, target: &Path, wanted: &Wanted) -> Result<(), CliError> {
        let folder = target.parent().unwrap_or(Path::new("."));
        let prepared = self
            .file
            .sync_all()
            .and_then(|()| fs::create_dir_all(folder));
        prepared.map_err(|error| unusable("write", target, &error))?;
        let part = TempPath::try_from_path(&self.path)
            .map_err(|error| unusable("write", target, &error))?;
        let published = if wanted.replaces {
            part.persist(target)
        } else {
            part.persist_noclobber(target)
        };
        published.map_err(|failed| {
            let error = failed.error;
            // The part stays for the next try.
            let _ = failed.path.keep();
            if error.kind() == io::ErrorKind::AlreadyExists {
                return CliError::Usage(format!(
                    "{} appeared while the artefact `{}` was fetched; say --replace, or move it away, and repeat the command",
                    target.display(),
                    wanted.name
                ));
            }
            unusable("write", target, &error)
        })?;
        sync_folder(folder).map_err(|error| unusable("write", folder, &error))
    }
}

/// A bar on standard error that shows itself only when fetching takes a while.
struct Bar {
    shown: ProgressBar,
    since: Instant,
    waits: bool,
}

impl Bar {
    fn new(total: u64, may_show: bool) -> Self {
        let template = "fetching {bar:30} {decimal_bytes}/{decimal_total_bytes}  {decimal_bytes_per_sec}  {eta} left";
        let style =
            ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::hidden());
        Self {
            shown: bar.with_style(style),
            since: Instant::now(),
            waits: may_show,
        }
    }

    fn advance(&mut self, bytes: u64) {
        self.shown.inc(bytes);
        if self.waits && self.since.elapsed() >= BAR_AFTER {
            self.waits = false;
            self.shown.set_draw_target(ProgressDrawTarget::stderr());
        }
    }

    fn finish(self) {
        self.shown.finish_and_clear();
    }
}
