//! `job watch`: a live view, or one JSON object a line, until the job has ended.

use std::{
    collections::BTreeMap,
    io::Write,
    time::{Duration, Instant},
};

use concord_proto::v1;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::{
    CliError, Exit,
    connect::Client,
    describe, exit_of, names,
    output::{self, Job, JobState, SiloProgress},
    table,
};

/// How long a server may be away before watching is given up.
const PATIENCE: Duration = Duration::from_mins(1);
const RETRY: Duration = Duration::from_secs(1);

/// Watches a job; the exit code says how it ended. A server that goes away is waited for; one that was never there is not.
pub(super) async fn watch(
    client: &mut Client,
    job_id: &str,
    json: bool,
    out: &mut dyn Write,
) -> Result<Exit, CliError> {
    let mut view = (!json).then(View::default);
    let mut presence = Presence::Unknown;
    loop {
        match follow(client, job_id, &mut view, out, &mut presence).await {
            Ok(Some(exit)) => return Ok(exit),
            // The server wants connections to be made anew now and then.
            Ok(None) => {}
            Err(CliError::Status(status)) => {
                let may_return = matches!(exit_of(&status), Exit::Unreachable | Exit::Busy);
                let since = match presence {
                    Presence::Unknown => return Err(CliError::Status(status)),
                    Presence::Away(since) => since,
                    Presence::There => {
                        let problem = describe(&status);
                        say(view.as_ref(), &format!("{problem}; waiting for it"));
                        let now = Instant::now();
                        presence = Presence::Away(now);
                        now
                    }
                };
                if !may_return || since.elapsed() > PATIENCE {
                    return Err(CliError::Status(status));
                }
            }
            Err(other) => return Err(other),
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// What is known of the server.
#[derive(Clone, Copy)]
enum Presence {
    Unknown,
    There,
    Away(Instant),
}

/// A line on standard error, above the bars if there are any.
fn say(view: Option<&View>, line: &str) {
    let shown = view.is_some_and(|view| view.bars.println(line).is_ok() && !view.bars.is_hidden());
    if !shown {
        eprintln!("{line}");
    }
}

/// Follows one stream to its end; none if it ended before the job.
async fn follow(
    client: &mut Client,
    job_id: &str,
    view: &mut Option<View>,
    out: &mut dyn Write,
    presence: &mut Presence,
) -> Result<Option<Exit>, CliError> {
    let request = v1::WatchJobRequest {
        job_id: job_id.to_owned(),
    };
    let mut stream = client.watch_job(request).await?.into_inner();
    while let Some(message) = stream.message().await? {
        *presence = Presence::There;
        let state = JobState::from(message);
        match view {
            None => output::line(out, &state)?,
            Some(view) => view.show(&state),
        }
        if let Some(line) = view.as_mut().and_then(|view| view.news(&state.job)) {
            say(view.as_ref(), &line);
        }
        let exit = match state.job.state.as_str() {
            "succeeded" => Exit::Done,
            "failed" => Exit::Refused,
            "cancelled" => Exit::Cancelled,
            _ => continue,
        };
        if let Some(view) = view.take() {
            view.close();
            let reason = state.job.reason.map(|reason| format!(": {reason}"));
            let reason = reason.unwrap_or_default();
            writeln!(
                out,
                "job {} has {}{reason}",
                state.job.job_id, state.job.state
            )?;
        }
        return Ok(Some(exit));
    }
    Ok(None)
}

/// On standard error: for silos' work a bar for the rounds and a line for each silo, for an ArtAug job a bar for the stage
/// under way and a line for the last images.
#[derive(Default)]
struct View {
    bars: MultiProgress,
    rounds: Option<ProgressBar>,
    silos: BTreeMap<String, ProgressBar>,
    numbers: BTreeMap<String, String>,
    stage: Option<StageView>,
    waits_for_review: bool,
}

/// What is shown of an ArtAug job.
struct StageView {
    bar: ProgressBar,
    images: ProgressBar,
}

impl View {
    /// What is to be said once, above the bars.
    fn news(&mut self, job: &Job) -> Option<String> {
        let began = job.waits_for_review && !self.waits_for_review;
        self.waits_for_review = job.waits_for_review;
        began.then(|| {
            let id = &job.job_id;
            format!("job {id} waits for your word on pairs: concord artaug review {id}")
        })
    }

    fn show(&mut self, state: &JobState) {
        let job = &state.job;
        if table::is_artaug(job) {
            self.show_stage(job);
            return;
        }
        let bars = &self.bars;
        let rounds = self.rounds.get_or_insert_with(|| {
            let style = ProgressStyle::with_template("{prefix} {bar:30} {pos}/{len} rounds  {msg}");
            let bar = ProgressBar::new(u64::from(job.rounds));
            bars.add(bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar())))
        });
        rounds.set_prefix(job.name.clone());
        let is_published = job.state == "succeeded";
        rounds.set_position(u64::from(job.round) - u64::from(job.round > 0 && !is_published));
        rounds.set_message(job.state.clone());
        for report in &state.metrics {
            let numbers: Vec<String> = report
                .metrics
                .iter()
                .map(|(name, value)| format!("{name} {value:.3}"))
                .collect();
            let text = format!(
                "round {} {}: {}",
                report.round,
                report.point,
                numbers.join(" ")
            );
            self.numbers.insert(report.silo_id.clone(), text);
        }
        for silo in &state.silos {
            self.show_silo(silo);
        }
    }

    fn show_stage(&mut self, job: &Job) {
        let bars = &self.bars;
        let view = self.stage.get_or_insert_with(|| {
            let images = ProgressStyle::with_template("  {msg}")
                .unwrap_or_else(|_| ProgressStyle::default_spinner());
            StageView {
                bar: bars.add(ProgressBar::new(0)),
                images: bars.add(ProgressBar::new_spinner().with_style(images)),
            }
        });
        let progress = job.artaug.as_ref();
        let total = progress.and_then(|progress| progress.total);
        let template = match total {
            Some(_) => "{prefix} {bar:30} {pos}/{len}  {msg}",
            None => "{prefix} {pos}  {msg}",
        };
        let style = ProgressStyle::with_template(template);
        view.bar
            .set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        view.bar.set_prefix(job.name.clone());
        view.bar.set_length(total.unwrap_or(0));
        let done = progress.map_or(0, |progress| progress.done);
        view.bar
            .set_position(total.map_or(done, |total| done.min(total)));
        view.bar.set_message(stage_line(job));
        let images = progress.map(table::artaug::images);
        view.images.set_message(match images {
            Some(images) if !images.is_empty() => format!("last images {images}"),
            _ => String::new(),
        });
    }

    fn show_silo(&mut self, silo: &SiloProgress) {
        let bars = &self.bars;
        let line = self.silos.entry(silo.silo_id.clone()).or_insert_with(|| {
            let style = ProgressStyle::with_template("  {prefix:20} {msg}");
            let bar = ProgressBar::new_spinner();
            bars.add(bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner())))
        });
        line.set_prefix(silo.silo_id.clone());
        let numbers = self.numbers.get(&silo.silo_id).map_or("", String::as_str);
        line.set_message(format!(
            "{:24} counted {:3}  sent {:>9}  {numbers}",
            table::doing(silo),
            silo.accepted,
            table::bytes(silo.bytes_up),
        ));
    }

    /// Leaves the last state on the screen.
    fn close(self) {
        let stage = self
            .stage
            .iter()
            .flat_map(|stage| [&stage.images, &stage.bar]);
        for bar in self.silos.values().chain(self.rounds.iter()).chain(stage) {
            bar.abandon();
        }
    }
}

/// What stands beside the bar of an ArtAug job's stage.
fn stage_line(job: &Job) -> String {
    let worker = match &job.worker {
        Some(worker) => format!("on {}", names::plain(worker)),
        None if !job.paused && (job.state == "running" || is_held_up(job)) => {
            "no worker has it".to_owned()
        }
        None => String::new(),
    };
    let parts = [
        table::state(job),
        job.artaug
            .as_ref()
            .map_or_else(String::new, table::artaug::pace),
        worker,
    ];
    let said: Vec<String> = parts.into_iter().filter(|part| !part.is_empty()).collect();
    said.join("  ")
}

/// True if it waits in the queue for a known reason.
fn is_held_up(job: &Job) -> bool {
    job.state == "queued" && job.reason.is_some()
}

#[cfg(test)]
mod tests {
    use indicatif::ProgressDrawTarget;

    use super::*;

    fn state(done: u64, total: u64, waits_for_review: bool) -> JobState {
        let mut job = v1::Job {
            job_id: "icons-1".to_owned(),
            name: "icons".to_owned(),
            kind: "artaug".to_owned(),
            worker: "gpu-1".to_owned(),
            waits_for_review,
            artaug: Some(v1::ArtaugProgress {
                iteration: 1,
                iterations: 3,
                stage: "generate".to_owned(),
                done,
                total,
                per_second: 2.0,
                last_images: vec![vec![0xab; 32]],
                ..v1::ArtaugProgress::default()
            }),
            ..v1::Job::default()
        };
        job.set_state(v1::JobState::Running);
        JobState::from(v1::WatchJobResponse {
            job: Some(job),
            ..v1::WatchJobResponse::default()
        })
    }

    #[test]
    fn an_artaug_job_has_a_bar_for_its_stage_and_a_line_for_its_images() {
        let mut view = View::default();
        view.bars.set_draw_target(ProgressDrawTarget::hidden());
        view.show(&state(40, 120, false));
        let stage = view.stage.as_ref().unwrap();
        assert_eq!((stage.bar.position(), stage.bar.length()), (40, Some(120)));
        assert_eq!(stage.bar.prefix(), "icons");
        assert_eq!(
            stage.bar.message(),
            "running  iteration 1/3 generate  2.0/s  on gpu-1"
        );
        assert_eq!(stage.images.message(), "last images abababab");
        assert!(view.rounds.is_none() && view.silos.is_empty());
        // Counts that make no sense do not overflow the bar, and those without an end have none.
        view.show(&state(7, 5, false));
        view.show(&state(9, 0, false));
        assert_eq!(view.stage.as_ref().unwrap().bar.position(), 9);
        view.close();
    }

    #[test]
    fn that_pairs_wait_is_said_once_each_time() {
        let mut view = View::default();
        let mut said = |waits| view.news(&state(0, 0, waits).job).is_some();
        let said: Vec<bool> = [false, true, true, false, true].map(&mut said).into();
        assert_eq!(said, [false, true, false, false, true]);
    }
}
