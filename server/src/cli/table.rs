//! The same for people.

use concord_common::job;

use super::output::{
    Enrolled, Job, JobList, JobNow, JobState, Report, RoundList, RoundState, SiloList, SiloProgress,
};

pub(super) mod artaug;

/// Columns under their titles, each as wide as its widest cell.
fn table<const N: usize>(titles: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    let mut lines = vec![titles.map(str::to_owned)];
    lines.extend(rows);
    let widths: [usize; N] = std::array::from_fn(|column| {
        lines
            .iter()
            .map(|line| line[column].chars().count())
            .max()
            .unwrap_or(0)
    });
    let mut text = String::new();
    for line in &lines {
        let cells: Vec<String> = line
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

fn or_dash(value: Option<&String>) -> String {
    value.cloned().unwrap_or_else(|| "-".to_owned())
}

fn short(digest: Option<&String>) -> String {
    digest.map_or_else(|| "-".to_owned(), |digest| digest.chars().take(8).collect())
}

/// A number of bytes for people.
pub(super) fn bytes(count: u64) -> String {
    match count {
        0..1000 => format!("{count} B"),
        1000..1_000_000 => format!("{:.1} kB", count as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", count as f64 / 1e6),
        _ => format!("{:.2} GB", count as f64 / 1e9),
    }
}

/// What a silo is doing, in a word or two.
pub(super) fn doing(silo: &SiloProgress) -> String {
    match (&silo.outcome, &silo.reason, silo.working) {
        (Some(outcome), Some(reason), _) => format!("{outcome} ({reason})"),
        (Some(outcome), None, _) => outcome.clone(),
        (None, _, true) => "working".to_owned(),
        (None, _, false) => "awaited".to_owned(),
    }
}

/// True if a worker runs it; a job of a kind that is not known is shown as silos' work.
pub(super) fn is_artaug(job: &Job) -> bool {
    job.kind == job::artaug::KIND
}

/// `running`, with what keeps it from going on; `succeeded`, with what became of it.
pub(super) fn state(job: &Job) -> String {
    let mut words = vec![job.state.as_str()];
    words.extend(job.paused.then_some("paused"));
    words.extend(job.waits_for_review.then_some("waits for review"));
    words.extend(job.files_deleted_at.is_some().then_some("files deleted"));
    words.join(", ")
}

fn how_far(job: &Job) -> String {
    match &job.artaug {
        Some(progress) => artaug::brief(progress),
        None if is_artaug(job) => "-".to_owned(),
        None => format!("{}/{}", job.round, job.rounds),
    }
}

/// A job after a command that changed it.
pub(super) fn now(answer: &JobNow) -> String {
    format!("job {} is {}\n", answer.job.job_id, state(&answer.job))
}

/// A job after `job pause`.
pub(super) fn paused(answer: &JobNow) -> String {
    let mut text = now(answer);
    if answer.job.worker.is_some() {
        text.push_str("its worker saves and gives it back\n");
    }
    text
}

pub(super) fn jobs(list: &JobList) -> String {
    if list.jobs.is_empty() {
        return "no jobs\n".to_owned();
    }
    table(
        [
            "JOB",
            "NAME",
            "KIND",
            "ALGORITHM",
            "STATE",
            "PROGRESS",
            "SUBMITTED",
            "BY",
        ],
        list.jobs.iter().map(|job| {
            [
                job.job_id.clone(),
                job.name.clone(),
                job.kind.clone(),
                if job.algorithm.is_empty() {
                    "-"
                } else {
                    &job.algorithm
                }
                .to_owned(),
                state(job),
                how_far(job),
                or_dash(job.submitted_at.as_ref()),
                job.submitted_by.clone(),
            ]
        }),
    )
}

pub(super) fn job(answer: &JobState) -> String {
    let job = &answer.job;
    let mut text = format!(
        "job        {}\nname       {}\nkind       {}\nstate      {}\nsubmitted  {} by {}\nended      {}\n",
        job.job_id,
        job.name,
        job.kind,
        state(job),
        or_dash(job.submitted_at.as_ref()),
        job.submitted_by,
        or_dash(job.ended_at.as_ref()),
    );
    if let Some(reason) = &job.reason {
        text.extend(["reason     ", reason, "\n"]);
    }
    if is_artaug(job) {
        text.push_str(&artaug::progress(job));
        return text;
    }
    let rounds = format!(
        "algorithm  {}\nround      {} of {}\nadapter    {}\n",
        job.algorithm,
        job.round,
        job.rounds,
        or_dash(job.adapter_version.as_ref()),
    );
    text.push_str(&rounds);
    if !answer.silos.is_empty() {
        text.push('\n');
        text.push_str(&silo_progress(&answer.silos));
    }
    if !answer.metrics.is_empty() {
        text.push('\n');
        text.push_str(&reports(&answer.metrics));
    }
    text
}

fn silo_progress(silos: &[SiloProgress]) -> String {
    let mut text = table(
        ["SILO", "THIS ROUND", "COUNTED", "SENT", "FETCHED"],
        silos.iter().map(|silo| {
            [
                silo.silo_id.clone(),
                doing(silo),
                silo.accepted.to_string(),
                bytes(silo.bytes_up),
                bytes(silo.bytes_down),
            ]
        }),
    );
    // Sentences, for which a column would be too narrow.
    for silo in silos {
        if let Some(message) = &silo.message {
            text.extend([silo.silo_id.as_str(), " declined: ", message, "\n"]);
        }
    }
    text
}

fn reports(reports: &[Report]) -> String {
    table(
        ["ROUND", "SILO", "POINT", "METRICS"],
        reports.iter().map(|report| {
            let numbers: Vec<String> = report
                .metrics
                .iter()
                .map(|(name, value)| format!("{name} {value:.4}"))
                .collect();
            [
                report.round.to_string(),
                report.silo_id.clone(),
                report.point.clone(),
                numbers.join("  "),
            ]
        }),
    )
}

pub(super) fn rounds(list: &RoundList) -> String {
    if list.rounds.is_empty() {
        return "no rounds yet\n".to_owned();
    }
    table(
        [
            "ROUND",
            "PHASE",
            "COUNTED",
            "ANNOUNCED",
            "ENDED",
            "BASE",
            "PUBLISHED",
        ],
        list.rounds.iter().map(|round| {
            [
                round.round.to_string(),
                round.phase.clone(),
                format!("{}/{}", round.accepted, round.cohort),
                or_dash(round.announced_at.as_ref()),
                or_dash(round.ended_at.as_ref()),
                short(round.base_version.as_ref()),
                short(round.published_version.as_ref()),
            ]
        }),
    )
}

pub(super) fn round(state: &RoundState) -> String {
    let round = &state.round;
    let mut text = format!(
        "job        {}\nround      {}\nphase      {}\ncounted    {} of {}\nannounced  {}\nended      {}\nbase       {}\npublished  {}\n\n",
        round.job_id,
        round.round,
        round.phase,
        round.accepted,
        round.cohort,
        or_dash(round.announced_at.as_ref()),
        or_dash(round.ended_at.as_ref()),
        or_dash(round.base_version.as_ref()),
        or_dash(round.published_version.as_ref()),
    );
    text.push_str(&table(
        [
            "SILO", "OUTCOME", "REASON", "EXAMPLES", "PAYLOAD", "RECORDED",
        ],
        state.silos.iter().map(|silo| {
            [
                silo.silo_id.clone(),
                silo.outcome.clone().unwrap_or_else(|| "awaited".to_owned()),
                or_dash(silo.reason.as_ref()),
                silo.examples.to_string(),
                short(silo.payload_digest.as_ref()),
                or_dash(silo.recorded_at.as_ref()),
            ]
        }),
    ));
    text
}

pub(super) fn silos(list: &SiloList) -> String {
    if list.silos.is_empty() {
        return "no silo has called yet\n".to_owned();
    }
    table(
        ["SILO", "ENROLLMENT", "CONNECTED", "FIRST SEEN", "LAST SEEN"],
        list.silos.iter().map(|silo| {
            [
                silo.silo_id.clone(),
                silo.enrollment.clone(),
                if silo.connected { "yes" } else { "no" }.to_owned(),
                or_dash(silo.first_seen.as_ref()),
                or_dash(silo.last_seen.as_ref()),
            ]
        }),
    )
}

pub(super) fn enrolled(answer: &Enrolled) -> String {
    let silo = &answer.silo;
    let row = [
        silo.silo_id.clone(),
        silo.enrollment.clone(),
        answer.before.clone(),
        or_dash(silo.last_seen.as_ref()),
    ];
    table(["SILO", "ENROLLMENT", "BEFORE", "LAST SEEN"], [row])
}
