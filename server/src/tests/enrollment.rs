//! Approval, suspension and revocation: what an operator says counts at once, everywhere.

use concord_common::{ErrorCode, Role, chunk};
use concord_proto::v1::{
    self, Enrollment, JobState, Outcome, RoundPhase,
    federation_service_client::FederationServiceClient,
    operator_service_client::OperatorServiceClient,
};
use futures::stream;
use tokio::task::JoinSet;
use tonic::{Status, transport::Channel};

use super::harness::{World, code, constant, eventually, expect_published, spec};
use crate::config::EnrollmentPolicy;

async fn set(
    world: &World,
    silo: &str,
    enrollment: Enrollment,
) -> Result<v1::SetEnrollmentResponse, Status> {
    let request = v1::SetEnrollmentRequest {
        silo_id: silo.to_owned(),
        enrollment: enrollment as i32,
    };
    let answer = world.operator().set_enrollment(request).await?;
    Ok(answer.into_inner())
}

/// The code that each call of a silo is refused with; none where one was let through.
async fn every_call(silo: &mut FederationServiceClient<Channel>) -> Vec<Option<ErrorCode>> {
    let job_id = "a-job".to_owned();
    let report = v1::MetricReport {
        job_id: job_id.clone(),
        silo_id: "a".to_owned(),
        round: 1,
        point: v1::MetricPoint::AfterTraining as i32,
        metrics: Vec::new(),
    };
    let answers = [
        silo.get_server_info(v1::GetServerInfoRequest {})
            .await
            .err(),
        silo.watch_rounds(v1::WatchRoundsRequest {}).await.err(),
        silo.poll_rounds(v1::PollRoundsRequest {}).await.err(),
        silo.claim_lease(v1::ClaimLeaseRequest {
            job_id: job_id.clone(),
            round: 1,
        })
        .await
        .err(),
        silo.decline_job(v1::DeclineJobRequest {
            job_id: job_id.clone(),
            reason: "UNKNOWN_TASK".to_owned(),
            message: "no".to_owned(),
        })
        .await
        .err(),
        silo.download_adapter(v1::DownloadAdapterRequest {
            job_id: job_id.clone(),
            version: vec![0; 32],
            offset: 0,
        })
        .await
        .err(),
        silo.begin_contribution(v1::BeginContributionRequest {
            job_id,
            round: 1,
            ..Default::default()
        })
        .await
        .err(),
        silo.upload_contribution(stream::iter([v1::UploadContributionRequest {
            upload_id: vec![0; 16],
            chunk: None,
        }]))
        .await
        .err(),
        silo.report_metrics(v1::ReportMetricsRequest {
            report: Some(report),
        })
        .await
        .err(),
    ];
    answers
        .into_iter()
        .map(|status| status.map(|status| code::<()>(Err(status))))
        .collect()
}

#[tokio::test]
async fn a_silo_that_waits_for_approval_is_let_in_and_the_job_that_waits_for_it_begins() {
    let world = World::start_with(|config| config.enrollment = EnrollmentPolicy::Manual).await;
    let mut client = FederationServiceClient::new(world.channel(Role::Silo, "a"));
    assert_eq!(
        every_call(&mut client).await,
        [Some(ErrorCode::NotEnrolled); 9]
    );
    let job_id = world.submit(&spec(1, 1, "")).await;
    world.wait_for_state(&job_id, JobState::Running).await;
    assert_eq!(world.job(&job_id).await.job.unwrap().round, 0);

    let approved = set(&world, "a", Enrollment::Active).await.unwrap();
    assert_eq!(approved.before(), Enrollment::Pending);
    assert_eq!(approved.silo.unwrap().enrollment(), Enrollment::Active);
    let mut a = world.silo("a").await;
    a.contribute(&job_id, 1, 1.0, 1).await;
    world.wait_for_state(&job_id, JobState::Succeeded).await;
}

#[tokio::test]
async fn a_suspended_or_revoked_silo_is_refused_on_every_call_and_its_stream_ends_with_the_reason()
{
    let world = World::start().await;
    let [mut a, mut b] = world.silos(["a", "b"]).await;
    let mut at_b = b.client.watch_rounds(v1::WatchRoundsRequest {}).await;
    at_b.as_mut().unwrap().get_mut().message().await.unwrap();
    for enrollment in [Enrollment::Suspended, Enrollment::Revoked] {
        let stream = a.client.watch_rounds(v1::WatchRoundsRequest {}).await;
        let mut stream = stream.unwrap().into_inner();
        stream.message().await.unwrap();
        set(&world, "a", enrollment).await.unwrap();
        assert_eq!(code(stream.message().await), ErrorCode::NotEnrolled);
        assert_eq!(
            every_call(&mut a.client).await,
            [Some(ErrorCode::NotEnrolled); 9]
        );
        if enrollment == Enrollment::Suspended {
            set(&world, "a", Enrollment::Active).await.unwrap();
        }
    }
    // Others go on, in the stream that they have.
    let job_id = world.submit(&spec(1, 1, "")).await;
    b.contribute(&job_id, 1, 1.0, 1).await;
    let notices = at_b.unwrap().get_mut().message().await.unwrap().unwrap();
    assert_eq!(notices.notices[0].job_id, job_id);
    assert_eq!(world.round(&job_id, 1).await.silos.len(), 1);
}

#[tokio::test]
async fn an_enrollment_changes_along_the_allowed_ways_only() {
    use Enrollment::{Active, Pending, Revoked, Suspended, Unspecified};
    let world = World::start_with(|config| config.enrollment = EnrollmentPolicy::Manual).await;
    for (name, way, last) in [
        ("a", vec![], Suspended),
        ("b", vec![Revoked], Active),
        ("c", vec![Active, Suspended, Active, Revoked], Active),
        ("d", vec![Active, Suspended, Revoked], Suspended),
    ] {
        let mut client = FederationServiceClient::new(world.channel(Role::Silo, name));
        let call = client.get_server_info(v1::GetServerInfoRequest {}).await;
        assert_eq!(code(call), ErrorCode::NotEnrolled);
        let mut before = Pending;
        for step in way {
            for repeated in [before, step] {
                let answer = set(&world, name, step).await.unwrap();
                assert_eq!(answer.before(), repeated);
                before = step;
            }
        }
        let refused = set(&world, name, last).await;
        assert_eq!(code(refused), ErrorCode::WrongEnrollment, "{name}");
    }
    for nonsense in [Unspecified, Pending] {
        let refused = set(&world, "a", nonsense).await;
        assert_eq!(code(refused), ErrorCode::InvalidRequest);
    }
    let refused = set(&world, "nobody", Active).await;
    assert_eq!(code(refused), ErrorCode::UnknownSilo);
    let request = v1::SetEnrollmentRequest {
        silo_id: "a".to_owned(),
        enrollment: Active as i32,
    };
    let mut silo = OperatorServiceClient::new(world.channel(Role::Silo, "a"));
    assert_eq!(
        code(silo.set_enrollment(request).await),
        ErrorCode::WrongRole
    );
}

#[tokio::test]
async fn what_a_revoked_silo_contributed_before_counts_and_nobody_waits_for_it_any_more() {
    let world = World::start().await;
    let [mut a, mut b, mut c] = world.silos(["a", "b", "c"]).await;
    let job_id = world.submit(&spec(2, 1, "max_time = \"10days\"")).await;
    b.wait_for_round(&job_id, 1).await;
    let accepted = a.contribute(&job_id, 1, 1.0, 1).await;
    assert_eq!(accepted.outcome(), Outcome::Accepted);
    set(&world, "a", Enrollment::Revoked).await.unwrap();
    set(&world, "b", Enrollment::Revoked).await.unwrap();
    c.contribute(&job_id, 1, 2.0, 1).await;
    // Long before its time is up, because nobody is awaited.
    expect_published(&world, &mut c, &job_id, 1, &[("a", 1.0, 1), ("c", 2.0, 1)]).await;
    let silos = world.round(&job_id, 1).await.silos;
    assert_eq!(
        (silos[1].outcome(), silos[1].reason.as_str()),
        (Outcome::Declined, "NOT_ENROLLED")
    );
    c.contribute(&job_id, 2, 1.0, 1).await;
    world.wait_for_state(&job_id, JobState::Succeeded).await;
    assert_eq!(world.round(&job_id, 2).await.silos.len(), 1);
}

#[tokio::test]
async fn a_round_that_a_revocation_leaves_too_small_fails_at_once() {
    let world = World::start().await;
    let [mut a, mut b] = world.silos(["a", "b"]).await;
    let job_id = world.submit(&spec(1, 2, "max_time = \"10days\"")).await;
    b.wait_for_round(&job_id, 1).await;
    a.contribute(&job_id, 1, 1.0, 1).await;
    set(&world, "b", Enrollment::Revoked).await.unwrap();
    let job = world.wait_for_state(&job_id, JobState::Failed).await;
    assert!(job.reason.contains("1 declined"), "{}", job.reason);
}

#[tokio::test]
async fn an_upload_that_outlasts_its_silos_enrollment_does_not_count() {
    let world = World::start().await;
    let [mut a] = world.silos(["a"]).await;
    let job_id = world.submit(&spec(1, 1, "")).await;
    let offer = a.offer(&job_id, 1, constant(1.5), 4).await;
    let begun = a.client.begin_contribution(offer.begin.clone()).await;
    let upload_id = begun.unwrap().into_inner().upload_id;
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    let mut client = a.client.clone();
    let messages = tokio_stream::wrappers::ReceiverStream::new(receiver);
    let mut call = JoinSet::new();
    call.spawn(async move { client.upload_contribution(messages).await });
    let mut chunks = chunk::chunks(&offer.payload, 0, 300).map(|chunk| {
        let upload_id = upload_id.clone();
        v1::UploadContributionRequest {
            upload_id,
            chunk: Some(chunk),
        }
    });
    sender.send(chunks.next().unwrap()).await.unwrap();
    let spooled = world.config.state_dir.join("spool");
    eventually("300 bytes in the spool", async || {
        let file = std::fs::read_dir(&spooled).unwrap().next()?.unwrap();
        (file.metadata().unwrap().len() == 300).then_some(())
    })
    .await;
    set(&world, "a", Enrollment::Suspended).await.unwrap();
    for message in chunks {
        sender.send(message).await.unwrap();
    }
    drop(sender);
    assert_eq!(
        code(call.join_next().await.unwrap().unwrap()),
        ErrorCode::NotEnrolled
    );
    let round = world.round(&job_id, 1).await;
    assert_eq!(round.round.unwrap().phase(), RoundPhase::Announced);
    assert_eq!(round.silos[0].outcome(), Outcome::Unspecified);

    // It may go on when the suspension is lifted.
    set(&world, "a", Enrollment::Active).await.unwrap();
    let receipt = a.send(&offer).await.unwrap();
    assert_eq!(receipt.outcome(), Outcome::Accepted);
    world.wait_for_state(&job_id, JobState::Succeeded).await;
}

#[tokio::test]
async fn a_download_is_cut_when_its_silo_is_shut_out() {
    let world = World::start_with(|config| config.limits.max_transfers = 1).await;
    let [mut a, mut b] = world.silos(["a", "b"]).await;
    // More bytes than all buffers on the way can hold.
    let large = spec(1, 2, "").replace("hidden = 16", "hidden = 16384");
    let job_id = world
        .submit(&large.replace("bottleneck = 8", "bottleneck = 64"))
        .await;
    let version = a.wait_for_round(&job_id, 1).await.base_version;
    let request = v1::DownloadAdapterRequest {
        job_id: job_id.clone(),
        version: version.clone(),
        offset: 0,
    };
    let answer = a.client.download_adapter(request).await.unwrap();
    let mut unread = answer.into_inner();
    unread.message().await.unwrap().unwrap();
    set(&world, "a", Enrollment::Suspended).await.unwrap();
    // The other one gets the turn, although nothing of the first was read in the meantime.
    b.download(&job_id, &version, 0).await.unwrap();
    let end = loop {
        match unread.message().await {
            Ok(Some(_)) => {}
            end => break end,
        }
    };
    assert_eq!(code(end), ErrorCode::NotEnrolled);
}
