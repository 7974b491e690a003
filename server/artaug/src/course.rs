//! What a worker does next beside the work itself: when the job's time is up, when it waits, when an operator stops it.

use std::time::Duration;

use concord_common::Timestamp;

use crate::machine::{Machine, Work};

/// An operator's word on a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Command {
    /// Go on.
    #[default]
    GoOn,
    /// Save and give the job back; it goes on when an operator resumes it.
    Pause,
    /// Drop the job.
    Cancel,
}

/// What a worker does next.
#[derive(Debug, Clone, PartialEq)]
pub enum Course {
    /// Work.
    Work(Work),
    /// Give the job back until an operator has judged these items.
    WaitForReview(Vec<u32>),
    /// Give the job back until an operator resumes it.
    Pause,
    /// Drop the job.
    Cancel,
    /// Record [`Machine::out_of_time`]: the last finished iteration is the result.
    EndForTime,
    /// Write the results and end the job.
    Finish,
}

/// The next course of a job that was worked on for `worked` and may take `limit`. A finished job is finished, whatever the operator
/// says meanwhile; a job that waits for a review uses no time up.
pub fn course(machine: &Machine, command: Command, worked: Duration, limit: Duration) -> Course {
    let work = machine.work();
    match (command, work) {
        (Command::Cancel, _) => Course::Cancel,
        (_, Work::Done) => Course::Finish,
        (Command::Pause, _) => Course::Pause,
        (Command::GoOn, Work::Review(open)) => Course::WaitForReview(open),
        // What takes no time is done all the same: an iteration that is evaluated is not thrown away for it.
        (Command::GoOn, work @ (Work::Diversity(_) | Work::Decide)) => Course::Work(work),
        (Command::GoOn, _) if worked >= limit => Course::EndForTime,
        (Command::GoOn, work) => Course::Work(work),
    }
}

/// Time worked on a job, over all workers and resumptions. It stands in every line of the journal, so a kill loses what was worked
/// since the last line and no more; waiting for a review, a pause, and the time between two workers do not count.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Worked {
    before: Duration,
    since: Option<Timestamp>,
}

impl Worked {
    /// Work goes on at `now` after `before` of it.
    pub fn resumed(before: Duration, now: Timestamp) -> Self {
        Self {
            before,
            since: Some(now),
        }
    }

    /// Time worked up to `now`.
    pub fn total(&self, now: Timestamp) -> Duration {
        self.before + self.since.map_or(Duration::ZERO, |since| now.since(since))
    }

    /// Work rests from `now` on.
    pub fn rest(&mut self, now: Timestamp) {
        self.before = self.total(now);
        self.since = None;
    }

    /// Work goes on from `now` on.
    pub fn go_on(&mut self, now: Timestamp) {
        if self.since.is_none() {
            self.since = Some(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::{Decision, Plan, Stage, StopReason, testing};

    fn at(seconds: i64) -> Timestamp {
        Timestamp(seconds * 1000)
    }

    #[test]
    fn rest_does_not_count() {
        let mut worked = Worked::resumed(Duration::from_secs(100), at(0));
        worked.rest(at(10));
        worked.rest(at(20));
        assert_eq!(worked.total(at(1000)).as_secs(), 110);
        worked.go_on(at(2000));
        worked.go_on(at(2003));
        assert_eq!(worked.total(at(2005)).as_secs(), 115);
        // A clock that was set back takes nothing away.
        assert_eq!(worked.total(at(1)).as_secs(), 110);
    }

    #[test]
    fn a_job_ends_when_its_time_is_up_and_keeps_the_last_finished_iteration() {
        let limit = Duration::from_mins(1);
        let (short, long) = (Duration::from_secs(59), limit);
        let plan = testing::plan();
        let mut machine = Machine::new(plan, testing::specification());
        machine.apply(testing::began()).unwrap();
        while machine.iteration() == 1 || machine.stage() < Stage::TrainSecond {
            assert!(matches!(
                course(&machine, Command::GoOn, short, limit),
                Course::Work(_)
            ));
            assert!(machine.check(&machine.out_of_time(limit)).is_ok());
            let event = testing::GOOD.act(&machine).swap_remove(0);
            machine.apply(event).unwrap();
        }
        assert_eq!(
            course(&machine, Command::GoOn, long, limit),
            Course::EndForTime
        );
        machine.apply(machine.out_of_time(limit)).unwrap();
        assert_eq!(machine.result(), Some(1));
        assert!(machine.result_lora().is_some());
        let Decision::Stop { reason, .. } = &machine.history()[1].decision else {
            panic!("went on")
        };
        assert_eq!(reason, &StopReason::Time { seconds: 60 });
        assert!(machine.check(&machine.out_of_time(limit)).is_err());
        assert_eq!(
            course(&machine, Command::Pause, long, limit),
            Course::Finish
        );
    }

    #[test]
    fn an_iteration_that_is_evaluated_is_judged_though_time_is_up() {
        let limit = Duration::from_secs(1);
        let mut machine = Machine::new(testing::plan(), testing::specification());
        machine.apply(testing::began()).unwrap();
        while machine.stage() != Stage::Decide {
            let event = testing::GOOD.act(&machine).swap_remove(0);
            machine.apply(event).unwrap();
        }
        assert_eq!(
            course(&machine, Command::GoOn, limit, limit),
            Course::Work(Work::Decide)
        );
        machine.apply(machine.decided()).unwrap();
        assert_eq!(
            course(&machine, Command::GoOn, limit, limit),
            Course::EndForTime
        );
        machine.apply(machine.out_of_time(limit)).unwrap();
        assert_eq!(machine.result(), Some(1));
    }

    #[test]
    fn a_review_is_waited_for_without_a_clock() {
        let plan = Plan {
            review: true,
            ..testing::plan()
        };
        let mut machine = Machine::new(plan, testing::specification());
        machine.apply(testing::began()).unwrap();
        while machine.stage() != Stage::Review {
            let event = testing::GOOD.act(&machine).swap_remove(0);
            machine.apply(event).unwrap();
        }
        let late = Duration::from_hours(9);
        assert_eq!(
            course(&machine, Command::GoOn, late, Duration::from_hours(1)),
            Course::WaitForReview(machine.kept())
        );
        assert_eq!(course(&machine, Command::Pause, late, late), Course::Pause);
        assert_eq!(
            course(&machine, Command::Cancel, late, late),
            Course::Cancel
        );
    }
}
