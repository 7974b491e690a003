//! Flat columns of a Parquet file, a bounded number of rows at a time.

use std::{fs::File, sync::Arc};

use parquet::{
    basic::{ConvertedType, Type as Physical},
    column::reader::{ColumnReader, ColumnReaderImpl},
    data_type::DataType,
    errors::ParquetError,
    file::{
        reader::{FileReader as _, RowGroupReader},
        serialized_reader::SerializedFileReader,
    },
    schema::types::ColumnDescriptor,
};

use super::{FileFault, MAX_ROW_BYTES, Mapping, RawRow, RowFault, Rows, check_columns, row};

/// Rows decoded at once.
const ROWS_AT_ONCE: usize = 512;

/// A value as text, or why it cannot be one.
type Cell = Result<String, &'static str>;

pub(super) fn rows(file: File, mapping: &Mapping) -> Result<Rows, FileFault> {
    let reader =
        SerializedFileReader::new(file).map_err(|error| format!("no Parquet file: {error}"))?;
    let schema = reader.metadata().file_metadata().schema_descr_ptr();
    let names: Vec<String> = schema
        .columns()
        .iter()
        .map(|column| column.path().string())
        .collect();
    check_columns(mapping, names.iter().map(String::as_str))?;
    let mut wanted = Vec::new();
    for column in mapping.columns() {
        let Some(place) = names.iter().position(|name| name == column) else {
            return Err(format!("there is no column `{column}`").into());
        };
        let descriptor = schema.column(place);
        check_type(&descriptor, mapping.label.as_deref() == Some(column))?;
        wanted.push(Wanted {
            name: column.to_owned(),
            place,
            descriptor,
        });
    }
    Ok(Box::new(ParquetRows {
        groups: reader.num_row_groups(),
        reader,
        wanted,
        mapping: mapping.clone(),
        next_group: 0,
        open: None,
        cells: Vec::new(),
        taken: 0,
        row: 0,
    }))
}

fn check_type(column: &ColumnDescriptor, is_label: bool) -> Result<(), String> {
    if column.max_rep_level() > 0 {
        return Err(format!(
            "column `{}` holds lists; flat columns are needed",
            column.name()
        ));
    }
    let fits = match column.physical_type() {
        Physical::BYTE_ARRAY => !matches!(
            column.converted_type(),
            ConvertedType::DECIMAL | ConvertedType::BSON
        ),
        Physical::BOOLEAN | Physical::FLOAT | Physical::DOUBLE => is_label,
        Physical::INT32 | Physical::INT64 => {
            is_label && column.converted_type() != ConvertedType::DECIMAL
        }
        Physical::INT96 | Physical::FIXED_LEN_BYTE_ARRAY => false,
    };
    if fits {
        return Ok(());
    }
    let want = if is_label {
        "text, numbers or booleans"
    } else {
        "text"
    };
    Err(format!(
        "column `{}` is {}; it must hold {want}",
        column.name(),
        column.physical_type()
    ))
}

struct Wanted {
    name: String,
    place: usize,
    descriptor: Arc<ColumnDescriptor>,
}

struct ParquetRows {
    reader: SerializedFileReader<File>,
    groups: usize,
    wanted: Vec<Wanted>,
    mapping: Mapping,
    next_group: usize,
    open: Option<Vec<ColumnReader>>,
    /// Per wanted column the decoded cells, of which `taken` are used up.
    cells: Vec<Vec<Cell>>,
    taken: usize,
    row: u64,
}

impl Iterator for ParquetRows {
    type Item = Result<RawRow, RowFault>;

    fn next(&mut self) -> Option<Self::Item> {
        while self
            .cells
            .first()
            .is_none_or(|cells| self.taken == cells.len())
        {
            match self.fill() {
                Ok(true) => {}
                Ok(false) => return None,
                Err(error) => {
                    self.next_group = self.groups;
                    self.open = None;
                    self.cells.clear();
                    return Some(Err(RowFault::Broken(format!(
                        "it breaks off after row {}: {error}",
                        self.row
                    ))));
                }
            }
        }
        let place = self.taken;
        self.taken += 1;
        self.row += 1;
        let (cells, wanted) = (&mut self.cells, &self.wanted);
        Some(row(&self.mapping, self.row, |column| {
            let which = wanted
                .iter()
                .position(|wanted| wanted.name == column)
                .ok_or_else(|| format!("no column `{column}`"))?;
            std::mem::replace(&mut cells[which][place], Ok(String::new()))
                .map_err(|reason| format!("column `{column}` {reason}"))
        }))
    }
}

impl ParquetRows {
    /// Decodes more rows; `false` at the end of the file.
    fn fill(&mut self) -> Result<bool, ParquetError> {
        self.taken = 0;
        self.cells.clear();
        if self.open.is_none() {
            if self.next_group == self.groups {
                return Ok(false);
            }
            let group = self.reader.get_row_group(self.next_group)?;
            self.next_group += 1;
            self.open = Some(column_readers(group.as_ref(), &self.wanted)?);
        }
        let Some(readers) = self.open.as_mut() else {
            return Ok(false);
        };
        let cells = readers
            .iter_mut()
            .zip(&self.wanted)
            .map(|(reader, wanted)| decode(reader, wanted.descriptor.max_def_level()))
            .collect::<Result<Vec<_>, _>>()?;
        let rows = cells.first().map_or(0, Vec::len);
        if cells.iter().any(|column| column.len() != rows) {
            return Err(ParquetError::General(
                "its columns differ in length".to_owned(),
            ));
        }
        if rows == 0 {
            self.open = None;
        }
        self.cells = cells;
        Ok(true)
    }
}

fn column_readers(
    group: &dyn RowGroupReader,
    wanted: &[Wanted],
) -> Result<Vec<ColumnReader>, ParquetError> {
    wanted
        .iter()
        .map(|column| group.get_column_reader(column.place))
        .collect()
}

fn decode(reader: &mut ColumnReader, max_def: i16) -> Result<Vec<Cell>, ParquetError> {
    const UNFIT: Cell = Err("has an unknown type");
    match reader {
        ColumnReader::ByteArrayColumnReader(reader) => read(reader, max_def, |value| {
            let bytes = value.data();
            if bytes.len() > MAX_ROW_BYTES {
                return Err("is too long");
            }
            std::str::from_utf8(bytes)
                .map(str::to_owned)
                .map_err(|_| "is not UTF-8")
        }),
        ColumnReader::BoolColumnReader(reader) => {
            read(reader, max_def, |value| Ok(value.to_string()))
        }
        ColumnReader::Int32ColumnReader(reader) => {
            read(reader, max_def, |value| Ok(value.to_string()))
        }
        ColumnReader::Int64ColumnReader(reader) => {
            read(reader, max_def, |value| Ok(value.to_string()))
        }
        ColumnReader::FloatColumnReader(reader) => {
            read(reader, max_def, |value| Ok(number_text(f64::from(*value))))
        }
        ColumnReader::DoubleColumnReader(reader) => {
            read(reader, max_def, |value| Ok(number_text(*value)))
        }
        ColumnReader::Int96ColumnReader(reader) => read(reader, max_def, |_| UNFIT),
        ColumnReader::FixedLenByteArrayColumnReader(reader) => read(reader, max_def, |_| UNFIT),
    }
}

fn read<T: DataType>(
    reader: &mut ColumnReaderImpl<T>,
    max_def: i16,
    text: impl Fn(&T::T) -> Cell,
) -> Result<Vec<Cell>, ParquetError> {
    let mut values = Vec::new();
    let mut levels = Vec::new();
    let nullable = max_def > 0;
    let (records, _, _) = reader.read_records(
        ROWS_AT_ONCE,
        nullable.then_some(&mut levels),
        None,
        &mut values,
    )?;
    if !nullable {
        return Ok(values.iter().map(text).collect());
    }
    let mut present = values.iter();
    let mut cells = Vec::with_capacity(records);
    for level in levels {
        if level < max_def {
            // No value: an empty text, which the row's check names.
            cells.push(Ok(String::new()));
        } else if let Some(value) = present.next() {
            cells.push(text(value));
        }
    }
    Ok(cells)
}

/// A number as a label: whole numbers without a fraction, so that 1 and 1.0 are one label.
pub(super) fn number_text(value: f64) -> String {
    if value.fract() == 0.0 && value.abs() < 1e15 {
        // Adding 0 turns -0 into 0.
        format!("{:.0}", value + 0.0)
    } else {
        value.to_string()
    }
}
