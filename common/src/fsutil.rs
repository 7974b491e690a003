//! Writing files so that a crash leaves the old content or the new, never a mixture.

use std::{
    fs::{File, Permissions},
    io::{self, Write},
    os::unix::fs::PermissionsExt as _,
    path::Path,
};

/// How the names of the temporary files of [`write_atomic`] begin.
pub const UNFINISHED: &str = ".concord-unfinished-";

/// Replaces `path` by `bytes`: a temporary file beside it, fsync, rename, fsync of the folder. The file's mode is `mode`.
///
/// # Errors
/// Any I/O error; `path` is then as it was.
pub fn write_atomic(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut file = tempfile::Builder::new()
        .prefix(UNFINISHED)
        .tempfile_in(folder)?;
    file.as_file()
        .set_permissions(Permissions::from_mode(mode))?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    sync_folder(folder)
}

/// Deletes what a kill in the middle of [`write_atomic`] has left in `folder`, and gives the number of files. Only for whoever alone
/// writes there.
///
/// # Errors
/// If the folder cannot be read or a file cannot be deleted.
pub fn sweep_unfinished(folder: &Path) -> io::Result<u64> {
    let mut deleted = 0;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let ours = name
            .to_str()
            .is_some_and(|name| name.starts_with(UNFINISHED));
        if ours && entry.file_type()?.is_file() {
            std::fs::remove_file(entry.path())?;
            deleted += 1;
        }
    }
    Ok(deleted)
}

/// The permission bits of a file or folder, 0o000 to 0o777.
///
/// # Errors
/// If it is not there or cannot be looked at.
pub fn mode(path: &Path) -> io::Result<u32> {
    Ok(std::fs::metadata(path)?.permissions().mode() & 0o777)
}

/// Makes renames and new names in `folder` durable.
///
/// # Errors
/// Any I/O error.
pub fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_private() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        write_atomic(&path, b"old", 0o600).unwrap();
        write_atomic(&path, b"new", 0o600).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_a_kill_has_left_unfinished_is_swept_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        write_atomic(&path, b"whole", 0o600).unwrap();
        // A kill leaves the temporary file as it is.
        let left = tempfile::Builder::new()
            .prefix(UNFINISHED)
            .tempfile_in(folder.path());
        let left = left.unwrap().into_temp_path().keep().unwrap();
        std::fs::write(folder.path().join(".hidden"), b"somebody's").unwrap();
        assert_eq!(sweep_unfinished(folder.path()).unwrap(), 1);
        assert!(!left.exists());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
        assert_eq!(std::fs::read(&path).unwrap(), b"whole");
    }
}
