//! CSV with a header line.

use std::io::{self, BufRead as _, BufReader, Read};

use csv::{ByteRecord, ReaderBuilder};

use super::{FileFault, MAX_ROW_BYTES, Mapping, RawRow, RowFault, Rows, check_columns, row};

/// Read after the file's own last byte. A file that ends inside a quoted field swallows it; that is how such a file is known.
const END: &str = "concord-end-of-file-4f1c";

pub(super) fn rows(
    input: impl Read + Send + 'static,
    mapping: &Mapping,
) -> Result<Rows, FileFault> {
    let closed = Unix::new(input).chain(io::Cursor::new(format!("\n{END}\n")));
    let mut reader = ReaderBuilder::new()
        .delimiter(mapping.delimiter)
        .flexible(true)
        .from_reader(closed);
    let header = reader
        .byte_headers()
        .map_err(|error| format!("the header line cannot be read: {error}"))?
        .clone();
    let names: Vec<&str> = header
        .iter()
        .map(|name| std::str::from_utf8(name).map(str::trim))
        .collect::<Result<_, _>>()
        .map_err(|_| "the header line is not UTF-8".to_owned())?;
    if names == [END] {
        return Err("the file is empty; the first line must name the columns"
            .to_owned()
            .into());
    }
    check_columns(mapping, names.iter().copied())?;
    if let Some(twice) = mapping
        .columns()
        .find(|column| names.iter().filter(|name| *name == column).count() > 1)
    {
        return Err(format!("the header names column `{twice}` twice").into());
    }
    let columns = names.iter().map(|name| (*name).to_owned()).collect();
    Ok(Box::new(CsvRows {
        reader,
        columns,
        mapping: mapping.clone(),
        ended: false,
    }))
}

/// Turns `\r\n` into `\n`, so that lines can be counted by their one ending.
struct Unix<R> {
    input: BufReader<R>,
    /// A `\r` that may belong to a line's end.
    held: bool,
}

impl<R: Read> Unix<R> {
    fn new(input: R) -> Self {
        Self {
            input: BufReader::new(input),
            held: false,
        }
    }
}

impl<R: Read> Read for Unix<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut written = 0;
        while written < buffer.len() {
            if written > 0 && self.input.buffer().is_empty() {
                break;
            }
            let Some(&next) = self.input.fill_buf()?.first() else {
                if self.held {
                    self.held = false;
                    buffer[written] = b'\r';
                    written += 1;
                }
                break;
            };
            if self.held && next != b'\n' {
                self.held = false;
                buffer[written] = b'\r';
                written += 1;
                continue;
            }
            self.input.consume(1);
            self.held = next == b'\r';
            if !self.held {
                buffer[written] = next;
                written += 1;
            }
        }
        Ok(written)
    }
}

struct CsvRows<R> {
    reader: csv::Reader<R>,
    columns: Vec<String>,
    mapping: Mapping,
    ended: bool,
}

impl<R: Read> Iterator for CsvRows<R> {
    type Item = Result<RawRow, RowFault>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let mut record = ByteRecord::new();
        match self.reader.read_byte_record(&mut record) {
            Ok(true) => {}
            Ok(false) => {
                self.ended = true;
                return Some(Err(RowFault::Broken(
                    "the file ends inside a quoted field; close the quote".to_owned(),
                )));
            }
            Err(error) => {
                self.ended = true;
                return Some(Err(RowFault::Broken(error.to_string())));
            }
        }
        // Counted from the row's end: the position of its beginning is before any empty lines above it.
        let within = record.as_slice().split(|byte| *byte == b'\n').count() as u64;
        let line = self.reader.position().line().saturating_sub(within);
        if record.len() == 1 && record.get(0) == Some(END.as_bytes()) {
            self.ended = true;
            return None;
        }
        if record
            .iter()
            .next_back()
            .is_some_and(|last| last.ends_with(format!("\n{END}\n").as_bytes()))
        {
            self.ended = true;
            // This row has no end of its own that was counted.
            let line = line + 1;
            return Some(Err(RowFault::Broken(format!(
                "the quote that opens in the row at line {line} is never closed"
            ))));
        }
        Some(self.read_row(&record, line))
    }
}

impl<R> CsvRows<R> {
    fn read_row(&self, record: &ByteRecord, line: u64) -> Result<RawRow, RowFault> {
        let bad = |reason: String| Err(RowFault::Bad { line, reason });
        if record.len() != self.columns.len() {
            return bad(format!(
                "{} fields, but the header has {}",
                record.len(),
                self.columns.len()
            ));
        }
        if record.as_slice().len() > MAX_ROW_BYTES {
            return bad(format!("longer than {MAX_ROW_BYTES} bytes"));
        }
        row(&self.mapping, line, |column| {
            let place = self
                .columns
                .iter()
                .position(|name| name == column)
                .ok_or_else(|| format!("no column `{column}`"))?;
            std::str::from_utf8(record.get(place).unwrap_or_default())
                .map(str::to_owned)
                .map_err(|_| format!("column `{column}` is not UTF-8"))
        })
    }
}
