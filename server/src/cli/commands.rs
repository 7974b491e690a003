//! The commands: one call each, and its answer printed.

use std::{
    io::{Read as _, Write},
    path::Path,
};

use concord_common::job::MAX_SPEC_BYTES;
use concord_proto::v1;
use serde::Serialize;

use super::{
    Arguments, CliError, Command, Exit, JobCommand, RoundCommand, SiloCommand, artaug,
    connect::{Client, Connection},
    names, output, table, watch,
};

/// Carries out a command; what it prints goes to `out`.
pub(super) async fn run(arguments: &Arguments, out: &mut dyn Write) -> Result<Exit, CliError> {
    let connection = Connection::resolve(&arguments.connection, |name| {
        std::env::var(name).ok().filter(|value| !value.is_empty())
    })?;
    let mut client = connection.client()?;
    let json = arguments.json;
    match &arguments.command {
        Command::Job(command) => job(&mut client, command, json, out).await,
        Command::Round(command) => round(&mut client, command, json, out).await,
        Command::Artaug(command) => artaug::run(&mut client, command, json, out).await,
        Command::Silo(command) => silo(&mut client, command, json, out).await,
    }
}

async fn job(
    client: &mut Client,
    command: &JobCommand,
    json: bool,
    out: &mut dyn Write,
) -> Result<Exit, CliError> {
    match command {
        JobCommand::Submit {
            file,
            request_id,
            wait,
        } => submit(client, file, request_id.clone(), *wait, json, out).await,
        JobCommand::List { limit } => {
            let request = v1::ListJobsRequest { limit: *limit };
            let answer = client.list_jobs(request).await?.into_inner();
            print(out, json, &output::JobList::from(answer), table::jobs)
        }
        JobCommand::Show { job } => {
            let request = v1::GetJobRequest {
                job_id: job.clone(),
            };
            let answer = client.get_job(request).await?.into_inner();
            print(out, json, &output::JobState::from(answer), table::job)
        }
        JobCommand::Watch { job } => watch::watch(client, job, json, out).await,
        JobCommand::Pause { job } => {
            let request = v1::PauseJobRequest {
                job_id: job.clone(),
            };
            let answer = client.pause_job(request).await?.into_inner();
            print(out, json, &output::JobNow::from(answer.job), table::paused)
        }
        JobCommand::Resume { job } => {
            let request = v1::ResumeJobRequest {
                job_id: job.clone(),
            };
            let answer = client.resume_job(request).await?.into_inner();
            print(out, json, &output::JobNow::from(answer.job), table::now)
        }
        JobCommand::Cancel { job } => {
            let request = v1::CancelJobRequest {
                job_id: job.clone(),
            };
            let answer = client.cancel_job(request).await?.into_inner();
            print(out, json, &output::JobNow::from(answer.job), table::now)
        }
    }
}

async fn submit(
    client: &mut Client,
    file: &Path,
    request_id: Option<String>,
    wait: bool,
    json: bool,
    out: &mut dyn Write,
) -> Result<Exit, CliError> {
    let request = v1::SubmitJobRequest {
        request_id: request_id.unwrap_or_else(|| uuid::Uuid::new_v4().to_string()),
        spec_toml: read_spec(file)?,
    };
    let answer = client.submit_job(request).await?.into_inner();
    let submitted = output::Submitted::from(answer);
    if let Some(warning) = &submitted.warning {
        eprintln!("warning: {}", names::plain(warning));
    }
    // A program that waits reads one JSON object a line.
    if json && wait {
        output::line(out, &submitted)?;
    } else {
        print(out, json, &submitted, |submitted| {
            let verb = if submitted.existed {
                "was queued before"
            } else {
                "queued"
            };
            format!("job {} {verb}\n", submitted.job.job_id)
        })?;
    }
    if wait {
        return watch::watch(client, &submitted.job.job_id, json, out).await;
    }
    Ok(Exit::Done)
}

/// The specification's text; a file larger than any specification is not read to its end.
fn read_spec(file: &Path) -> Result<String, CliError> {
    let most = MAX_SPEC_BYTES as u64 + 1;
    let mut text = String::new();
    let read = if file == Path::new("-") {
        std::io::stdin().take(most).read_to_string(&mut text)
    } else {
        std::fs::File::open(file).and_then(|file| file.take(most).read_to_string(&mut text))
    };
    read.map_err(|error| CliError::Usage(format!("cannot read {}: {error}", file.display())))?;
    Ok(text)
}

async fn round(
    client: &mut Client,
    command: &RoundCommand,
    json: bool,
    out: &mut dyn Write,
) -> Result<Exit, CliError> {
    match command {
        RoundCommand::List { job } => {
            let request = v1::ListRoundsRequest {
                job_id: job.clone(),
            };
            let answer = client.list_rounds(request).await?.into_inner();
            print(out, json, &output::RoundList::from(answer), table::rounds)
        }
        RoundCommand::Show { job, round } => {
            let request = v1::GetRoundRequest {
                job_id: job.clone(),
                round: *round,
            };
            let answer = client.get_round(request).await?.into_inner();
            print(out, json, &output::RoundState::from(answer), table::round)
        }
    }
}

async fn silo(
    client: &mut Client,
    command: &SiloCommand,
    json: bool,
    out: &mut dyn Write,
) -> Result<Exit, CliError> {
    let (silo_id, enrollment) = match command {
        SiloCommand::List => {
            let request = v1::ListSilosRequest {};
            let answer = client.list_silos(request).await?.into_inner();
            return print(out, json, &output::SiloList::from(answer), table::silos);
        }
        SiloCommand::Approve { silo } => (silo, v1::Enrollment::Active),
        SiloCommand::Suspend { silo } => (silo, v1::Enrollment::Suspended),
        SiloCommand::Revoke { silo } => (silo, v1::Enrollment::Revoked),
    };
    let request = v1::SetEnrollmentRequest {
        silo_id: silo_id.clone(),
        enrollment: enrollment as i32,
    };
    let answer = client.set_enrollment(request).await?.into_inner();
    print(out, json, &output::Enrolled::from(answer), table::enrolled)
}

/// Prints an answer for people or for programs.
pub(super) fn print<T: Serialize>(
    out: &mut dyn Write,
    json: bool,
    answer: &T,
    text: impl Fn(&T) -> String,
) -> Result<Exit, CliError> {
    if json {
        output::pretty(out, answer)?;
    } else {
        out.write_all(text(answer).as_bytes())?;
    }
    Ok(Exit::Done)
}
