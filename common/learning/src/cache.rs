//! The frozen prefix cache: all that lies below the first adapter is computed once per example and kept.
//!
//! The backbone's weights never change and dropout is off, so what the first adapter is given depends on an example's tokens alone. Per example
//! the cache keeps two `[length, d]` matrices of its real tokens, without padding: the output that the first adapter is hooked to (of the attention
//! or of the feed-forward network) and the residual beside it (2 · length · d elements). With adapters in the top third of the layers, an epoch
//! then costs the top third only.
//!
//! An example's prefix is always computed alone, in a batch of one row. Its bits so depend on nothing but its tokens: not on the rows it
//! is trained with, the order, the budget, or whether it came from memory, disk or a fresh computation. With [`CacheMode::Off`] prefixes are
//! computed batch by batch instead, which differs in the last bits (about 1e-6), because libtorch's kernels block differently at other shapes.
//!
//! Memory is filled first, up to a budget; then a file, if a folder is given, up to its own; what fits in neither is computed each time.
//! The file is nameless (unlinked as soon as it is made), so nothing derived from the data outlives the process. One that cannot be made, or
//! that fails, costs time and nothing else: rows that it does not take, or does not give back, are computed.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Seek as _, SeekFrom, Write as _},
    os::unix::fs::FileExt as _,
    path::PathBuf,
};

use tch::{Kind, Tensor};

use crate::{
    backbone::{Backbone, Place, Prefix},
    data::Split,
    error::LearningError,
    tokenize::{Encoded, pad},
};

#[cfg(test)]
mod tests;

/// Whether prefixes are kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum CacheMode {
    /// Computed batch by batch, every time.
    Off,
    /// Computed once an example.
    #[default]
    On,
}

/// A folder for what does not fit in memory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiskBudget {
    /// An existing folder on a disk of the silo's own; a nameless file is made in it.
    pub folder: PathBuf,
    /// Most bytes in it.
    pub bytes: u64,
}

impl DiskBudget {
    /// All that a fault of the disk comes to: the cache saves time and nothing else, and results are the same without it.
    fn warn(&self, error: &io::Error) {
        tracing::warn!(folder = %self.folder.display(), %error, "prefix cache cannot grow on disk, rows will be computed again");
    }
}

/// How much may be kept, and where.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CacheSettings {
    /// Whether anything is kept.
    pub mode: CacheMode,
    /// Most bytes in memory.
    pub memory_bytes: u64,
    /// For the rest.
    pub disk: Option<DiskBudget>,
}

impl Default for CacheSettings {
    /// 64 MiB of memory, no disk.
    fn default() -> Self {
        Self {
            mode: CacheMode::On,
            memory_bytes: 64 << 20,
            disk: None,
        }
    }
}

/// What the cache has done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CacheStats {
    /// Rows taken from memory or disk.
    pub hits: u64,
    /// Those of them that were taken from disk.
    pub disk_hits: u64,
    /// Rows computed.
    pub misses: u64,
    /// Bytes held in memory.
    pub memory_bytes: u64,
    /// Bytes held on disk.
    pub disk_bytes: u64,
}

impl CacheStats {
    /// Rows taken from memory.
    pub fn memory_hits(&self) -> u64 {
        self.hits - self.disk_hits
    }

    /// The rows since an earlier look, and the bytes as they are now.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            hits: self.hits - earlier.hits,
            disk_hits: self.disk_hits - earlier.disk_hits,
            misses: self.misses - earlier.misses,
            ..*self
        }
    }
}

/// A row of a task.
type Key = (Split, usize);

/// A batch below the first adapter.
#[derive(Debug)]
pub(crate) struct PrefixBatch {
    pub(crate) prefix: Prefix,
    /// `[n, t]`, i64.
    pub(crate) mask: Tensor,
}

/// The cache of one task.
#[derive(Debug)]
pub(crate) struct PrefixCache {
    settings: CacheSettings,
    /// The place of the first adapter. A cache serves no other.
    first: Place,
    /// Each `[2, length, d]`: what the first adapter is given, residual.
    memory: HashMap<Key, Tensor>,
    disk: Option<DiskRows>,
    stats: CacheStats,
}

impl PrefixCache {
    pub(crate) fn new(first: Place, settings: CacheSettings) -> Self {
        let disk = match &settings.disk {
            Some(budget) if settings.mode == CacheMode::On && budget.bytes > 0 => {
                DiskRows::new(budget.clone())
            }
            _ => None,
        };
        Self {
            settings,
            first,
            memory: HashMap::new(),
            disk,
            stats: CacheStats::default(),
        }
    }

    pub(crate) fn first(&self) -> Place {
        self.first
    }

    pub(crate) fn stats(&self) -> CacheStats {
        self.stats
    }

    /// The prefix of some rows of a split, padded to the longest of them.
    pub(crate) fn batch(
        &mut self,
        backbone: &Backbone,
        split: Split,
        rows: &[usize],
        encoded: &[Encoded],
    ) -> Result<PrefixBatch, LearningError> {
        let chosen: Vec<&Encoded> = rows.iter().map(|&row| &encoded[row]).collect();
        let batch = pad(&chosen, backbone.config().pad_id)?;
        if self.settings.mode == CacheMode::Off {
            return Ok(PrefixBatch {
                prefix: backbone.run_prefix(&batch, self.first)?,
                mask: batch.mask,
            });
        }
        let _frozen = tch::no_grad_guard();
        let mut output = Vec::with_capacity(rows.len());
        let mut residual = Vec::with_capacity(rows.len());
        for (&row, tokens) in rows.iter().zip(&chosen) {
            let both = self.row(backbone, (split, row), tokens)?;
            output.push(both.f_select(0, 0)?);
            residual.push(both.f_select(0, 1)?);
        }
        let padded = |parts: &[Tensor]| Tensor::f_pad_sequence(parts, true, 0.0, "right");
        Ok(PrefixBatch {
            prefix: Prefix {
                place: self.first,
                output: padded(&output)?,
                residual: padded(&residual)?,
            },
            mask: batch.mask,
        })
    }

    fn row(
        &mut self,
        backbone: &Backbone,
        key: Key,
        tokens: &Encoded,
    ) -> Result<Tensor, LearningError> {
        if let Some(kept) = self.memory.get(&key) {
            self.stats.hits += 1;
            return Ok(kept.shallow_clone());
        }
        let shape = [2, tokens.ids.len() as i64, backbone.config().hidden as i64];
        if let Some(bytes) = self.kept_on_disk(key, &shape, backbone.kind()) {
            self.stats.hits += 1;
            self.stats.disk_hits += 1;
            return Ok(Tensor::f_from_data_size(&bytes, &shape, backbone.kind())?);
        }
        self.stats.misses += 1;
        let computed = compute(backbone, self.first, tokens)?;
        self.keep(key, &computed)?;
        Ok(computed)
    }

    /// The bytes of a row that is on disk. A file that cannot be read is let go, with all that is in it.
    fn kept_on_disk(&mut self, key: Key, shape: &[i64], kind: Kind) -> Option<Vec<u8>> {
        let disk = self.disk.as_ref()?;
        match disk.read(key, shape, kind) {
            Ok(kept) => kept,
            Err(error) => {
                tracing::warn!(folder = %disk.budget.folder.display(), %error, "prefix cache cannot be read from disk, its rows will be computed again");
                self.disk = None;
                self.stats.disk_bytes = 0;
                None
            }
        }
    }

    fn keep(&mut self, key: Key, computed: &Tensor) -> Result<(), LearningError> {
        let bytes = (computed.numel() * computed.kind().elt_size_in_bytes()) as u64;
        if self.stats.memory_bytes + bytes <= self.settings.memory_bytes {
            self.stats.memory_bytes += bytes;
            self.memory.insert(key, computed.shallow_clone());
        } else if let Some(disk) = &mut self.disk {
            disk.write(key, computed)?;
            self.stats.disk_bytes = disk.end;
        }
        Ok(())
    }
}

/// The prefix of one row alone, `[2, length, d]`.
fn compute(backbone: &Backbone, first: Place, tokens: &Encoded) -> Result<Tensor, LearningError> {
    let batch = pad(&[tokens], backbone.config().pad_id)?;
    let prefix = backbone.run_prefix(&batch, first)?;
    Ok(Tensor::f_cat(&[prefix.output, prefix.residual], 0)?)
}

/// Rows in a nameless file, one after the other.
///
/// They are read with `pread` and not mapped: pages of a map would count as the daemon's own memory.
#[derive(Debug)]
struct DiskRows {
    budget: DiskBudget,
    file: File,
    offsets: HashMap<Key, u64>,
    end: u64,
    /// The disk is full or broken: nothing more is written.
    closed: bool,
}

impl DiskRows {
    /// `None`, with a warning, where no file can be made.
    fn new(budget: DiskBudget) -> Option<Self> {
        let file = tempfile::tempfile_in(&budget.folder)
            .inspect_err(|error| budget.warn(error))
            .ok()?;
        Some(Self {
            budget,
            file,
            offsets: HashMap::new(),
            end: 0,
            closed: false,
        })
    }

    fn read(&self, key: Key, shape: &[i64], kind: Kind) -> io::Result<Option<Vec<u8>>> {
        let Some(&offset) = self.offsets.get(&key) else {
            return Ok(None);
        };
        let elements = shape.iter().product::<i64>() as usize;
        let mut bytes = vec![0; elements * kind.elt_size_in_bytes()];
        self.file.read_exact_at(&mut bytes, offset)?;
        Ok(Some(bytes))
    }

    fn write(&mut self, key: Key, row: &Tensor) -> Result<(), LearningError> {
        let elements = row.numel();
        let mut bytes = vec![0; elements * row.kind().elt_size_in_bytes()];
        if self.closed || self.end + bytes.len() as u64 > self.budget.bytes {
            return Ok(());
        }
        row.f_contiguous()?.f_copy_data_u8(&mut bytes, elements)?;
        let written = self
            .file
            .seek(SeekFrom::Start(self.end))
            .and_then(|_| self.file.write_all(&bytes));
        if let Err(error) = written {
            self.budget.warn(&error);
            self.closed = true;
            return Ok(());
        }
        self.offsets.insert(key, self.end);
        self.end += bytes.len() as u64;
        Ok(())
    }
}
