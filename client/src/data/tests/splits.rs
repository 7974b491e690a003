//! A task's files, cut into splits.

use std::fs;

use concord_learning::data::{InputKind, Label, Problem};

use super::*;
use crate::config::{Files, ProblemKind, TaskConfig};

fn task(folder: &Path, limit: u64) -> TaskConfig {
    TaskConfig {
        name: "main".to_owned(),
        kind: InputKind::Single,
        problem: ProblemKind::Classification,
        format: Format::Csv,
        delimiter: ',',
        columns: Columns::default(),
        files: Files::PerSplit {
            train: folder.join("train.csv"),
            validation: folder.join("validation.csv"),
            test: folder.join("test.csv"),
        },
        max_bad_rows: limit,
    }
}

fn write_splits(folder: &Path, train: &str, validation: &str, test: &str) {
    for (split, rows) in [("train", train), ("validation", validation), ("test", test)] {
        fs::write(
            folder.join(format!("{split}.csv")),
            format!("text,label\n{rows}"),
        )
        .unwrap();
    }
}

#[test]
fn splits_are_read_with_the_training_labels_as_classes() {
    let folder = tempfile::tempdir().unwrap();
    write_splits(
        folder.path(),
        "a,spam\nb,ham\nc,spam\n",
        "d,ham\n",
        "e,spam\n",
    );
    let loaded = load_splits(&task(folder.path(), 0)).unwrap();
    let data = loaded.data;
    assert_eq!(
        data.problem,
        Problem::Classification {
            classes: vec!["ham".to_owned(), "spam".to_owned()]
        }
    );
    assert_eq!(data.train.len(), 3);
    assert_eq!(data.train[1].label, Label::Class("ham".to_owned()));
    assert_eq!(
        (loaded.skipped, data.validation.len(), data.test.len()),
        (0, 1, 1)
    );
}

#[test]
fn bad_rows_up_to_the_limit_are_skipped_and_told() {
    let folder = tempfile::tempdir().unwrap();
    write_splits(
        folder.path(),
        "a,spam\n,ham\nb,ham\n",
        "d,\nd,ham\n",
        "e,spam\n",
    );
    let loaded = load_splits(&task(folder.path(), 2)).unwrap();
    assert_eq!(loaded.skipped, 2);
    assert_eq!(loaded.data.train.len(), 2);
    assert!(loaded.first_skipped[0].ends_with("train.csv:3: empty text in column `text`"));
    assert!(loaded.first_skipped[1].ends_with("validation.csv:2: no label in column `label`"));
}

#[test]
fn one_bad_row_more_than_the_limit_stops_with_the_first_few() {
    let folder = tempfile::tempdir().unwrap();
    write_splits(
        folder.path(),
        "a,spam\n,ham\nb,ham\n,x\n",
        "d,\n",
        "e,spam\n",
    );
    let error = load_splits(&task(folder.path(), 1)).unwrap_err();
    let text = error.to_string();
    assert!(
        matches!(error, DataError::BadRows { limit: 1, .. }),
        "{text}"
    );
    assert!(
        text.contains("train.csv:3:") && text.contains("train.csv:5:"),
        "{text}"
    );
    assert!(load_splits(&task(folder.path(), 0)).is_err());
}

#[test]
fn a_thousand_bad_rows_are_not_all_listed() {
    let folder = tempfile::tempdir().unwrap();
    write_splits(folder.path(), &",x\n".repeat(1_000), "d,x\n", "e,x\n");
    let text = load_splits(&task(folder.path(), 0))
        .unwrap_err()
        .to_string();
    assert_eq!(text.matches("train.csv").count(), 5, "{text}");
}

#[test]
fn a_label_unseen_in_training_is_an_error_with_file_and_line_and_the_label_for_people_only() {
    let folder = tempfile::tempdir().unwrap();
    write_splits(
        folder.path(),
        "a,spam\nb,ham\n",
        "c,ham\nd,eggs\n",
        "e,spam\n",
    );
    let check = |error: DataError, place: &str, label: &str| {
        let (logged, told) = (error.to_string(), error.in_full());
        assert!(
            logged.contains(place) && !logged.contains(label),
            "{logged}"
        );
        assert!(told.contains(place) && told.contains(label), "{told}");
    };
    let error = load_splits(&task(folder.path(), 100)).unwrap_err();
    check(error, "validation.csv:3", "\"eggs\"");

    let problem = Problem::Classification {
        classes: vec!["ham".to_owned()],
    };
    let test = folder.path().join("test.csv");
    let error = load_evaluation(&task(folder.path(), 100), &test, &problem).unwrap_err();
    check(error, "test.csv:2", "\"spam\"");
}

#[test]
fn a_regression_wants_finite_numbers() {
    let folder = tempfile::tempdir().unwrap();
    write_splits(
        folder.path(),
        "a,1.5\nb,many\nc,NaN\nd,-2\n",
        "e,3e2\n",
        "f,0\n",
    );
    let regression = TaskConfig {
        problem: ProblemKind::Regression,
        ..task(folder.path(), 2)
    };
    let loaded = load_splits(&regression).unwrap();
    assert_eq!(loaded.skipped, 2);
    assert!(loaded.first_skipped[0].ends_with("train.csv:3: the label is no finite number"));
    let labels: Vec<&Label> = loaded.data.train.iter().map(|row| &row.label).collect();
    assert_eq!(labels, [&Label::Value(1.5), &Label::Value(-2.0)]);
}

#[test]
fn an_empty_split_and_a_single_class_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    write_splits(folder.path(), "a,x\nb,y\n", "", "e,x\n");
    let text = load_splits(&task(folder.path(), 0))
        .unwrap_err()
        .to_string();
    assert!(text.contains("validation"), "{text}");
    write_splits(folder.path(), "a,x\nb,x\n", "c,x\n", "e,x\n");
    let text = load_splits(&task(folder.path(), 0))
        .unwrap_err()
        .to_string();
    assert!(text.contains("same label"), "{text}");
}

#[test]
fn one_file_is_cut_the_same_way_every_time_and_equal_texts_stay_together() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("all.csv");
    let rows: Vec<String> = (0..1_000)
        .map(|index| format!("text {},{}\n", index / 2, ["x", "y"][index % 2]))
        .collect();
    fs::write(&file, format!("text,label\n{}", rows.concat())).unwrap();
    let one = |seed| TaskConfig {
        files: Files::One {
            file: file.clone(),
            split: SplitRule {
                seed,
                validation: 0.2,
                test: 0.3,
            },
        },
        ..task(folder.path(), 0)
    };
    let first = load_splits(&one(1)).unwrap().data;
    assert_eq!(first, load_splits(&one(1)).unwrap().data);
    assert_ne!(first, load_splits(&one(2)).unwrap().data);
    assert_eq!(
        first.train.len() + first.validation.len() + first.test.len(),
        1_000
    );
    assert!(
        (150..250).contains(&first.validation.len()),
        "{}",
        first.validation.len()
    );
    assert!(
        (240..360).contains(&first.test.len()),
        "{}",
        first.test.len()
    );
    for rows in [&first.train, &first.validation, &first.test] {
        for pair in rows.chunks(2) {
            assert_eq!(pair[0].text, pair[1].text);
        }
    }

    fs::write(&file, format!("text,label\nnew,x\n{}", rows.concat())).unwrap();
    let grown = load_splits(&one(1)).unwrap().data;
    assert!(
        first.test.iter().all(|row| grown.test.contains(row)),
        "old rows stay where they were"
    );
}
