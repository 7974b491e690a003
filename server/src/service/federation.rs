//! What silos call.

use std::sync::Arc;

use concord_common::{
    ErrorCode, JobId, RoundNumber, SiloId, Timestamp,
    code::Refusal,
    lifecycle::Shutdown,
    round::{Event, job::JobState},
    wire::{self, MetricReport},
};
use concord_proto::v1::{self, federation_service_server::FederationService};
use futures::stream;
use tonic::{Request, Response, Status, Streaming};

use super::{BoxStream, admit, notice, silo_of, transfer::TransferGate, upload};
use crate::{
    context::Context,
    datastore::{JobRecord, LeaseRecord, Tx},
    decide,
    error::{Failure, refuse},
    metrics::Level,
};

pub(crate) mod begin;
mod download;

/// Longest message of a silo that declines.
const MAX_DECLINE_BYTES: usize = 512;

/// The service.
#[derive(Debug, Clone)]
pub struct Federation {
    context: Arc<Context>,
    gate: Arc<TransferGate>,
    shutdown: Shutdown,
}

impl Federation {
    /// The service over `context`; its streams end when `shutdown` begins.
    pub fn new(context: Arc<Context>, shutdown: Shutdown) -> Self {
        Self {
            gate: Arc::new(TransferGate::new(&context.config.limits)),
            context,
            shutdown,
        }
    }
}

/// What streams end with when the server stops.
pub(super) fn shutting_down() -> Refusal {
    Refusal::new(ErrorCode::ShuttingDown, "the server is stopping; try again")
        .retry_after(std::time::Duration::from_secs(2))
}

#[tonic::async_trait]
impl FederationService for Federation {
    type WatchRoundsStream = BoxStream<v1::WatchRoundsResponse>;
    type DownloadAdapterStream = BoxStream<v1::DownloadAdapterResponse>;

    async fn get_server_info(
        &self,
        request: Request<v1::GetServerInfoRequest>,
    ) -> Result<Response<v1::GetServerInfoResponse>, Status> {
        silo_of(&self.context, &request).await?;
        Ok(Response::new(v1::GetServerInfoResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            federation: self.context.config.federation.clone(),
            receipt_public_key: self.context.signer.public_key().to_vec(),
            max_chunk_bytes: concord_common::chunk::MAX_CHUNK_BYTES as u32,
        }))
    }

    async fn watch_rounds(
        &self,
        request: Request<v1::WatchRoundsRequest>,
    ) -> Result<Response<Self::WatchRoundsStream>, Status> {
        let silo_id = silo_of(&self.context, &request).await?;
        let watch = Watch {
            changes: self.context.hub.watch_silo(&silo_id),
            context: Arc::clone(&self.context),
            shutdown: self.shutdown.clone(),
            silo_id,
            last: None,
            ends: tokio::time::Instant::now() + self.context.config.limits.max_connection_age,
            _level: Level::watching_silo(),
        };
        let notices = stream::unfold(Some(watch), |watch| async move {
            let mut watch = watch?;
            match watch.next().await {
                Ok(None) => None,
                Ok(Some(notices)) => Some((Ok(v1::WatchRoundsResponse { notices }), Some(watch))),
                Err(failure) => Some((Err(failure.into()), None)),
            }
        });
        Ok(Response::new(Box::pin(notices)))
    }

    async fn poll_rounds(
        &self,
        request: Request<v1::PollRoundsRequest>,
    ) -> Result<Response<v1::PollRoundsResponse>, Status> {
        let silo_id = silo_of(&self.context, &request).await?;
        let notices = notice::notices(&self.context, &silo_id).await?;
        Ok(Response::new(v1::PollRoundsResponse { notices }))
    }

    async fn claim_lease(
        &self,
        request: Request<v1::ClaimLeaseRequest>,
    ) -> Result<Response<v1::ClaimLeaseResponse>, Status> {
        let silo_id = silo_of(&self.context, &request).await?;
        let request = request.into_inner();
        let job_id = wire::job_id(&request.job_id).map_err(Failure::from)?;
        let round = wire::round_number(request.round).map_err(Failure::from)?;
        let (service, caller) = (self.clone(), silo_id.clone());
        let claimed = async move { service.claim(&job_id, round, &silo_id).await };
        let claimed = self.context.to_the_end_for(&caller, claimed).await?;
        Ok(Response::new(claimed))
    }

    async fn decline_job(
        &self,
        request: Request<v1::DeclineJobRequest>,
    ) -> Result<Response<v1::DeclineJobResponse>, Status> {
        let silo_id = silo_of(&self.context, &request).await?;
        let (service, request) = (self.clone(), request.into_inner());
        let caller = silo_id.clone();
        let declined = async move { service.decline(&silo_id, &request).await };
        self.context.to_the_end_for(&caller, declined).await?;
        Ok(Response::new(v1::DeclineJobResponse {}))
    }

    async fn download_adapter(
        &self,
        request: Request<v1::DownloadAdapterRequest>,
    ) -> Result<Response<Self::DownloadAdapterStream>, Status> {
        let silo_id = silo_of(&self.context, &request).await?;
        let request = request.into_inner();
        let pieces = download::start(self, silo_id, &request).await?;
        Ok(Response::new(Box::pin(pieces)))
    }

    async fn begin_contribution(
        &self,
        request: Request<v1::BeginContributionRequest>,
    ) -> Result<Response<v1::BeginContributionResponse>, Status> {
        let silo_id = silo_of(&self.context, &request).await?;
        let (context, caller) = (&self.context, silo_id.clone());
        let begun = begin::begin(Arc::clone(context), silo_id, request.into_inner());
        let begun = context.to_the_end_for(&caller, begun).await?;
        Ok(Response::new(begun))
    }

    async fn upload_contribution(
        &self,
        request: Request<Streaming<v1::UploadContributionRequest>>,
    ) -> Result<Response<v1::UploadContributionResponse>, Status> {
        let silo_id = silo_of(&self.context, &request).await?;
        let receive = upload::receive(&self.context, &self.gate, &silo_id, request.into_inner());
        let receipt = tokio::select! {
            received = receive => received?,
            () = self.shutdown.hard_token().cancelled_owned() => return Err(shutting_down().into()),
        };
        Ok(Response::new(v1::UploadContributionResponse {
            receipt: Some(receipt),
        }))
    }

    async fn report_metrics(
        &self,
        request: Request<v1::ReportMetricsRequest>,
    ) -> Result<Response<v1::ReportMetricsResponse>, Status> {
        let silo_id = silo_of(&self.context, &request).await?;
        let (service, request) = (self.clone(), request.into_inner());
        let caller = silo_id.clone();
        let reported = async move { service.report(silo_id, &request).await };
        self.context.to_the_end_for(&caller, reported).await?;
        Ok(Response::new(v1::ReportMetricsResponse {}))
    }
}

impl Federation {
    async fn claim(
        &self,
        job_id: &JobId,
        round: RoundNumber,
        silo_id: &SiloId,
    ) -> Result<v1::ClaimLeaseResponse, Failure> {
        let context = &self.context;
        let now = context.now();
        let lease_time = context.config.jobs.lease;
        let fresh = context.ids.token();
        let (job, lease) = context
            .datastore
            .run_tx_unsynced("claim_lease", |tx| {
                Box::pin(async move {
                    let asked = tx.round_silo(job_id, round, silo_id).await?.is_some();
                    let job = if asked {
                        decide::job(tx, job_id).await?
                    } else {
                        job_of_silo(tx, job_id, silo_id).await?
                    };
                    check_open(&job)?;
                    check_current_round(tx, &job, round, silo_id, asked).await?;
                    let held = tx.lease(job_id, round, silo_id).await?;
                    let lease = renew(held, fresh, now + lease_time, now);
                    tx.put_lease(job_id, round, silo_id, &lease).await?;
                    Ok::<_, Failure>((job, lease))
                })
            })
            .await?;
        context.hub.job_changed(job_id);
        let known = context.specs.of(&job)?;
        let layout = &known.layout;
        let Some(base) = job.adapter_version else {
            return refuse(ErrorCode::Internal, "the job runs without an adapter");
        };
        Ok(v1::ClaimLeaseResponse {
            lease_token: lease.token.to_vec(),
            expires_at: Some(lease.expires_at.to_proto()),
            layout_digest: layout.digest().to_vec(),
            payload_bytes: layout.payload_bytes(),
            layout: Some(layout.to_proto()),
            base_version: base.0.to_vec(),
            lease_duration: Some(wire::duration_to_proto(lease_time)),
            spec_toml: job.spec_toml,
        })
    }

    pub(crate) async fn decline(
        &self,
        silo_id: &SiloId,
        request: &v1::DeclineJobRequest,
    ) -> Result<(), Failure> {
        let job_id = &wire::job_id(&request.job_id)?;
        let code: ErrorCode = request
            .reason
            .parse()
            .map_err(|error| wire::invalid_field("reason", error))?;
        let message = request.message.as_str();
        if message.len() > MAX_DECLINE_BYTES || message.chars().any(char::is_control) {
            let problem = format!("must be one line of at most {MAX_DECLINE_BYTES} bytes");
            return Err(wire::invalid_field("message", problem).into());
        }
        let context = &self.context;
        let (now, signer) = (context.now(), &context.signer);
        let change = context
            .datastore
            .run_tx("decline_job", |tx| {
                Box::pin(async move {
                    let job = open_job(tx, job_id, silo_id).await?;
                    tx.decline_job(job_id, silo_id, code, message).await?;
                    let number = RoundNumber(job.round);
                    if tx.round_silo(job_id, number, silo_id).await?.is_none() {
                        return Ok(decide::Change::default());
                    }
                    let event = Event::Declined {
                        silo: silo_id.clone(),
                        code,
                    };
                    decide::apply(tx, signer, job_id, number, event, None, now).await
                })
            })
            .await?;
        tracing::info!(job.id = %job_id, silo.id = %silo_id, code = %code, message, "silo declined");
        change.announce(job_id, &context.hub);
        Ok(())
    }

    async fn report(
        &self,
        silo_id: SiloId,
        request: &v1::ReportMetricsRequest,
    ) -> Result<(), Failure> {
        let report = wire::required("report", request.report.as_ref())?;
        let report = &MetricReport::from_silo(report, silo_id)?;
        self.context
            .datastore
            .run_tx("report_metrics", |tx| {
                Box::pin(async move {
                    let job = job_of_silo(tx, &report.job, &report.silo).await?;
                    if report.round.0 > job.round {
                        return unknown_round(&report.job, report.round);
                    }
                    Ok::<_, Failure>(tx.put_report(report).await?)
                })
            })
            .await?;
        self.context.hub.job_changed(&report.job);
        Ok(())
    }
}

/// One silo's view of its rounds.
struct Watch {
    context: Arc<Context>,
    shutdown: Shutdown,
    silo_id: SiloId,
    changes: tokio::sync::watch::Receiver<()>,
    last: Option<Vec<v1::RoundNotice>>,
    /// When the silo is to watch anew, so that its connection can come to an end.
    ends: tokio::time::Instant,
    _level: Level,
}

impl Watch {
    /// The present state at first, later the next one that differs; none when the silo is to watch anew.
    async fn next(&mut self) -> Result<Option<Vec<v1::RoundNotice>>, Failure> {
        loop {
            if self.last.is_some() {
                tokio::select! {
                    // The hub lives in the context, so that the sender cannot be gone.
                    _ = self.changes.changed() => {}
                    () = self.shutdown.token().cancelled_owned() => return Err(shutting_down().into()),
                    () = tokio::time::sleep_until(self.ends) => return Ok(None),
                }
                admit(&self.context, &self.silo_id).await?;
            }
            self.changes.mark_unchanged();
            let notices = notice::notices(&self.context, &self.silo_id).await?;
            if self.last.as_ref() != Some(&notices) {
                self.last = Some(notices.clone());
                return Ok(Some(notices));
            }
        }
    }
}

/// A job that the silo is part of.
async fn job_of_silo(
    tx: &mut Tx<'_>,
    job_id: &JobId,
    silo_id: &SiloId,
) -> Result<JobRecord, Failure> {
    let job = decide::job(tx, job_id).await?;
    if tx.is_job_silo(job_id, silo_id).await? {
        return Ok(job);
    }
    // The same words as for a job that is not there: its name is none of the silo's business.
    refuse(ErrorCode::UnknownJob, format!("there is no job `{job_id}`"))
}

/// A running job that the silo is part of.
async fn open_job(tx: &mut Tx<'_>, job_id: &JobId, silo_id: &SiloId) -> Result<JobRecord, Failure> {
    let job = job_of_silo(tx, job_id, silo_id).await?;
    check_open(&job)?;
    Ok(job)
}

fn check_open(job: &JobRecord) -> Result<(), Failure> {
    if job.state == JobState::Running {
        return Ok(());
    }
    refuse(
        ErrorCode::JobEnded,
        format!(
            "job `{}` is not running any more: it has {}",
            job.job_id, job.state
        ),
    )
}

fn unknown_round<T>(job_id: &JobId, round: RoundNumber) -> Result<T, Failure> {
    refuse(
        ErrorCode::UnknownRound,
        format!("job `{job_id}` has no round {round}"),
    )
}

/// Checks that a round is the current one, is open, and has the silo in its cohort.
async fn check_current_round(
    tx: &mut Tx<'_>,
    job: &JobRecord,
    round: RoundNumber,
    silo_id: &SiloId,
    asked: bool,
) -> Result<(), Failure> {
    let (job_id, current) = (&job.job_id, job.round);
    if round.0 > current {
        return unknown_round(job_id, round);
    }
    if round.0 < current {
        return refuse(
            ErrorCode::WrongRound,
            format!("round {round} of job `{job_id}` is over; the current one is {current}"),
        );
    }
    let Some(record) = tx.round(job_id, round).await? else {
        return unknown_round(job_id, round);
    };
    if !record.phase.is_open() {
        return refuse(
            ErrorCode::Late,
            format!(
                "round {round} of job `{job_id}` is closed ({})",
                record.phase
            ),
        );
    }
    if !asked {
        return refuse(
            ErrorCode::NotInCohort,
            format!("silo `{silo_id}` is not in the cohort of round {round}; wait to be asked"),
        );
    }
    Ok(())
}

/// The lease that a claim gives: a held one for longer, otherwise a new one.
fn renew(
    held: Option<LeaseRecord>,
    fresh: [u8; 16],
    expires_at: Timestamp,
    now: Timestamp,
) -> LeaseRecord {
    match held {
        Some(lease) if lease.expires_at > now => LeaseRecord {
            expires_at,
            ..lease
        },
        lost => LeaseRecord {
            token: fresh,
            expires_at,
            attempts: lost.map_or(1, |lease| lease.attempts + 1),
        },
    }
}
