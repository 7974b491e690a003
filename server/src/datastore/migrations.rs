//! The schema's history. Append only: a migration that has been released is never edited.

use std::borrow::Cow;

use sqlx::{
    SqlSafeStr as _, SqliteConnection,
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
    (
        3,
        "workers_trouble",
        include_str!("../../migrations/sqlite/0003_workers_trouble.sql"),
    ),
    (
        4,
        "files_deleted",
        include_str!("../../migrations/sqlite/0004_files_deleted.sql"),
    ),
];

pub(super) async fn run(connection: &mut SqliteConnection) -> Result<(), DatastoreError> {
    run_first(connection, SQLITE.len()).await
}

/// The same for the first few.
pub(super) async fn run_first(
    connection: &mut SqliteConnection,
    count: usize,
) -> Result<(), DatastoreError> {
    let migrations = SQLITE
        .iter()
        .take(count)
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
    // What `run` does with a connection; its own bounds do not hold for a borrowed one inside a future that is sent elsewhere.
    Migrator::with_migrations(migrations)
        .run_direct(None, connection, false)
        .await?;
    Ok(())
}
