//! What a job cost, added up from its journal.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{
    advisor::Usage,
    machine::{Advised, Event},
};

/// Counts and times of a job.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Ledger {
    /// Images made, base, enhanced and held out, samples of trainings included.
    pub images: u64,
    /// Rows of the denoiser's forward passes for base and enhanced images; a pass takes many.
    pub forwards: u64,
    /// The same for held-out images.
    pub held_out_forwards: u64,
    /// Texts that were longer than the model reads of them, counted for every image that was drawn from one.
    pub cut_texts: u64,
    /// Calls and tokens of the advisor.
    pub advice: Usage,
    /// Calls and tokens of scorers elsewhere.
    pub scoring: Usage,
    /// Answers of the advisor that could not be used.
    pub rejected_replies: u64,
    /// Training steps.
    pub steps: u64,
    /// Seconds of generating and regenerating.
    pub generating: f64,
    /// Seconds of drawing held-out images.
    pub evaluating: f64,
    /// Seconds of waiting for advice; these overlap with the others.
    pub advising: f64,
    /// Seconds of training.
    pub training: f64,
}

impl Ledger {
    /// Adds what an event cost.
    pub fn take(&mut self, event: &Event) {
        match event {
            Event::Generated { result, .. } => {
                self.image(result.forwards, result.seconds);
                self.cut_texts += result.cut as u64;
            }
            Event::Regenerated { result, .. } => {
                self.image(result.forwards, result.seconds);
                self.cut_texts += result.cut as u64;
            }
            Event::Advised { result, .. } => self.advised(result),
            Event::Scored { result, .. } => self.scoring += result.usage,
            Event::Sampled { result, .. } => {
                self.images += result.images.len() as u64;
                self.held_out_forwards += result.forwards;
            }
            Event::Trained { result, .. } => {
                self.steps += result.steps;
                self.training += result.seconds;
            }
            Event::Evaluated { result, .. } => {
                self.images += 1;
                self.held_out_forwards += result.forwards;
                self.cut_texts += result.cut as u64;
                self.evaluating += result.seconds;
                self.scoring += result.usage;
                if let Some(advised) = &result.advice {
                    self.advised(advised);
                }
            }
            _ => {}
        }
    }

    fn advised(&mut self, result: &Advised) {
        self.advice += result.advice.usage;
        self.rejected_replies += result.advice.rejected_replies.len() as u64;
        self.advising += result.seconds;
    }

    fn image(&mut self, forwards: u64, seconds: f64) {
        self.images += 1;
        self.forwards += forwards;
        self.generating += seconds;
    }

    /// Seconds that work at the same time has saved, at least, where the job has been worked on for so long: what the stages took together beyond
    /// that. Scoring and writing, which run beside them too, are not measured.
    pub fn overlapped(&self, worked: Duration) -> f64 {
        let together = self.generating + self.evaluating + self.advising + self.training;
        (together - worked.as_secs_f64()).max(0.0)
    }

    /// Names and values as they are to be read, with the peak of memory in bytes if it is known, and the time worked on the job.
    pub fn lines(&self, peak_memory: Option<u64>, worked: Duration) -> Vec<(String, String)> {
        let line = |name: &str, value: String| (name.to_owned(), value);
        let seconds = |value: f64| format!("{value:.1} s");
        vec![
            line("images", self.images.to_string()),
            line(
                "rows of forward passes for pairs",
                self.forwards.to_string(),
            ),
            line(
                "rows of forward passes for held-out images",
                self.held_out_forwards.to_string(),
            ),
            line(
                "texts cut where the model's text encoder ends",
                self.cut_texts.to_string(),
            ),
            line("advisor calls", self.advice.calls.to_string()),
            line("advisor tokens read", self.advice.prompt_tokens.to_string()),
            line(
                "advisor tokens written",
                self.advice.reply_tokens.to_string(),
            ),
            line("unusable answers", self.rejected_replies.to_string()),
            line("calls of scorers elsewhere", self.scoring.calls.to_string()),
            line(
                "tokens of scorers elsewhere, read and written",
                format!(
                    "{} and {}",
                    self.scoring.prompt_tokens, self.scoring.reply_tokens
                ),
            ),
            line("training steps", self.steps.to_string()),
            line("generating", seconds(self.generating)),
            line("drawing held-out images", seconds(self.evaluating)),
            line("waiting for advice", seconds(self.advising)),
            line("training", seconds(self.training)),
            line("worked on the job", seconds(worked.as_secs_f64())),
            line(
                "saved by work at the same time, at least",
                seconds(self.overlapped(worked)),
            ),
            line(
                "peak memory",
                peak_memory.map_or_else(
                    || "not measured".to_owned(),
                    |bytes| format!("{:.0} MB", bytes as f64 / 1e6),
                ),
            ),
        ]
    }
}

/// Lets the system count the process's peak of memory anew, from what it holds now: for a job that is not the process's first. Where the
/// system cannot, the peak stays that of all its jobs.
pub fn forget_peak_memory() {
    // See proc_pid_clear_refs(5).
    if let Err(error) = std::fs::write("/proc/self/clear_refs", "5") {
        tracing::debug!(%error, "the peak of memory is counted on from the jobs before");
    }
}

#[cfg(test)]
mod tests {
    use concord_common::Digest;

    use super::*;
    use crate::{
        advisor::{Advice, RejectedReply},
        machine::{Advised, Arm, Evaluated, Generated, Scored, Trained, Training},
        scorer::Scores,
    };

    const USAGE: Usage = Usage {
        calls: 3,
        prompt_tokens: 900,
        reply_tokens: 7,
    };

    fn advised(usage: Usage, rejected_replies: Vec<RejectedReply>) -> Advised {
        Advised {
            advisor: String::new(),
            advice: Advice {
                rejected_replies,
                usage,
                ..Advice::default()
            },
            error: None,
            seconds: 4.0,
        }
    }

    fn of_pairs(object: Digest) -> [Event; 3] {
        let reply = RejectedReply {
            raw: String::new(),
            code: "no-json".to_owned(),
            reason: String::new(),
        };
        let usage = Usage {
            calls: 2,
            prompt_tokens: 200,
            reply_tokens: 30,
        };
        [
            Event::Generated {
                iteration: 1,
                item: 0,
                result: Generated {
                    prompt: String::new(),
                    seed: 0,
                    image: object,
                    cut: 1,
                    forwards: 20,
                    seconds: 1.5,
                },
            },
            Event::Advised {
                iteration: 1,
                item: 0,
                result: advised(usage, vec![reply]),
            },
            Event::Scored {
                iteration: 1,
                item: 0,
                result: Scored {
                    usage: USAGE,
                    ..Scored::default()
                },
            },
        ]
    }

    fn of_the_rest(object: Digest) -> [Event; 2] {
        [
            Event::Trained {
                iteration: 1,
                training: Training::First,
                result: Trained {
                    lora: object,
                    losses: object,
                    steps: 120,
                    final_loss: 0.1,
                    seconds: 60.0,
                },
            },
            Event::Evaluated {
                iteration: 1,
                arm: Arm::Rewriting,
                item: 0,
                result: Evaluated {
                    prompt: String::new(),
                    seed: None,
                    image: object,
                    cut: 2,
                    scores: Scores::default(),
                    filter_scores: Scores::default(),
                    failures: vec![],
                    advice: Some(advised(USAGE, vec![])),
                    forwards: 40,
                    seconds: 2.5,
                    usage: USAGE,
                },
            },
        ]
    }

    #[test]
    fn costs_are_added_up_from_the_journal() {
        let object = Digest::of(b"x");
        let mut ledger = Ledger::default();
        for event in of_pairs(object).iter().chain(&of_the_rest(object)) {
            ledger.take(event);
        }
        // 1.5 + 8 + 2.5 + 60 seconds of work in 70.
        let lines = ledger.lines(Some(512_000_000), Duration::from_secs(70));
        assert_eq!(ledger.overlapped(Duration::from_secs(80)), 0.0);
        for (name, value) in [
            ("images", "2"),
            ("rows of forward passes for pairs", "20"),
            ("rows of forward passes for held-out images", "40"),
            ("texts cut where the model's text encoder ends", "3"),
            ("advisor calls", "5"),
            ("advisor tokens read", "1100"),
            ("unusable answers", "1"),
            ("calls of scorers elsewhere", "6"),
            ("training steps", "120"),
            ("training", "60.0 s"),
            ("waiting for advice", "8.0 s"),
            ("drawing held-out images", "2.5 s"),
            ("worked on the job", "70.0 s"),
            ("saved by work at the same time, at least", "2.0 s"),
            ("peak memory", "512 MB"),
        ] {
            assert!(
                lines.contains(&(name.to_owned(), value.to_owned())),
                "{name}: {lines:?}"
            );
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_peak_of_memory_is_forgotten_with_the_job_that_had_it() {
        use concord_common::telemetry::peak_rss_bytes;
        let held = vec![1_u8; 256 << 20];
        assert!(peak_rss_bytes().unwrap() > 256 << 20);
        drop(held);
        forget_peak_memory();
        assert!(peak_rss_bytes().unwrap() < 256 << 20);
    }
}
