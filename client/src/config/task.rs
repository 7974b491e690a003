//! A `[[task]]`: what is learned, and where this silo's rows for it are.

use std::{collections::BTreeSet, path::PathBuf};

use concord_learning::data::InputKind;
use serde::{Deserialize, Serialize};

use crate::data::{Columns, Format, SplitRule};

/// What is learned.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProblemKind {
    /// One of the labels that the training rows have.
    #[default]
    Classification,
    /// A number.
    Regression,
}

/// Where a task's rows are.
#[derive(Clone, PartialEq, Debug)]
pub enum Files {
    /// A file for each split.
    PerSplit {
        /// Rows to train on.
        train: PathBuf,
        /// Rows that choose the best model.
        validation: PathBuf,
        /// Rows for the final test.
        test: PathBuf,
    },
    /// One file, cut by a rule.
    One {
        /// The file.
        file: PathBuf,
        /// The rule.
        split: SplitRule,
    },
}

/// One task: a name that jobs use, and the silo's own data for it.
#[derive(Clone, PartialEq, Debug, Deserialize)]
#[serde(try_from = "TaskEntry")]
pub struct TaskConfig {
    /// The name that jobs use.
    pub name: String,
    /// One text a row or two.
    pub kind: InputKind,
    /// What is learned.
    pub problem: ProblemKind,
    /// Format of all files.
    pub format: Format,
    /// What separates CSV fields.
    pub delimiter: char,
    /// Column names.
    pub columns: Columns,
    /// The files.
    pub files: Files,
    /// Bad rows that are skipped; one more stops the job.
    pub max_bad_rows: u64,
}

/// A task as the file has it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TaskEntry {
    #[serde(default)]
    name: String,
    #[serde(default = "single")]
    kind: InputKind,
    #[serde(default)]
    problem: ProblemKind,
    format: Format,
    #[serde(default = "comma")]
    delimiter: char,
    #[serde(default)]
    columns: Columns,
    train: Option<PathBuf>,
    validation: Option<PathBuf>,
    test: Option<PathBuf>,
    file: Option<PathBuf>,
    split: Option<SplitRule>,
    #[serde(default)]
    max_bad_rows: u64,
}

fn single() -> InputKind {
    InputKind::Single
}
fn comma() -> char {
    ','
}
impl TryFrom<TaskEntry> for TaskConfig {
    type Error = String;

    fn try_from(entry: TaskEntry) -> Result<Self, String> {
        let refuse = |key: &str, what: &str| Err(format!("task `{}`: `{key}`: {what}", entry.name));
        let files = match (&entry.train, &entry.validation, &entry.test, &entry.file) {
            (Some(train), Some(validation), Some(test), None) => {
                if entry.split.is_some() {
                    return refuse("split", "only goes with `file`, not with a file per split");
                }
                Files::PerSplit {
                    train: train.clone(),
                    validation: validation.clone(),
                    test: test.clone(),
                }
            }
            (None, None, None, Some(file)) => {
                let Some(split) = entry.split else {
                    return refuse(
                        "split",
                        "is needed to cut `file` into training, validation and test rows",
                    );
                };
                if !split.is_valid() {
                    return refuse("split", "both shares must be above 0 and together below 1");
                }
                Files::One {
                    file: file.clone(),
                    split,
                }
            }
            _ => {
                return refuse(
                    "train",
                    "give either `train`, `validation` and `test`, or `file` with `split`",
                );
            }
        };
        match (entry.kind, &entry.columns.text_b) {
            (InputKind::Pair, None) => {
                return refuse(
                    "columns.text_b",
                    "a pair needs the column of its second text",
                );
            }
            (InputKind::Single, Some(_)) => {
                return refuse("columns.text_b", "only goes with kind = \"pair\"");
            }
            _ => {}
        }
        let columns = [
            Some(&entry.columns.text),
            entry.columns.text_b.as_ref(),
            Some(&entry.columns.label),
        ];
        let named: Vec<&String> = columns.into_iter().flatten().collect();
        if named.iter().collect::<BTreeSet<_>>().len() != named.len() {
            return refuse("columns", "each must be a column of its own");
        }
        if !matches!(entry.delimiter, ',' | ';' | '\t' | '|') {
            return refuse("delimiter", "must be a comma, semicolon, tab or bar");
        }
        Ok(Self {
            files,
            name: entry.name,
            kind: entry.kind,
            problem: entry.problem,
            format: entry.format,
            delimiter: entry.delimiter,
            columns: entry.columns,
            max_bad_rows: entry.max_bad_rows,
        })
    }
}

impl TaskConfig {
    /// The task's files with their splits' names.
    pub fn paths_mut(&mut self) -> Vec<&mut PathBuf> {
        match &mut self.files {
            Files::PerSplit {
                train,
                validation,
                test,
            } => vec![train, validation, test],
            Files::One { file, .. } => vec![file],
        }
    }
}
