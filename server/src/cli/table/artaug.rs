//! ArtAug jobs for people.

use std::time::Duration;

use super::{bytes, or_dash, short, table};
use crate::cli::{
    names::plain,
    output::{
        Job,
        artaug::{ArtefactList, Deleted, Fetched, Progress, Reviewed, Waiting},
    },
    pairs::Ranges,
};

/// Longest time left that is worth showing; more is a guess.
const LONGEST: f64 = 1000.0 * 86_400.0;

/// `2/3 train-first 40/120`
pub(super) fn brief(progress: &Progress) -> String {
    format!("{} {}", iteration(progress), count(progress))
}

fn iteration(progress: &Progress) -> String {
    format!(
        "{}/{} {}",
        progress.iteration,
        progress.iterations,
        plain(&progress.stage)
    )
}

fn count(progress: &Progress) -> String {
    match progress.total {
        Some(total) => format!("{}/{total}", progress.done),
        None => progress.done.to_string(),
    }
}

/// What a bar cannot show: `iteration 2/3 train-first  1.2/s  1m 6s left`.
pub(in crate::cli) fn pace(progress: &Progress) -> String {
    let parts = [
        Some(format!("iteration {}", iteration(progress))),
        progress.per_second.map(rate),
        progress.remaining_seconds.map(left),
    ];
    parts.into_iter().flatten().collect::<Vec<_>>().join("  ")
}

fn rate(per_second: f64) -> String {
    match per_second {
        10.0.. => format!("{per_second:.0}/s"),
        0.1.. => format!("{per_second:.1}/s"),
        _ => format!("{:.1}/min", per_second * 60.0),
    }
}

fn left(seconds: f64) -> String {
    let seconds = Duration::from_secs_f64(seconds.clamp(0.0, LONGEST).round());
    format!("{} left", humantime::format_duration(seconds))
}

/// The short digests of the last images.
pub(in crate::cli) fn images(progress: &Progress) -> String {
    let images: Vec<String> = progress
        .last_images
        .iter()
        .map(|digest| short(Some(digest)))
        .collect();
    images.join(" ")
}

/// The lines of `job show` about an ArtAug job's progress.
pub(super) fn progress(job: &Job) -> String {
    let mut lines = vec![(
        "worker",
        or_dash(job.worker.as_ref().map(|name| plain(name)).as_ref()),
    )];
    if let Some(progress) = &job.artaug {
        lines.push((
            "iteration",
            format!("{} of {}", progress.iteration, progress.iterations),
        ));
        lines.push(("stage", plain(&progress.stage)));
        lines.push((
            "done",
            match progress.total {
                Some(total) => format!("{} of {total}", progress.done),
                None => progress.done.to_string(),
            },
        ));
        if let Some(per_second) = progress.per_second {
            lines.push(("rate", rate(per_second)));
        }
        if let Some(seconds) = progress.remaining_seconds {
            lines.push(("stage ends", format!("{} at this rate", left(seconds))));
        }
        lines.push(("kept", bytes(progress.bytes_kept)));
        if let Some(memory) = progress.peak_memory {
            lines.push(("memory", format!("{} at the most", bytes(memory))));
        }
        for (number, digest) in progress.last_images.iter().enumerate() {
            lines.push((["images", ""][usize::from(number > 0)], digest.clone()));
        }
        if !progress.last_images.is_empty() {
            let command = format!("concord artaug images {} FOLDER", job.job_id);
            lines.push(("", format!("see them with  {command}")));
        }
    }
    if let Some(time) = &job.files_deleted_at {
        lines.push(("files", format!("deleted {time}")));
    }
    if job.waits_for_review {
        let command = format!("concord artaug review {}", job.job_id);
        lines.push(("review", format!("pairs wait for your word: {command}")));
    }
    lines
        .into_iter()
        .fold(String::new(), |mut text, (title, value)| {
            text.extend([&format!("{title:<11}"), value.as_str(), "\n"]);
            text
        })
}

pub(in crate::cli) fn waiting(answer: &Waiting) -> String {
    let Some(iteration) = answer.iteration else {
        return format!("no pair of job {} waits for a word\n", answer.job_id);
    };
    let mut text = format!(
        "iteration {iteration}: {} pairs wait for a word: {}\n",
        answer.waiting.len(),
        Ranges(&answer.waiting)
    );
    match &answer.page {
        Some(page) => text.extend(["their page is ", page, "\n"]),
        None => text.extend([
            "see them with  concord artaug review ",
            &answer.job_id,
            " --gallery FOLDER\n",
        ]),
    }
    text.extend([
        "then say which  concord artaug review ",
        &answer.job_id,
        " --accept 1,2,5-9 --reject-rest\n",
    ]);
    text
}

pub(in crate::cli) fn reviewed(answer: &Reviewed) -> String {
    let mut text = match answer.iteration {
        None => format!("no pair of job {} waits for a word\n", answer.job_id),
        Some(iteration) => format!(
            "iteration {iteration}: {} accepted, {} rejected, {} still wait\n",
            answer.accepted.len(),
            answer.rejected.len(),
            answer.waiting
        ),
    };
    if let Some(page) = &answer.page {
        text.extend(["their page is ", page, "\n"]);
    }
    text
}

pub(in crate::cli) fn artefacts(list: &ArtefactList) -> String {
    if list.artefacts.is_empty() {
        return "no artefacts\n".to_owned();
    }
    table(
        ["NAME", "SIZE", "DIGEST"],
        list.artefacts.iter().map(|artefact| {
            [
                plain(&artefact.name),
                bytes(artefact.bytes),
                short(artefact.digest.as_ref()),
            ]
        }),
    )
}

pub(in crate::cli) fn fetched(answer: &Fetched) -> String {
    let mut text = table(
        ["FILE", "SIZE", "DIGEST", "STATE"],
        answer.files.iter().map(|file| {
            [
                file.name.clone(),
                bytes(file.bytes),
                short(Some(&file.digest)),
                if file.written {
                    "written"
                } else {
                    "there already"
                }
                .to_owned(),
            ]
        }),
    );
    text.extend(["in ", &answer.folder, "\n"]);
    text
}

pub(in crate::cli) fn deleted(answer: &Deleted) -> String {
    format!(
        "deleted what the server kept for job {}: {}\n",
        answer.job.job_id,
        bytes(answer.bytes_freed)
    )
}
