//! What a job may take of the machine.

use concord_common::telemetry::rss_bytes;

use crate::brake::Halt;

/// How much more likely than others the process is to go when memory runs out, of 1000.
const OOM_SCORE: &str = "500";

/// Lets others on the machine go first, and stay last.
pub fn step_back(nice: i32) {
    // Federated rounds on the same machine are to go on as if no job ran.
    if let Err(error) = rustix::process::nice(nice) {
        tracing::warn!(%error, nice, "the process keeps its priority");
    }
    // And to outlive it when memory runs out: jobs go on with the next worker.
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", OOM_SCORE) {
        tracing::warn!(%error, "the process is no more likely than others to go when memory runs out");
    }
}

/// The most memory that the process may hold while it works on a job.
///
/// It is measured and not set as a limit of the system's: libtorch maps far more than it uses, and an allocation that fails in its
/// threads ends the process without a word.
#[derive(Debug, Clone, Copy)]
pub struct MemoryLimit(pub u64);

impl MemoryLimit {
    /// Looks at what is held now.
    ///
    /// # Errors
    /// [`Halt::Trouble`] if it is too much: a worker that may hold more goes on with the job.
    pub fn check(self) -> Result<(), Halt> {
        self.judge(rss_bytes())
    }

    fn judge(self, held: Option<u64>) -> Result<(), Halt> {
        match held {
            Some(held) if held > self.0 => Err(Halt::Trouble(format!(
                "the worker holds {} MiB of memory and may hold {} MiB; raise `limits.memory` in its settings, let a worker that may hold more take the \
                 job, or start it anew with a lower `sampler.batch`, `sampler.size` or `lora.batch`, or with `lora.recompute`",
                held >> 20,
                self.0 >> 20
            ))),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_that_holds_too_much_is_told_what_to_change() {
        let limit = MemoryLimit(64 << 20);
        limit.judge(Some(64 << 20)).unwrap();
        limit.judge(None).unwrap();
        let Err(Halt::Trouble(reason)) = limit.judge(Some(65 << 20)) else {
            panic!("it may hold that")
        };
        assert!(reason.contains("limits.memory"), "{reason}");
        MemoryLimit(u64::MAX).check().unwrap();
        assert!(MemoryLimit(1).check().is_err());
    }
}
