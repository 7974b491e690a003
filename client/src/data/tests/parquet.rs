//! Parquet.

use std::{fs, sync::Arc};

use ::parquet::{
    basic::{Compression, GzipLevel, ZstdLevel},
    data_type::{ByteArray, ByteArrayType, DoubleType},
    file::{properties::WriterProperties, writer::SerializedFileWriter},
    schema::parser::parse_message_type,
};
use concord_learning::data::InputKind;

use super::*;
use crate::config::{Files, ProblemKind, TaskConfig};

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

/// Verdict, question, an answer and a column that nobody asks for, under names of their own.
const PAIRS: [&str; 4] = ["verdict", "question", "note", "answer"];

fn write_pairs(path: &Path, rows: &[[String; 4]], compression: Compression) {
    let columns = PAIRS.map(|name| format!("required byte_array {name} (UTF8);"));
    let schema = format!("message pairs {{ {} }}", columns.concat());
    let properties = WriterProperties::builder()
        .set_compression(compression)
        .build();
    let mut writer = SerializedFileWriter::new(
        File::create(path).unwrap(),
        Arc::new(parse_message_type(&schema).unwrap()),
        Arc::new(properties),
    )
    .unwrap();
    let mut group = writer.next_row_group().unwrap();
    for place in 0..PAIRS.len() {
        let texts: Vec<ByteArray> = rows
            .iter()
            .map(|row| ByteArray::from(row[place].as_str()))
            .collect();
        let mut column = group.next_column().unwrap().unwrap();
        column
            .typed::<ByteArrayType>()
            .write_batch(&texts, None, None)
            .unwrap();
        column.close().unwrap();
    }
    let written = group.close().unwrap();
    assert_eq!(written.column(0).compression(), compression);
    writer.close().unwrap();
}

#[test]
fn compressed_parquet_pairs_with_columns_of_other_names_are_cut_as_the_same_rows_in_csv_are() {
    let folder = tempfile::tempdir().unwrap();
    let rows: Vec<[String; 4]> = (0..300)
        .map(|row| {
            [
                ["fits", "does not"][row % 2].to_owned(),
                format!("question {}", row / 3),
                "nothing".to_owned(),
                format!("answer {row}"),
            ]
        })
        .collect();
    let task = |format, file: &Path| TaskConfig {
        name: "pairs".to_owned(),
        kind: InputKind::Pair,
        problem: ProblemKind::Classification,
        format,
        delimiter: ',',
        columns: Columns {
            text: "question".to_owned(),
            text_b: Some("answer".to_owned()),
            label: "verdict".to_owned(),
        },
        files: Files::One {
            file: file.to_owned(),
            split: SplitRule {
                seed: 3,
                validation: 0.2,
                test: 0.2,
            },
        },
        max_bad_rows: 0,
    };
    let csv = folder.path().join("pairs.csv");
    let lines: Vec<String> = rows.iter().map(|row| row.join(",")).collect();
    let text = format!("{}\n{}\n", PAIRS.join(","), lines.join("\n"));
    fs::write(&csv, text).unwrap();
    let expected = load_splits(&task(Format::Csv, &csv)).unwrap().data;
    for rows in [&expected.train, &expected.validation, &expected.test] {
        assert!(rows.len() > 30, "{}", rows.len());
    }

    let file = folder.path().join("pairs.parquet");
    for compression in [
        Compression::SNAPPY,
        Compression::ZSTD(ZstdLevel::default()),
        Compression::GZIP(GzipLevel::default()),
    ] {
        write_pairs(&file, &rows, compression);
        let loaded = load_splits(&task(Format::Parquet, &file)).unwrap();
        assert_eq!(loaded.data, expected, "{compression}");
    }
}
