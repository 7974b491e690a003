use std::{fs, sync::Arc};

use ::parquet::{
    data_type::{ByteArray, ByteArrayType, DoubleType},
    file::{properties::WriterProperties, writer::SerializedFileWriter},
    schema::parser::parse_message_type,
};
use concord_learning::data::{InputKind, Label, Problem};

use super::*;
use crate::config::{Files, ProblemKind, TaskConfig};

fn mapping() -> Mapping {
    Mapping {
        text: "text".to_owned(),
        text_b: None,
        label: Some("label".to_owned()),
        delimiter: b',',
    }
}

fn pair_mapping() -> Mapping {
    Mapping {
        text_b: Some("second".to_owned()),
        ..mapping()
    }
}

/// Each row as `line text|text_b|label`, each fault as `line !reason`.
fn told(rows: Rows) -> Vec<String> {
    rows.map(|row| match row {
        Ok(row) => format!(
            "{} {}|{}|{}",
            row.line,
            row.text,
            row.text_b.unwrap_or_default(),
            row.label.unwrap_or_default()
        ),
        Err(RowFault::Bad { line, reason }) => format!("{line} !{reason}"),
        Err(RowFault::Broken(reason)) => format!("broken: {reason}"),
    })
    .collect()
}

fn csv(text: &[u8], mapping: &Mapping) -> Vec<String> {
    told(
        from_reader(
            Path::new("in"),
            io::Cursor::new(text.to_vec()),
            Format::Csv,
            mapping,
        )
        .unwrap(),
    )
}

fn jsonl(text: &[u8], mapping: &Mapping) -> Vec<String> {
    told(
        from_reader(
            Path::new("in"),
            io::Cursor::new(text.to_vec()),
            Format::Jsonl,
            mapping,
        )
        .unwrap(),
    )
}

#[test]
fn csv_rows_come_with_the_line_they_begin_at() {
    let rows = csv(
        b"label,text\nham,\"two\nlines, \"\"quoted\"\"\"\nspam,last",
        &mapping(),
    );
    assert_eq!(rows, ["2 two\nlines, \"quoted\"||ham", "4 last||spam"]);
}

#[test]
fn csv_columns_are_found_by_name_with_bom_crlf_and_other_delimiters() {
    let text = b"\xEF\xBB\xBFid;second;text;label\r\n1;b;a; x \r\n";
    let mapping = Mapping {
        delimiter: b';',
        ..pair_mapping()
    };
    assert_eq!(csv(text, &mapping), ["2 a|b|x"]);
}

#[test]
fn csv_lines_are_counted_through_empty_lines_and_both_line_endings() {
    let text = b"text,label\r\n\r\na,x\r\n\n\n\"b\r\nc\",y\r\nshort\r\n";
    let rows = csv(text, &mapping());
    assert_eq!(rows[..2], ["3 a||x", "6 b\nc||y"]);
    assert!(rows[2].starts_with("8 !1 fields"), "{rows:?}");
}

#[test]
fn each_kind_of_bad_csv_row_is_reported_and_the_next_is_read() {
    let mut text = b"text,label\n  ,a\nfine,a\nno label,\nshort\ntoo,many,fields\n".to_vec();
    text.extend_from_slice(b"bad \xFF byte,a\ngood,b\n");
    assert_eq!(
        csv(&text, &mapping()),
        [
            "2 !empty text in column `text`",
            "3 fine||a",
            "4 !no label in column `label`",
            "5 !1 fields, but the header has 2",
            "6 !3 fields, but the header has 2",
            "7 !column `text` is not UTF-8",
            "8 good||b",
        ]
    );
}

#[test]
fn a_csv_quote_that_is_never_closed_breaks_the_file_at_its_line() {
    let rows = csv(b"text,label\na,x\n\"open,x\nb,y\n", &mapping());
    assert_eq!(rows[0], "2 a||x");
    assert_eq!(rows.len(), 2);
    assert!(
        rows[1].contains("line 3") && rows[1].contains("never closed"),
        "{}",
        rows[1]
    );
}

#[test]
fn a_csv_header_without_a_mapped_column_names_it_and_what_there_is() {
    let refused = |text: &'static str| {
        from_reader(
            Path::new("rows.csv"),
            text.as_bytes(),
            Format::Csv,
            &mapping(),
        )
        .err()
        .unwrap()
        .to_string()
    };
    let error = refused("txt,label\na,b\n");
    assert!(
        error.contains("rows.csv") && error.contains("`text`") && error.contains("`txt`"),
        "{error}"
    );
    assert!(refused("").contains("empty"));
    assert!(refused("text,label,text\n").contains("twice"));
}

#[test]
fn jsonl_takes_texts_and_labels_that_are_texts_numbers_or_booleans() {
    let text = b"\xEF\xBB\xBF{\"text\":\"a\",\"label\":\"x\",\"more\":[1]}\n\n{\"label\":1.0,\"text\":\"b\"}\n{\"label\":1,\"text\":\"c\"}\n{\"label\":true,\"text\":\"d\"}\n{\"label\":-0.5,\"text\":\"e\"}";
    assert_eq!(
        jsonl(text, &mapping()),
        ["1 a||x", "3 b||1", "4 c||1", "5 d||true", "6 e||-0.5"]
    );
}

#[test]
fn each_kind_of_bad_jsonl_row_is_reported_and_the_next_is_read() {
    let mut text = b"{\"text\":\"a\"\n[1]\n{\"label\":\"x\"}\n{\"text\":3,\"label\":\"x\"}\n{\"text\":\"a\",\"label\":null}\n{\"text\":\"a\"}\n{\"text\":\"a\",\"label\":[]}\n{\"text\":\"\xFF\",\"label\":\"x\"}\n".to_vec();
    text.extend_from_slice(
        format!("{{\"text\":\"{}\"}}\n", "y".repeat(2 * MAX_ROW_BYTES)).as_bytes(),
    );
    text.extend_from_slice(b"{\"text\":\"good\",\"label\":\"x\"}\n");
    let rows = jsonl(&text, &mapping());
    let expected = [
        "1 !no JSON object",
        "2 !no JSON object",
        "3 !no column `text`",
        "4 !column `text` must hold a text",
        "5 !no label in column `label`",
        "6 !no label in column `label`",
        "7 !column `label` must hold a text, a number, true or false",
        "8 !not UTF-8",
        "9 !longer than",
        "10 good||x",
    ];
    assert_eq!(rows.len(), expected.len(), "{rows:?}");
    for (row, expected) in rows.iter().zip(expected) {
        assert!(row.starts_with(expected), "{row} is not {expected}");
    }
}

#[test]
fn a_fault_never_quotes_the_row() {
    for row in jsonl(b"{\"text\": \"secret-canary\" \"label\"}\n", &mapping()) {
        assert!(!row.contains("canary"), "{row}");
    }
    for row in csv(b"text,label\nsecret-canary\n", &mapping()) {
        assert!(!row.contains("canary"), "{row}");
    }
}

/// Text, second text and a numeric label, each of which may be missing.
type ParquetRow<'a> = (Option<&'a [u8]>, Option<f64>);

fn write_parquet(path: &Path, groups: &[&[ParquetRow<'_>]]) {
    let schema = "message rows { optional byte_array text (UTF8); optional double label; }";
    let mut writer = SerializedFileWriter::new(
        File::create(path).unwrap(),
        Arc::new(parse_message_type(schema).unwrap()),
        Arc::new(WriterProperties::builder().build()),
    )
    .unwrap();
    for rows in groups {
        let mut group = writer.next_row_group().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        let texts: Vec<ByteArray> = rows
            .iter()
            .filter_map(|row| row.0.map(|text| ByteArray::from(text.to_vec())))
            .collect();
        let levels: Vec<i16> = rows.iter().map(|row| i16::from(row.0.is_some())).collect();
        column
            .typed::<ByteArrayType>()
            .write_batch(&texts, Some(&levels), None)
            .unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        let labels: Vec<f64> = rows.iter().filter_map(|row| row.1).collect();
        let levels: Vec<i16> = rows.iter().map(|row| i16::from(row.1.is_some())).collect();
        column
            .typed::<DoubleType>()
            .write_batch(&labels, Some(&levels), None)
            .unwrap();
        column.close().unwrap();
        group.close().unwrap();
    }
    writer.close().unwrap();
}

#[test]
fn parquet_rows_are_numbered_through_all_row_groups() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.parquet");
    write_parquet(
        &path,
        &[
            &[
                (Some(b"a"), Some(1.0)),
                (None, Some(2.0)),
                (Some(b"c"), None),
            ],
            &[(Some(b"bad \xFF"), Some(1.0)), (Some(b"e"), Some(0.25))],
        ],
    );
    assert_eq!(
        told(open(&path, Format::Parquet, &mapping()).unwrap()),
        [
            "1 a||1",
            "2 !empty text in column `text`",
            "3 !no label in column `label`",
            "4 !column `text` is not UTF-8",
            "5 e||0.25",
        ]
    );
}

#[test]
fn many_parquet_rows_come_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.parquet");
    let texts: Vec<String> = (0..2_000).map(|index| format!("text {index}")).collect();
    let rows: Vec<ParquetRow<'_>> = texts
        .iter()
        .enumerate()
        .map(|(index, text)| (Some(text.as_bytes()), Some(index as f64)))
        .collect();
    write_parquet(&path, &[&rows[..1_500], &rows[1_500..]]);
    let read: Vec<RawRow> = open(&path, Format::Parquet, &mapping())
        .unwrap()
        .map(|row| row.unwrap())
        .collect();
    assert_eq!(read.len(), 2_000);
    for (index, row) in read.iter().enumerate() {
        assert_eq!(row.line, index as u64 + 1);
        assert_eq!(row.text, texts[index]);
        assert_eq!(row.label.as_deref(), Some(index.to_string().as_str()));
    }
}

#[test]
fn a_parquet_file_of_the_wrong_kind_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.parquet");
    write_parquet(&path, &[&[(Some(b"a"), Some(1.0))]]);
    let refused = |mapping: &Mapping| {
        open(&path, Format::Parquet, mapping)
            .err()
            .unwrap()
            .to_string()
    };
    assert!(refused(&pair_mapping()).contains("`second`"));
    let swapped = Mapping {
        text: "label".to_owned(),
        label: Some("text".to_owned()),
        ..mapping()
    };
    assert!(
        refused(&swapped).contains("`label` is DOUBLE"),
        "{}",
        refused(&swapped)
    );
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() - 9]).unwrap();
    assert!(refused(&mapping()).contains("rows.parquet"));
}

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
fn a_label_unseen_in_training_is_an_error_with_label_file_and_line() {
    let folder = tempfile::tempdir().unwrap();
    write_splits(
        folder.path(),
        "a,spam\nb,ham\n",
        "c,ham\nd,eggs\n",
        "e,spam\n",
    );
    let text = load_splits(&task(folder.path(), 100))
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("validation.csv:3") && text.contains("\"eggs\""),
        "{text}"
    );

    let problem = Problem::Classification {
        classes: vec!["ham".to_owned()],
    };
    let test = folder.path().join("test.csv");
    let text = load_evaluation(&task(folder.path(), 100), &test, &problem)
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("test.csv:2") && text.contains("\"spam\""),
        "{text}"
    );
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
