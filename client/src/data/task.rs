//! From a task's files to its splits.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use concord_learning::data::{InputKind, Label, Problem, Row, TaskData};

use super::{BadRows, DataError, Mapping, open, split::Part};
use crate::config::{Files, ProblemKind, TaskConfig};

/// Most classes of a classification task; more means that the label column holds something else.
const MAX_CLASSES: usize = 10_000;

/// A task's rows, and what was skipped on the way.
#[derive(Clone, PartialEq, Debug)]
pub struct Loaded {
    /// The rows.
    pub data: TaskData,
    /// Bad rows that were skipped.
    pub skipped: u64,
    /// The first few of them, each as `file:line: reason`.
    pub first_skipped: Vec<String>,
}

/// A row whose label is still a text.
struct Pending {
    line: u64,
    text: String,
    text_b: Option<String>,
    label: String,
}

/// Reads a task's three splits.
///
/// # Errors
/// For a file that cannot be read, more bad rows than `max_bad_rows`, an empty split, fewer than two classes, or a validation
/// or test row whose label no training row has.
pub fn load_splits(task: &TaskConfig) -> Result<Loaded, DataError> {
    let mut bad = BadRows::new(task.max_bad_rows);
    let [train, validation, test] = match &task.files {
        Files::PerSplit {
            train,
            validation,
            test,
        } => [
            (train, read(task, train, &mut bad)?),
            (validation, read(task, validation, &mut bad)?),
            (test, read(task, test, &mut bad)?),
        ],
        Files::One { file, split } => {
            let mut parts = [Vec::new(), Vec::new(), Vec::new()];
            for row in read(task, file, &mut bad)? {
                let place = match split.part(&row.text, row.text_b.as_deref()) {
                    Part::Train => 0,
                    Part::Validation => 1,
                    Part::Test => 2,
                };
                parts[place].push(row);
            }
            parts.map(|rows| (file, rows))
        }
    };
    for ((_, rows), split) in [
        (&train, "training"),
        (&validation, "validation"),
        (&test, "test"),
    ] {
        if rows.is_empty() {
            return Err(DataError::EmptySplit {
                task: task.name.clone(),
                split,
            });
        }
    }
    let problem = match task.problem {
        ProblemKind::Classification => Problem::Classification {
            classes: classes_of(task, &train.1)?,
        },
        ProblemKind::Regression => Problem::Regression,
    };
    let data = TaskData {
        kind: task.kind,
        train: labelled(&problem, train)?,
        validation: labelled(&problem, validation)?,
        test: labelled(&problem, test)?,
        problem,
    };
    Ok(Loaded {
        data,
        skipped: bad.count(),
        first_skipped: bad.first().to_vec(),
    })
}

/// Reads one labelled file for an evaluation of a model that knows `problem`.
///
/// # Errors
/// As [`load_splits`].
pub fn load_evaluation(
    task: &TaskConfig,
    file: &Path,
    problem: &Problem,
) -> Result<(Vec<Row>, BadRows), DataError> {
    let mut bad = BadRows::new(task.max_bad_rows);
    let rows = read(task, file, &mut bad)?;
    if rows.is_empty() {
        return Err(DataError::EmptySplit {
            task: task.name.clone(),
            split: "evaluation",
        });
    }
    let rows = labelled(problem, (&file.to_path_buf(), rows))?;
    Ok((rows, bad))
}

impl TaskConfig {
    /// What readers take from this task's rows.
    pub fn mapping(&self, with_label: bool) -> Mapping {
        Mapping {
            text: self.columns.text.clone(),
            text_b: match self.kind {
                InputKind::Single => None,
                InputKind::Pair => self.columns.text_b.clone(),
            },
            label: with_label.then(|| self.columns.label.clone()),
            delimiter: self.delimiter as u8,
        }
    }
}

fn read(task: &TaskConfig, file: &Path, bad: &mut BadRows) -> Result<Vec<Pending>, DataError> {
    let rows = open(file, task.format, &task.mapping(true))?;
    let mut kept = Vec::new();
    super::for_each(file, rows, bad, |row| {
        let label = row.label.unwrap_or_default();
        if task.problem == ProblemKind::Regression {
            number(&label).ok_or("the label is no finite number")?;
        }
        kept.push(Pending {
            line: row.line,
            text: row.text,
            text_b: row.text_b,
            label,
        });
        Ok(())
    })?;
    Ok(kept)
}

fn number(text: &str) -> Option<f64> {
    text.parse::<f64>().ok().filter(|value| value.is_finite())
}

fn classes_of(task: &TaskConfig, train: &[Pending]) -> Result<Vec<String>, DataError> {
    let classes: BTreeSet<&str> = train.iter().map(|row| row.label.as_str()).collect();
    let refuse = |reason: String| {
        Err(DataError::Labels {
            task: task.name.clone(),
            reason,
        })
    };
    if classes.len() < 2 {
        return refuse(
            "its training rows all have the same label; a classification needs two or more"
                .to_owned(),
        );
    }
    if classes.len() > MAX_CLASSES {
        return refuse(format!(
            "its training rows have {} different labels, more than {MAX_CLASSES}; is `columns.label` the right column, or the problem a regression?",
            classes.len()
        ));
    }
    Ok(classes.into_iter().map(str::to_owned).collect())
}

fn labelled(
    problem: &Problem,
    (file, rows): (&PathBuf, Vec<Pending>),
) -> Result<Vec<Row>, DataError> {
    let known: BTreeSet<&str> = match problem {
        Problem::Classification { classes } => classes.iter().map(String::as_str).collect(),
        Problem::Regression => BTreeSet::new(),
    };
    rows.into_iter()
        .map(|row| {
            let label = match problem {
                Problem::Classification { .. } => known
                    .contains(row.label.as_str())
                    .then(|| Label::Class(row.label.clone())),
                Problem::Regression => number(&row.label).map(Label::Value),
            };
            let label = label.ok_or_else(|| DataError::UnseenLabel {
                file: file.clone(),
                line: row.line,
                label: row.label.chars().take(80).collect(),
            })?;
            Ok(Row {
                text: row.text,
                pair: row.text_b,
                label,
            })
        })
        .collect()
}
