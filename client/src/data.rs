//! A silo's rows: CSV, JSONL and Parquet files, read as a stream through one column mapping.
//!
//! A bad row (missing column, empty text, no label, a label that is no number where one is wanted, invalid UTF-8, malformed
//! JSON) is reported with its file and line. Up to a set number of them are skipped; one more stops the job.
//! Log lines and errors name places and reasons, never contents.

use std::{
    collections::BTreeSet,
    fmt,
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

mod csv;
mod jsonl;
mod parquet;
mod split;
mod task;
#[cfg(test)]
mod tests;

pub use self::{
    split::SplitRule,
    task::{Loaded, load_evaluation, load_splits},
};

/// Largest row in bytes; a longer one is bad.
pub const MAX_ROW_BYTES: usize = 4 << 20;
/// Bad rows that an error lists.
const LISTED: usize = 5;

/// How a file is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// Comma-separated values with a header line (RFC 4180).
    Csv,
    /// One JSON object a line.
    Jsonl,
    /// Apache Parquet with flat columns.
    Parquet,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Csv => "CSV",
            Self::Jsonl => "JSONL",
            Self::Parquet => "Parquet",
        })
    }
}

/// Which columns hold what.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Columns {
    /// The text, or the first of a pair.
    #[serde(default = "text_column")]
    pub text: String,
    /// The second text of a pair; only for `kind = "pair"`.
    #[serde(default)]
    pub text_b: Option<String>,
    /// The label.
    #[serde(default = "label_column")]
    pub label: String,
}

impl Default for Columns {
    fn default() -> Self {
        Self {
            text: text_column(),
            text_b: None,
            label: label_column(),
        }
    }
}

fn text_column() -> String {
    "text".to_owned()
}

fn label_column() -> String {
    "label".to_owned()
}

/// What a reader takes from each row.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mapping {
    /// Column of the (first) text.
    pub text: String,
    /// Column of the second text, for pairs.
    pub text_b: Option<String>,
    /// Column of the label; `None` where labels are not wanted.
    pub label: Option<String>,
    /// What separates CSV fields.
    pub delimiter: u8,
}

impl Mapping {
    fn columns(&self) -> impl Iterator<Item = &str> {
        [Some(&self.text), self.text_b.as_ref(), self.label.as_ref()]
            .into_iter()
            .flatten()
            .map(String::as_str)
    }
}

/// One row as a file has it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RawRow {
    /// Line that the row begins at, counted from 1; the row's number for Parquet.
    pub line: u64,
    /// The (first) text, not blank.
    pub text: String,
    /// The second text of a pair, not blank.
    pub text_b: Option<String>,
    /// The label without surrounding blanks, not empty; `None` if none was asked for.
    pub label: Option<String>,
}

/// Why a reader has no next row.
#[derive(Debug)]
pub enum RowFault {
    /// This row is bad; the next may be good.
    Bad {
        /// Where it begins.
        line: u64,
        /// What is wrong, without its contents.
        reason: String,
    },
    /// The file cannot be read any further.
    Broken(String),
}

/// The rows of a file.
pub type Rows = Box<dyn Iterator<Item = Result<RawRow, RowFault>> + Send>;

/// Data that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A file could not be opened or read.
    #[error("{}: {source}", .file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A file is not what its format says.
    #[error("{}: {reason}", .file.display())]
    File {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Mapped columns that a file does not name. The message does not hold those that it does, as in a file without a header line the first row
    /// stands in their place; see [`DataError::in_full`].
    #[error(
        "{}: there is no column `{missing}`; the first line of a CSV file must name the columns, and the task's `columns` must name them alike",
        .file.display()
    )]
    Columns {
        /// The file.
        file: PathBuf,
        /// The columns that are wanted and not there.
        missing: String,
        /// The columns that are there.
        present: String,
    },
    /// More bad rows than the task's `max_bad_rows`.
    #[error(
        "more than {limit} bad rows (max_bad_rows); correct them or raise the limit. The first: {first}"
    )]
    BadRows {
        /// The limit.
        limit: u64,
        /// The first few, with file and line.
        first: String,
    },
    /// A label that no training row has. The message does not hold it, as a label can be content; see [`DataError::in_full`].
    #[error(
        "{}:{line}: the label does not occur in the training rows; add training rows with it or correct the label",
        .file.display()
    )]
    UnseenLabel {
        /// The file.
        file: PathBuf,
        /// The line.
        line: u64,
        /// The label.
        label: String,
    },
    /// A split without rows.
    #[error("the {split} split of task `{task}` has no usable row")]
    EmptySplit {
        /// The task.
        task: String,
        /// The split.
        split: &'static str,
    },
    /// Classes that cannot be learned.
    #[error("task `{task}`: {reason}")]
    Labels {
        /// The task.
        task: String,
        /// What is wrong.
        reason: String,
    },
}

impl DataError {
    /// The message for people at their own terminal: with the label that is not known, or the columns that are there. Never for a log.
    pub fn in_full(&self) -> String {
        match self {
            Self::UnseenLabel { file, line, label } => format!(
                "{}:{line}: the label {label:?} does not occur in the training rows; add training rows with it or correct the label",
                file.display()
            ),
            Self::Columns { present, .. } => format!("{self}; the columns are `{present}`"),
            other => other.to_string(),
        }
    }

    fn file(file: &Path, reason: impl Into<String>) -> Self {
        Self::File {
            file: file.to_path_buf(),
            reason: reason.into(),
        }
    }
}

/// Opens a file's rows.
///
/// # Errors
/// If the file cannot be opened, or its header lacks a mapped column.
pub fn open(file: &Path, format: Format, mapping: &Mapping) -> Result<Rows, DataError> {
    let opened = File::open(file).map_err(|source| DataError::Io {
        file: file.to_path_buf(),
        source,
    })?;
    match format {
        Format::Parquet => parquet::rows(opened, mapping).map_err(|fault| fault.of(file)),
        text => from_reader(file, opened, text, mapping),
    }
}

/// The rows of anything that can be read, for standard input; `name` stands in messages.
///
/// # Errors
/// As [`open`], and for Parquet, which needs a file.
pub fn from_reader(
    name: &Path,
    input: impl Read + Send + 'static,
    format: Format,
    mapping: &Mapping,
) -> Result<Rows, DataError> {
    match format {
        Format::Csv => csv::rows(input, mapping).map_err(|fault| fault.of(name)),
        Format::Jsonl => Ok(jsonl::rows(input, mapping)),
        Format::Parquet => Err(DataError::file(
            name,
            "Parquet can only be read from a file",
        )),
    }
}

/// Bad rows met so far, and how many may be skipped.
#[derive(Debug)]
pub struct BadRows {
    limit: u64,
    count: u64,
    first: Vec<String>,
}

impl BadRows {
    /// Up to `limit` bad rows are skipped.
    pub fn new(limit: u64) -> Self {
        Self {
            limit,
            count: 0,
            first: Vec::new(),
        }
    }

    /// Bad rows so far.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The first few, each as `file:line: reason`.
    pub fn first(&self) -> &[String] {
        &self.first
    }

    /// Notes one; `true` if enough are known to stop reading.
    fn note(&mut self, file: &Path, line: u64, reason: &str) -> bool {
        self.count += 1;
        if self.first.len() < LISTED {
            self.first
                .push(format!("{}:{line}: {reason}", file.display()));
        }
        self.count >= self.limit.saturating_add(LISTED as u64)
    }

    fn check(&self) -> Result<(), DataError> {
        if self.count <= self.limit {
            return Ok(());
        }
        Err(DataError::BadRows {
            limit: self.limit,
            first: self.first.join("; "),
        })
    }
}

/// Runs `take` over a file's good rows; what it refuses counts as bad too.
///
/// # Errors
/// If the file breaks off, or once there are more bad rows than allowed.
pub fn for_each(
    file: &Path,
    rows: Rows,
    bad: &mut BadRows,
    mut take: impl FnMut(RawRow) -> Result<(), String>,
) -> Result<(), DataError> {
    for row in rows {
        let (line, reason) = match row {
            Ok(row) => {
                let line = row.line;
                match take(row) {
                    Ok(()) => continue,
                    Err(reason) => (line, reason),
                }
            }
            Err(RowFault::Bad { line, reason }) => (line, reason),
            Err(RowFault::Broken(reason)) => return Err(DataError::file(file, reason)),
        };
        if bad.note(file, line, &reason) {
            break;
        }
    }
    bad.check()
}

/// Checks the values that a reader found for one row.
fn row(
    mapping: &Mapping,
    line: u64,
    mut value: impl FnMut(&str) -> Result<String, String>,
) -> Result<RawRow, RowFault> {
    let mut filled = |column: &str, what: &str| {
        let found = value(column)?;
        if found.trim().is_empty() {
            return Err(format!("{what} in column `{column}`"));
        }
        Ok(found)
    };
    let mut read = || -> Result<RawRow, String> {
        Ok(RawRow {
            line,
            text: filled(&mapping.text, "empty text")?,
            text_b: mapping
                .text_b
                .as_deref()
                .map(|column| filled(column, "empty text"))
                .transpose()?,
            label: mapping
                .label
                .as_deref()
                .map(|column| filled(column, "no label").map(|label| label.trim().to_owned()))
                .transpose()?,
        })
    };
    read().map_err(|reason| RowFault::Bad { line, reason })
}

/// Why a file's rows cannot be read at all.
#[derive(Debug)]
enum FileFault {
    Reason(String),
    /// Mapped columns that a header lacks, and those that it has.
    Columns {
        missing: String,
        present: String,
    },
}

impl From<String> for FileFault {
    fn from(reason: String) -> Self {
        Self::Reason(reason)
    }
}

impl FileFault {
    fn of(self, file: &Path) -> DataError {
        match self {
            Self::Reason(reason) => DataError::file(file, reason),
            Self::Columns { missing, present } => DataError::Columns {
                file: file.to_path_buf(),
                missing,
                present,
            },
        }
    }
}

fn check_columns<'a>(
    mapping: &Mapping,
    present: impl Iterator<Item = &'a str>,
) -> Result<(), FileFault> {
    let present: BTreeSet<&str> = present.collect();
    let missing: Vec<&str> = mapping
        .columns()
        .filter(|column| !present.contains(column))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let present: Vec<&str> = present.into_iter().collect();
    Err(FileFault::Columns {
        missing: missing.join("`, `"),
        present: present.join("`, `"),
    })
}
