//! The rows of a silo's task, as training needs them.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::error::LearningError;

/// One sentence or two.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum InputKind {
    /// One text a row.
    Single,
    /// Two texts a row.
    Pair,
}

/// What is learnt.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Problem {
    /// One of these classes, in the order of the head's outputs.
    Classification {
        /// Names, distinct.
        classes: Vec<String>,
    },
    /// A number.
    Regression,
}

impl Problem {
    /// Outputs of the head that this problem reads.
    pub fn outputs(&self) -> usize {
        match self {
            Self::Classification { classes } => classes.len(),
            Self::Regression => 1,
        }
    }
}

/// What is right for a row.
#[derive(Clone, PartialEq, Debug)]
pub enum Label {
    /// A class by name.
    Class(String),
    /// A number.
    Value(f64),
}

/// One example.
#[derive(Clone, PartialEq, Debug)]
pub struct Row {
    /// The text, or the first of two.
    pub text: String,
    /// The second text of a pair.
    pub pair: Option<String>,
    /// What is right.
    pub label: Label,
}

/// Which rows.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Split {
    /// Trained on.
    Train,
    /// Chooses the best model.
    Validation,
    /// Reported.
    Test,
}

impl Split {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Train, Self::Validation, Self::Test];

    /// As it is written in errors and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Validation => "validation",
            Self::Test => "test",
        }
    }
}

/// A silo's task.
#[derive(Clone, PartialEq, Debug)]
pub struct TaskData {
    /// Single texts or pairs.
    pub kind: InputKind,
    /// Classification or regression.
    pub problem: Problem,
    /// Rows to train on; at least one.
    pub train: Vec<Row>,
    /// Rows that choose the best model; may be empty.
    pub validation: Vec<Row>,
    /// Rows to report on; may be empty.
    pub test: Vec<Row>,
}

impl TaskData {
    /// The classes of some training rows: their names, sorted.
    ///
    /// # Errors
    /// [`LearningError::Data`] if a row's label is a number.
    pub fn classes_of(train: &[Row]) -> Result<Vec<String>, LearningError> {
        let mut names = BTreeSet::new();
        for (index, row) in train.iter().enumerate() {
            match &row.label {
                Label::Class(name) => names.insert(name.clone()),
                Label::Value(_) => {
                    return Err(LearningError::Data(format!(
                        "training row {index} has a number for a label, not a class"
                    )));
                }
            };
        }
        Ok(names.into_iter().collect())
    }

    /// The rows of a split.
    pub fn rows(&self, split: Split) -> &[Row] {
        match split {
            Split::Train => &self.train,
            Split::Validation => &self.validation,
            Split::Test => &self.test,
        }
    }
}

/// What a model should say about some rows, in the rows' order.
#[derive(Clone, PartialEq, Debug)]
pub(crate) enum Targets {
    /// Indices of classes.
    Classes(Vec<i64>),
    /// Numbers as they stand in the data.
    Values(Vec<f64>),
}

impl Targets {
    /// Reads the labels of some rows.
    ///
    /// # Errors
    /// [`LearningError::Data`] that names the first label that is of the wrong kind, unknown or not finite.
    pub(crate) fn read(
        problem: &Problem,
        split: Split,
        rows: &[Row],
    ) -> Result<Self, LearningError> {
        let complaint = |index: usize, reason: String| {
            LearningError::Data(format!("{} row {index}: {reason}", split.name()))
        };
        match problem {
            Problem::Classification { classes } => rows
                .iter()
                .enumerate()
                .map(|(index, row)| match &row.label {
                    Label::Class(name) => classes
                        .iter()
                        .position(|class| class == name)
                        .map(|place| place as i64)
                        .ok_or_else(|| {
                            complaint(
                                index,
                                format!(
                                    "the label `{name}` does not occur in the training rows; known are {}",
                                    listed(classes)
                                ),
                            )
                        }),
                    Label::Value(value) => Err(complaint(
                        index,
                        format!("the label is the number {value}, but the task is a classification"),
                    )),
                })
                .collect::<Result<_, _>>()
                .map(Self::Classes),
            Problem::Regression => rows
                .iter()
                .enumerate()
                .map(|(index, row)| match &row.label {
                    Label::Value(value) if value.is_finite() => Ok(*value),
                    Label::Value(value) => {
                        Err(complaint(index, format!("the label {value} is not finite")))
                    }
                    Label::Class(name) => Err(complaint(
                        index,
                        format!("the label `{name}` is a class, but the task is a regression"),
                    )),
                })
                .collect::<Result<_, _>>()
                .map(Self::Values),
        }
    }
}

/// The first few names.
fn listed(names: &[String]) -> String {
    const SHOWN: usize = 12;
    let shown = names[..names.len().min(SHOWN)].join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(label: Label) -> Row {
        Row {
            text: "a".to_owned(),
            pair: None,
            label,
        }
    }

    fn class(name: &str) -> Row {
        row(Label::Class(name.to_owned()))
    }

    #[test]
    fn classes_are_the_training_labels_in_order() {
        let train = [class("b"), class("a"), class("b")];
        assert_eq!(TaskData::classes_of(&train).unwrap(), ["a", "b"]);
    }

    #[test]
    fn a_label_unseen_in_training_is_named() {
        let problem = Problem::Classification {
            classes: vec!["a".to_owned(), "b".to_owned()],
        };
        let error = Targets::read(&problem, Split::Test, &[class("a"), class("c")]).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("test row 1") && text.contains("`c`"),
            "{text}"
        );
    }

    #[test]
    fn labels_of_the_other_kind_are_refused() {
        let problem = Problem::Classification {
            classes: vec!["a".to_owned()],
        };
        assert!(Targets::read(&problem, Split::Train, &[row(Label::Value(1.0))]).is_err());
        assert!(Targets::read(&Problem::Regression, Split::Train, &[class("a")]).is_err());
        assert!(
            Targets::read(
                &Problem::Regression,
                Split::Train,
                &[row(Label::Value(f64::NAN))]
            )
            .is_err()
        );
        assert!(TaskData::classes_of(&[row(Label::Value(1.0))]).is_err());
    }
}
