//! What operators call.

use std::sync::Arc;

use concord_common::{
    ErrorCode, JobId, job::FEDERATED, lifecycle::Shutdown, round::job::JobState, wire,
};
use concord_proto::v1::{self, operator_service_server::OperatorService};
use tonic::{Request, Response, Status};

use super::{BoxStream, operator_of, view};
use crate::{
    context::Context,
    datastore::{JobRecord, Tx, WorkerJobRecord},
    decide,
    error::{Failure, refuse},
};

mod enrollment;
mod outlook;
mod submit;
mod watch;
mod workers;

use outlook::Outlook;

/// Jobs in a list unless the caller says otherwise, and at most.
const LIST_DEFAULT: u32 = 100;
const LIST_MOST: u32 = 1000;

/// The service.
#[derive(Debug, Clone)]
pub struct Operator {
    context: Arc<Context>,
    shutdown: Shutdown,
}

impl Operator {
    /// The service over `context`; its streams end when `shutdown` begins.
    pub fn new(context: Arc<Context>, shutdown: Shutdown) -> Self {
        Self { context, shutdown }
    }
}

#[tonic::async_trait]
impl OperatorService for Operator {
    type WatchJobStream = BoxStream<v1::WatchJobResponse>;
    type GetArtefactStream = BoxStream<v1::GetArtefactResponse>;

    async fn submit_job(
        &self,
        request: Request<v1::SubmitJobRequest>,
    ) -> Result<Response<v1::SubmitJobResponse>, Status> {
        let operator = operator_of(&request)?;
        let (service, request) = (self.clone(), request.into_inner());
        let submitted = async move { service.submit(operator, request).await };
        Ok(Response::new(self.context.to_the_end(submitted).await?))
    }

    async fn list_jobs(
        &self,
        request: Request<v1::ListJobsRequest>,
    ) -> Result<Response<v1::ListJobsResponse>, Status> {
        operator_of(&request)?;
        let limit = match request.into_inner().limit {
            0 => LIST_DEFAULT,
            limit => limit.min(LIST_MOST),
        };
        let now = self.context.now();
        let context = &self.context;
        let (records, workers, outlook) = context
            .datastore
            .run_read("list_jobs", |tx| {
                Box::pin(async move {
                    Ok::<_, Failure>((
                        tx.newest_jobs(limit).await?,
                        tx.newest_worker_jobs(limit).await?,
                        Outlook::look(context, tx, now).await?,
                    ))
                })
            })
            .await?;
        let jobs = records
            .iter()
            .map(|record| outlook.explained(view::job(record, workers.get(&record.job_id), now)))
            .collect();
        Ok(Response::new(v1::ListJobsResponse { jobs }))
    }

    async fn get_job(
        &self,
        request: Request<v1::GetJobRequest>,
    ) -> Result<Response<v1::GetJobResponse>, Status> {
        operator_of(&request)?;
        let job_id = job_id(&request.into_inner().job_id)?;
        let state = self.job_state(&job_id, 0).await?;
        Ok(Response::new(v1::GetJobResponse {
            job: Some(state.view),
            spec_toml: state.job.spec_toml,
            silos: state.silos,
            metrics: state.metrics,
        }))
    }

    async fn watch_job(
        &self,
        request: Request<v1::WatchJobRequest>,
    ) -> Result<Response<Self::WatchJobStream>, Status> {
        operator_of(&request)?;
        let job_id = job_id(&request.into_inner().job_id)?;
        // An unknown job is refused before the stream begins.
        self.job_state(&job_id, i64::MAX).await?;
        Ok(Response::new(watch::watch(self.clone(), job_id)))
    }

    async fn cancel_job(
        &self,
        request: Request<v1::CancelJobRequest>,
    ) -> Result<Response<v1::CancelJobResponse>, Status> {
        let operator = operator_of(&request)?;
        let job_id = job_id(&request.into_inner().job_id)?;
        let service = self.clone();
        let cancelled = async move { service.cancel(&operator, &job_id).await };
        let job = self.context.to_the_end(cancelled).await?;
        Ok(Response::new(v1::CancelJobResponse { job: Some(job) }))
    }

    async fn pause_job(
        &self,
        request: Request<v1::PauseJobRequest>,
    ) -> Result<Response<v1::PauseJobResponse>, Status> {
        let operator = operator_of(&request)?;
        let job_id = job_id(&request.into_inner().job_id)?;
        let paused = workers::set_paused(Arc::clone(&self.context), operator, job_id, true);
        let job = self.context.to_the_end(paused).await?;
        Ok(Response::new(v1::PauseJobResponse { job: Some(job) }))
    }

    async fn resume_job(
        &self,
        request: Request<v1::ResumeJobRequest>,
    ) -> Result<Response<v1::ResumeJobResponse>, Status> {
        let operator = operator_of(&request)?;
        let job_id = job_id(&request.into_inner().job_id)?;
        let resumed = workers::set_paused(Arc::clone(&self.context), operator, job_id, false);
        let job = self.context.to_the_end(resumed).await?;
        Ok(Response::new(v1::ResumeJobResponse { job: Some(job) }))
    }

    async fn list_review(
        &self,
        request: Request<v1::ListReviewRequest>,
    ) -> Result<Response<v1::ListReviewResponse>, Status> {
        operator_of(&request)?;
        let job_id = job_id(&request.into_inner().job_id)?;
        let waiting = workers::list_review(&self.context, &job_id).await?;
        Ok(Response::new(waiting))
    }

    async fn review_pairs(
        &self,
        request: Request<v1::ReviewPairsRequest>,
    ) -> Result<Response<v1::ReviewPairsResponse>, Status> {
        let operator = operator_of(&request)?;
        let said = workers::review(Arc::clone(&self.context), operator, request.into_inner());
        Ok(Response::new(self.context.to_the_end(said).await?))
    }

    async fn list_artefacts(
        &self,
        request: Request<v1::ListArtefactsRequest>,
    ) -> Result<Response<v1::ListArtefactsResponse>, Status> {
        operator_of(&request)?;
        let job_id = job_id(&request.into_inner().job_id)?;
        let artefacts = workers::list_artefacts(&self.context, &job_id).await?;
        Ok(Response::new(artefacts))
    }

    async fn get_artefact(
        &self,
        request: Request<v1::GetArtefactRequest>,
    ) -> Result<Response<Self::GetArtefactStream>, Status> {
        let operator = operator_of(&request)?;
        let request = request.into_inner();
        let pieces = workers::get_artefact(&self.context, operator, &request).await?;
        Ok(Response::new(pieces))
    }

    async fn delete_job_files(
        &self,
        request: Request<v1::DeleteJobFilesRequest>,
    ) -> Result<Response<v1::DeleteJobFilesResponse>, Status> {
        let operator = operator_of(&request)?;
        let job_id = job_id(&request.into_inner().job_id)?;
        let deleted = workers::delete_files(Arc::clone(&self.context), operator, job_id);
        Ok(Response::new(self.context.to_the_end(deleted).await?))
    }

    async fn list_rounds(
        &self,
        request: Request<v1::ListRoundsRequest>,
    ) -> Result<Response<v1::ListRoundsResponse>, Status> {
        operator_of(&request)?;
        let job_id = &job_id(&request.into_inner().job_id)?;
        let records = self
            .context
            .datastore
            .run_read("list_rounds", |tx| {
                Box::pin(async move {
                    decide::job(tx, job_id).await?;
                    Ok::<_, Failure>(tx.rounds(job_id).await?)
                })
            })
            .await?;
        let rounds = records
            .iter()
            .map(|record| view::round(job_id, record))
            .collect();
        Ok(Response::new(v1::ListRoundsResponse { rounds }))
    }

    async fn get_round(
        &self,
        request: Request<v1::GetRoundRequest>,
    ) -> Result<Response<v1::GetRoundResponse>, Status> {
        operator_of(&request)?;
        let request = request.into_inner();
        let job_id = &job_id(&request.job_id)?;
        let number = wire::round_number(request.round).map_err(Failure::from)?;
        let (round, silos) = self
            .context
            .datastore
            .run_read("get_round", |tx| {
                Box::pin(async move {
                    decide::job(tx, job_id).await?;
                    let Some(round) = tx.round(job_id, number).await? else {
                        return refuse(
                            ErrorCode::UnknownRound,
                            format!("job `{job_id}` has no round {number}"),
                        );
                    };
                    Ok::<_, Failure>((round, tx.round_silos(job_id, number).await?))
                })
            })
            .await?;
        Ok(Response::new(v1::GetRoundResponse {
            round: Some(view::round(job_id, &round)),
            silos: silos.iter().map(view::round_silo).collect(),
        }))
    }

    async fn list_silos(
        &self,
        request: Request<v1::ListSilosRequest>,
    ) -> Result<Response<v1::ListSilosResponse>, Status> {
        operator_of(&request)?;
        let records = self
            .context
            .datastore
            .run_read("list_silos", |tx| {
                Box::pin(async move { Ok::<_, Failure>(tx.silos().await?) })
            })
            .await?;
        let silos = records
            .iter()
            .map(|record| view::silo(record, self.context.hub.is_connected(&record.silo_id)))
            .collect();
        Ok(Response::new(v1::ListSilosResponse { silos }))
    }

    async fn set_enrollment(
        &self,
        request: Request<v1::SetEnrollmentRequest>,
    ) -> Result<Response<v1::SetEnrollmentResponse>, Status> {
        let operator = operator_of(&request)?;
        let set = enrollment::set(Arc::clone(&self.context), operator, request.into_inner());
        Ok(Response::new(self.context.to_the_end(set).await?))
    }
}

fn job_id(text: &str) -> Result<JobId, Failure> {
    Ok(wire::job_id(text)?)
}

/// One job with everything that operators see of it.
struct JobView {
    job: JobRecord,
    view: v1::Job,
    silos: Vec<v1::SiloProgress>,
    metrics: Vec<v1::MetricReport>,
    last_report: i64,
}

impl Operator {
    /// The job now, with the reports that came after number `after`.
    async fn job_state(&self, job_id: &JobId, after: i64) -> Result<JobView, Failure> {
        let (context, now) = (&self.context, self.context.now());
        context
            .datastore
            .run_read("get_job", |tx| {
                Box::pin(async move {
                    let job = decide::job(tx, job_id).await?;
                    let worker = worker_part(tx, &job).await?;
                    let outlook = Outlook::look(context, tx, now).await?;
                    let silos = view::progress(tx, &job, now).await?;
                    let reports = tx.reports_after(job_id, after).await?;
                    Ok::<_, Failure>(JobView {
                        view: outlook.explained(view::job(&job, worker.as_ref(), now)),
                        job,
                        silos,
                        last_report: reports
                            .iter()
                            .map(|report| report.seq)
                            .fold(after, i64::max),
                        metrics: reports
                            .iter()
                            .map(|report| report.report.to_proto())
                            .collect(),
                    })
                })
            })
            .await
    }

    async fn cancel(&self, operator: &str, job_id: &JobId) -> Result<v1::Job, Failure> {
        let context = &self.context;
        let (now, signer) = (context.now(), &context.signer);
        let reason = &format!("cancelled by operator `{operator}`");
        let (ended, job) = context
            .datastore
            .run_tx("cancel_job", |tx| {
                Box::pin(async move {
                    let state = JobState::Cancelled;
                    let record = decide::job(tx, job_id).await?;
                    // A repeated call finds the job as the first one left it.
                    let ended = if record.state == state {
                        None
                    } else if worker_part(tx, &record).await?.is_some() {
                        let change = decide::workers::cancel(tx, job_id, reason, now).await?;
                        Some(Ended::Workers(change))
                    } else {
                        let change = decide::end(tx, signer, job_id, state, reason, now).await?;
                        Some(Ended::Silos(Box::new(change)))
                    };
                    let record = decide::job(tx, job_id).await?;
                    let worker = worker_part(tx, &record).await?;
                    Ok::<_, Failure>((ended, view::job(&record, worker.as_ref(), now)))
                })
            })
            .await?;
        match ended {
            Some(Ended::Silos(change)) => change.announce(job_id, &context.hub),
            Some(Ended::Workers(change)) => change.announce(&context.hub),
            None => {}
        }
        Ok(job)
    }
}

/// What ending a job changed, by who runs it.
enum Ended {
    Silos(Box<decide::Change>),
    Workers(decide::workers::WorkerChange),
}

/// The workers' part of a job; none if silos run it.
async fn worker_part(tx: &mut Tx<'_>, job: &JobRecord) -> Result<Option<WorkerJobRecord>, Failure> {
    if job.kind == FEDERATED {
        return Ok(None);
    }
    Ok(tx.worker_job(&job.job_id).await?)
}
