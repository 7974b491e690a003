//! The schema's history. Append only: a migration that has been released is never edited.

use std::borrow::Cow;

use sqlx::{
    SqlSafeStr as _, SqlitePool,
    migrate::{Migration, MigrationType, Migrator},
};

use super::DatastoreError;

/// Version, name and text of each migration, in order.
const SQLITE: &[(i64, &str, &str)] = &[
    (
        1,
        "initial",
        include_str!("../../migrations/sqlite/0001_initial.sql"),
    ),
    (
        2,
        "workers",
        include_str!("../../migrations/sqlite/0002_workers.sql"),
    ),
];

pub(super) async fn run(pool: &SqlitePool) -> Result<(), DatastoreError> {
    let migrations = SQLITE
        .iter()
        .map(|&(version, name, sql)| {
            Migration::new(
                version,
                Cow::Borrowed(name),
                MigrationType::Simple,
                sql.into_sql_str(),
                false,
            )
        })
        .collect();
    Migrator::with_migrations(migrations).run(pool).await?;
    Ok(())
}
