//! Parquet.

use std::{fs, sync::Arc};

use ::parquet::{
    data_type::{ByteArray, ByteArrayType, DoubleType},
    file::{properties::WriterProperties, writer::SerializedFileWriter},
    schema::parser::parse_message_type,
};

use super::*;

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
