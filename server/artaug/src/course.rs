//! What a worker does next beside the work itself: when the job's time is up, when it waits, when an operator stops it.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use concord_common::Clock;

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
/// since the last line and no more. Waiting for a review or for the server, a pause, and the time between two workers do not count, and
/// neither does what somebody sets the clock forward by. Threads share it.
#[derive(Debug)]
pub struct Worked {
    clock: Arc<dyn Clock>,
    count: Mutex<Count>,
}

#[derive(Debug)]
struct Count {
    before: Duration,
    /// What [`Clock::steady`] said when it was last set going; none while it stands still.
    since: Option<Duration>,
    rests: bool,
    /// How many wait for the server.
    waiting: usize,
}

impl Worked {
    /// Work goes on now after `before` of it.
    pub fn resumed(before: Duration, clock: Arc<dyn Clock>) -> Self {
        let since = Some(clock.steady());
        Self {
            clock,
            count: Mutex::new(Count {
                before,
                since,
                rests: false,
                waiting: 0,
            }),
        }
    }

    fn count(&self) -> MutexGuard<'_, Count> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Time worked up to now.
    pub fn total(&self) -> Duration {
        let count = self.count();
        count.total(self.clock.steady())
    }

    /// Work rests from now on.
    pub fn rest(&self) {
        self.change(|count| count.rests = true);
    }

    /// Work goes on from now on.
    pub fn go_on(&self) {
        self.change(|count| count.rests = false);
    }

    /// Someone waits for the server until what this gives is dropped. What others do meanwhile does not count either: they soon wait too.
    #[must_use = "the wait ends when it is dropped"]
    pub fn wait(&self) -> Wait<'_> {
        self.change(|count| count.waiting += 1);
        Wait(self)
    }

    fn change(&self, change: impl FnOnce(&mut Count)) {
        let mut count = self.count();
        let now = self.clock.steady();
        count.before = count.total(now);
        change(&mut count);
        count.since = (!count.rests && count.waiting == 0).then_some(now);
    }
}

impl Count {
    fn total(&self, now: Duration) -> Duration {
        let going = self.since.map(|since| now.saturating_sub(since));
        self.before + going.unwrap_or_default()
    }
}

/// A wait that does not count; see [`Worked::wait`].
#[derive(Debug)]
pub struct Wait<'a>(&'a Worked);

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        self.0.change(|count| count.waiting -= 1);
    }
}

#[cfg(test)]
mod tests {
    use concord_common::{Timestamp, clock::MockClock};

    use super::*;
    use crate::machine::{Decision, Plan, Stage, StopReason, testing};

    /// A hundred seconds worked, and the clock that the rest goes by.
    fn resumed() -> (Arc<MockClock>, Worked) {
        let clock = Arc::new(MockClock::new(Timestamp(0)));
        let worked = Worked::resumed(Duration::from_secs(100), clock.clone());
        (clock, worked)
    }

    #[test]
    fn rest_does_not_count() {
        let (clock, worked) = resumed();
        let pass = |seconds| clock.advance(Duration::from_secs(seconds));
        pass(10);
        worked.rest();
        pass(10);
        worked.rest();
        pass(980);
        assert_eq!(worked.total().as_secs(), 110);
        worked.go_on();
        pass(3);
        worked.go_on();
        pass(2);
        assert_eq!(worked.total().as_secs(), 115);
    }

    #[test]
    fn as_long_as_someone_waits_for_the_server_time_does_not_count() {
        let (clock, worked) = resumed();
        let pass = |seconds| clock.advance(Duration::from_secs(seconds));
        pass(1);
        let first = worked.wait();
        pass(20);
        let second = worked.wait();
        pass(20);
        drop(first);
        pass(20);
        assert_eq!(worked.total().as_secs(), 101);
        drop(second);
        pass(1);
        assert_eq!(worked.total().as_secs(), 102);
        // A rest outlasts a wait within it, and a wait the end of a rest.
        worked.rest();
        drop(worked.wait());
        pass(20);
        let wait = worked.wait();
        worked.go_on();
        pass(20);
        drop(wait);
        pass(1);
        assert_eq!(worked.total().as_secs(), 103);
    }

    #[test]
    fn setting_the_clock_does_not_count() {
        let (clock, worked) = resumed();
        clock.advance(Duration::from_secs(1));
        for set in [Timestamp(500_000_000), Timestamp(-1)] {
            clock.set(set);
            assert_eq!(worked.total().as_secs(), 101);
        }
        clock.advance(Duration::from_secs(1));
        assert_eq!(worked.total().as_secs(), 102);
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
