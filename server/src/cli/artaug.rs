//! `concord artaug`: an operator's word on pairs, and the images and results of a job.

use std::{
    io::Write,
    path::{Path, PathBuf},
};

use concord_proto::v1;
use tonic::{Status, Streaming};

use super::{
    ArtaugCommand, CliError, Exit,
    commands::print,
    connect::Client,
    fetch::{self, Source, Wanted},
    images, names,
    output::artaug::{ArtefactList, Deleted, Fetched, Reviewed, Waiting},
    pairs::{Decided, Rest, Words},
    table::{artaug as table, bytes},
};

impl Source for Client {
    type Pieces = Streaming<v1::GetArtefactResponse>;

    async fn open(&mut self, request: v1::GetArtefactRequest) -> Result<Self::Pieces, Status> {
        Ok(self.get_artefact(request).await?.into_inner())
    }
}

/// Carries out a command; what it prints goes to `out`.
pub(super) async fn run(
    client: &mut Client,
    command: &ArtaugCommand,
    json: bool,
    out: &mut dyn Write,
) -> Result<Exit, CliError> {
    match command {
        ArtaugCommand::Review {
            job,
            accept,
            reject,
            accept_rest,
            reject_rest,
            gallery,
        } => {
            let words = Words {
                accept: accept.as_ref(),
                reject: reject.as_ref(),
                rest: match (accept_rest, reject_rest) {
                    (true, _) => Rest::Accept,
                    (false, true) => Rest::Reject,
                    (false, false) => Rest::Wait,
                },
            };
            review(client, job, words, gallery.as_deref(), json, out).await
        }
        ArtaugCommand::Artefacts { job } => {
            let answer = ArtefactList::from(artefacts(client, job).await?);
            print(out, json, &answer, table::artefacts)
        }
        ArtaugCommand::Fetch {
            job,
            folder,
            name,
            replace,
        } => {
            let wanted = chosen(client, job, name, *replace).await?;
            let fetched = Fetched {
                files: fetch::fetch(client, job, folder, &wanted, !json).await?,
                folder: folder.display().to_string(),
            };
            print(out, json, &fetched, table::fetched)
        }
        ArtaugCommand::Images { job, folder } => {
            let wanted = images::last(client, job).await?;
            let fetched = Fetched {
                files: fetch::fetch(client, job, folder, &wanted, !json).await?,
                folder: folder.display().to_string(),
            };
            print(out, json, &fetched, table::fetched)
        }
        ArtaugCommand::Delete { job, yes } => delete(client, job, *yes, json, out).await,
    }
}

async fn delete(
    client: &mut Client,
    job: &str,
    yes: bool,
    json: bool,
    out: &mut dyn Write,
) -> Result<Exit, CliError> {
    if !yes {
        let list = artefacts(client, job).await?.artefacts;
        let size = list
            .iter()
            .fold(0_u64, |sum, artefact| sum.saturating_add(artefact.bytes));
        return Err(CliError::Usage(format!(
            "nothing was deleted: the {} artefacts of job {job} ({}) and all else that the server keeps for it would be gone for \
             good; say --yes to delete them",
            list.len(),
            bytes(size)
        )));
    }
    let request = v1::DeleteJobFilesRequest {
        job_id: job.to_owned(),
    };
    let answer = client.delete_job_files(request).await?.into_inner();
    print(out, json, &Deleted::from(answer), table::deleted)
}

async fn review(
    client: &mut Client,
    job: &str,
    words: Words<'_>,
    gallery: Option<&Path>,
    json: bool,
    out: &mut dyn Write,
) -> Result<Exit, CliError> {
    let request = v1::ListReviewRequest {
        job_id: job.to_owned(),
    };
    let answer = client.list_review(request).await?.into_inner();
    let mut before = Waiting::new(job.to_owned(), answer);
    if let (Some(folder), Some(iteration)) = (gallery, before.iteration) {
        let page = page(client, &before, iteration, folder, !json).await?;
        before.page = Some(page.display().to_string());
    }
    if words.are_none() {
        return print(out, json, &before, table::waiting);
    }
    let decided = words.decide(&before.waiting)?;
    let Some(iteration) = before.iteration else {
        // Saying it of the rest is safe to repeat: nothing is left.
        if words.names_none() {
            let reviewed = Reviewed::new(before, decided, 0);
            return print(out, json, &reviewed, table::reviewed);
        }
        return Err(CliError::Refused(format!(
            "no pair of job {job} waits for a word; `concord job show {job}` says how far it is"
        )));
    };
    let waiting = record(client, job, iteration, &decided).await?;
    let reviewed = Reviewed::new(before, decided, waiting);
    print(out, json, &reviewed, table::reviewed)
}

/// Has words recorded; gives how many pairs still wait.
async fn record(
    client: &mut Client,
    job: &str,
    iteration: u32,
    decided: &Decided,
) -> Result<u32, CliError> {
    let request = v1::ReviewPairsRequest {
        job_id: job.to_owned(),
        iteration,
        accepted: decided.accepted.iter().copied().collect(),
        rejected: decided.rejected.iter().copied().collect(),
    };
    Ok(client.review_pairs(request).await?.into_inner().waiting)
}

/// Writes the page that shows the pairs under a name of ours; an earlier one of the same iteration is replaced.
async fn page(
    client: &mut Client,
    waiting: &Waiting,
    iteration: u32,
    folder: &Path,
    shows_bar: bool,
) -> Result<PathBuf, CliError> {
    let job = &waiting.job_id;
    let name = waiting.gallery.as_deref().unwrap_or_default();
    let list = artefacts(client, job).await?.artefacts;
    let found = list.iter().find(|artefact| artefact.name == name);
    let artefact = found.ok_or_else(|| {
        CliError::NotFound(format!(
            "job {job} has no page of its pairs; `concord artaug artefacts {job}` lists what it has"
        ))
    })?;
    let path = PathBuf::from(format!("review-{iteration}.html"));
    let mut wanted = Wanted::named(artefact, path.clone())?;
    wanted.replaces = true;
    fetch::fetch(client, job, folder, &[wanted], shows_bar).await?;
    Ok(folder.join(path))
}

async fn artefacts(client: &mut Client, job: &str) -> Result<v1::ListArtefactsResponse, CliError> {
    let request = v1::ListArtefactsRequest {
        job_id: job.to_owned(),
    };
    Ok(client.list_artefacts(request).await?.into_inner())
}

/// The artefacts that patterns describe, all without one.
async fn chosen(
    client: &mut Client,
    job: &str,
    patterns: &[String],
    replaces: bool,
) -> Result<Vec<Wanted>, CliError> {
    let mut chosen = artefacts(client, job).await?.artefacts;
    if chosen.is_empty() {
        return Err(CliError::NotFound(format!(
            "job {job} has no artefacts; `concord job show {job}` says how far it is, or that they were deleted"
        )));
    }
    for pattern in patterns {
        if !chosen
            .iter()
            .any(|artefact| names::matches(pattern, &artefact.name))
        {
            return Err(CliError::NotFound(format!(
                "no artefact of job {job} is named `{pattern}`; `concord artaug artefacts {job}` lists them"
            )));
        }
    }
    if !patterns.is_empty() {
        chosen.retain(|artefact| {
            patterns
                .iter()
                .any(|pattern| names::matches(pattern, &artefact.name))
        });
    }
    let mut wanted = fetch::plan(&chosen)?;
    for file in &mut wanted {
        file.replaces = replaces;
    }
    Ok(wanted)
}
