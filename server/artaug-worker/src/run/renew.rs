//! The sign of life of a job: it holds the lease, says how far the job is, and brings the operator's word.

use std::time::Duration;

use concord_proto::v1::WorkerCommand;

use crate::{
    brake::Halt,
    desk::Board,
    remote::{CallError, Lease},
};

/// Longest time between two signs of life, however long the lease: progress is to be seen.
const MOST: Duration = Duration::from_secs(5);
/// Shortest.
const LEAST: Duration = Duration::from_millis(1);

/// Renews a lease of `duration` every third of it until the work on the job has ended.
pub(super) fn renew(lease: &Lease, board: &Board, duration: Duration) {
    let every = (duration / 3).clamp(LEAST, MOST);
    while !lease.brake().wait_for_end(every) {
        match lease.server().renew(lease.grip(), &board.progress()) {
            Ok(renewed) => match renewed.command {
                WorkerCommand::Pause => lease.brake().pull(Halt::Pause),
                WorkerCommand::Cancel => {
                    // The server has taken the lease back with that.
                    lease.brake().pull(Halt::Cancel);
                    return;
                }
                WorkerCommand::GoOn | WorkerCommand::Unspecified => {}
            },
            Err(CallError::LeaseLost(reason)) => {
                tracing::warn!(job.id = %lease.grip().job_id, reason, "the lease is lost");
                lease.brake().pull(Halt::Lost(reason));
                return;
            }
            // The next one is not far. Whether the lease has run out meanwhile is the server's to say: it may have been away itself.
            Err(error) => {
                tracing::warn!(job.id = %lease.grip().job_id, %error, "the lease cannot be renewed now");
            }
        }
    }
}
