use super::*;

mod parquet;
mod splits;
mod text;

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
