//! Reading checked values out of rows.

use std::{fmt::Display, str::FromStr};

use concord_common::{Digest, Timestamp, adapter::AdapterVersion};
use sqlx::{Decode, Row as _, Sqlite, Type, sqlite::SqliteRow};

use super::DatastoreError;

/// A column's value as it stands.
pub(super) fn get<'r, T>(row: &'r SqliteRow, column: &'static str) -> Result<T, DatastoreError>
where
    T: Decode<'r, Sqlite> + Type<Sqlite>,
{
    Ok(row.try_get(column)?)
}

/// A text column as the type that it names.
pub(super) fn parse<T>(row: &SqliteRow, column: &'static str) -> Result<T, DatastoreError>
where
    T: FromStr<Err: Display>,
{
    let text: &str = get(row, column)?;
    text.parse()
        .map_err(|error: T::Err| bad(column, error.to_string()))
}

/// An integer column that cannot be negative.
pub(super) fn unsigned<T: TryFrom<i64>>(
    row: &SqliteRow,
    column: &'static str,
) -> Result<T, DatastoreError> {
    let value: i64 = get(row, column)?;
    T::try_from(value).map_err(|_| bad(column, format!("{value} is out of range")))
}

/// A moment.
pub(super) fn time(row: &SqliteRow, column: &'static str) -> Result<Timestamp, DatastoreError> {
    Ok(Timestamp(get(row, column)?))
}

/// A moment that may be absent.
pub(super) fn time_opt(
    row: &SqliteRow,
    column: &'static str,
) -> Result<Option<Timestamp>, DatastoreError> {
    Ok(get::<Option<i64>>(row, column)?.map(Timestamp))
}

/// A digest.
pub(super) fn digest(row: &SqliteRow, column: &'static str) -> Result<Digest, DatastoreError> {
    let bytes: &[u8] = get(row, column)?;
    Digest::try_from(bytes).map_err(|error| bad(column, error.to_string()))
}

/// An adapter version that may be absent.
pub(super) fn version_opt(
    row: &SqliteRow,
    column: &'static str,
) -> Result<Option<AdapterVersion>, DatastoreError> {
    let bytes: Option<&[u8]> = get(row, column)?;
    bytes
        .map(|bytes| {
            Digest::try_from(bytes)
                .map(AdapterVersion)
                .map_err(|error| bad(column, error.to_string()))
        })
        .transpose()
}

/// 16 bytes: a lease token or an upload id.
pub(super) fn token(row: &SqliteRow, column: &'static str) -> Result<[u8; 16], DatastoreError> {
    let bytes: &[u8] = get(row, column)?;
    bytes
        .try_into()
        .map_err(|_| bad(column, format!("{} bytes instead of 16", bytes.len())))
}

/// A protobuf enum by the name of its value.
pub(super) fn named<T>(
    row: &SqliteRow,
    column: &'static str,
    from_name: fn(&str) -> Option<T>,
) -> Result<T, DatastoreError> {
    let text: &str = get(row, column)?;
    from_name(text).ok_or_else(|| bad(column, format!("`{text}` is no known name")))
}

pub(super) fn bad(column: &'static str, what: String) -> DatastoreError {
    DatastoreError::BadValue { column, what }
}
