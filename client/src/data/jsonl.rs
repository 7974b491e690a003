//! One JSON object a line.

use std::io::{BufRead, BufReader, Read, Take};

use serde_json::{Map, Value};

use super::{MAX_ROW_BYTES, Mapping, RawRow, RowFault, Rows, row};

pub(super) fn rows(input: impl Read + Send + 'static, mapping: &Mapping) -> Rows {
    Box::new(JsonlRows {
        input: BufReader::new(input).take(0),
        mapping: mapping.clone(),
        line: 0,
        ended: false,
    })
}

struct JsonlRows<R> {
    input: Take<R>,
    mapping: Mapping,
    line: u64,
    ended: bool,
}

impl<R: BufRead> Iterator for JsonlRows<R> {
    type Item = Result<RawRow, RowFault>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.ended {
            let mut bytes = Vec::new();
            self.line += 1;
            self.input.set_limit(MAX_ROW_BYTES as u64 + 1);
            match self.input.read_until(b'\n', &mut bytes) {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) => {
                    self.ended = true;
                    return Some(Err(RowFault::Broken(error.to_string())));
                }
            }
            if bytes.len() > MAX_ROW_BYTES {
                return Some(self.skip_rest(&bytes));
            }
            if self.line == 1 && bytes.starts_with(b"\xEF\xBB\xBF") {
                bytes.drain(..3);
            }
            if !bytes.trim_ascii().is_empty() {
                return Some(self.read_row(&bytes));
            }
        }
        self.ended = true;
        None
    }
}

impl<R: BufRead> JsonlRows<R> {
    /// Reads on to the end of a line that is too long to keep.
    fn skip_rest(&mut self, begun: &[u8]) -> Result<RawRow, RowFault> {
        let mut ended = begun.ends_with(b"\n");
        let mut part = Vec::new();
        while !ended {
            part.clear();
            self.input.set_limit(MAX_ROW_BYTES as u64);
            match self.input.read_until(b'\n', &mut part) {
                Ok(0) => break,
                Ok(_) => ended = part.ends_with(b"\n"),
                Err(error) => {
                    self.ended = true;
                    return Err(RowFault::Broken(error.to_string()));
                }
            }
        }
        Err(RowFault::Bad {
            line: self.line,
            reason: format!("longer than {MAX_ROW_BYTES} bytes"),
        })
    }

    fn read_row(&self, bytes: &[u8]) -> Result<RawRow, RowFault> {
        let bad = |reason: String| RowFault::Bad {
            line: self.line,
            reason,
        };
        let text = std::str::from_utf8(bytes).map_err(|_| bad("not UTF-8".to_owned()))?;
        let object: Map<String, Value> = serde_json::from_str(text).map_err(|error| {
            bad(format!(
                "no JSON object: {:?} error at column {}",
                error.classify(),
                error.column()
            ))
        })?;
        let label = self.mapping.label.as_deref();
        row(&self.mapping, self.line, |column| {
            match object.get(column) {
                None | Some(Value::Null) if label == Some(column) => Ok(String::new()),
                None => Err(format!("no column `{column}`")),
                Some(Value::String(text)) => Ok(text.clone()),
                Some(Value::Number(number)) if label == Some(column) => Ok(whole(number)),
                Some(Value::Bool(value)) if label == Some(column) => Ok(value.to_string()),
                Some(Value::Null) => Ok(String::new()),
                Some(_) if label == Some(column) => Err(format!(
                    "column `{column}` must hold a text, a number, true or false"
                )),
                Some(_) => Err(format!("column `{column}` must hold a text")),
            }
        })
    }
}

/// 1.0 and 1 are the same label: some writers turn whole numbers into floats.
fn whole(number: &serde_json::Number) -> String {
    match number.as_f64() {
        Some(value) if number.is_f64() => super::parquet::number_text(value),
        _ => number.to_string(),
    }
}
