//! CSV and JSONL.

use super::*;

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
fn a_csv_header_without_a_mapped_column_names_it_and_for_people_what_there_is() {
    let refusal = |text: &'static str| {
        from_reader(
            Path::new("rows.csv"),
            text.as_bytes(),
            Format::Csv,
            &mapping(),
        )
        .err()
        .unwrap()
    };
    let refused = |text| refusal(text).to_string();
    let error = refusal("It hurts,label\na,b\n");
    let (logged, told) = (error.to_string(), error.in_full());
    for text in [&logged, &told] {
        assert!(
            text.contains("rows.csv") && text.contains("`text`"),
            "{text}"
        );
    }
    assert!(
        !logged.contains("hurts"),
        "it may be a row's text: {logged}"
    );
    assert!(told.contains("`It hurts`"), "{told}");
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
