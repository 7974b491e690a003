//! Who may call what.

use concord_common::{ErrorCode, Role};
use concord_proto::v1::{
    self, federation_service_client::FederationServiceClient,
    operator_service_client::OperatorServiceClient, worker_service_client::WorkerServiceClient,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use super::harness::{World, code, eventually, spec};

#[tokio::test]
async fn each_service_is_for_its_role_only() {
    let world = World::start().await;
    for role in [Role::Operator, Role::Worker] {
        let mut client = FederationServiceClient::new(world.channel(role, "x"));
        let answer = client.get_server_info(v1::GetServerInfoRequest {}).await;
        assert_eq!(code(answer), ErrorCode::WrongRole);
        let answer = client.watch_rounds(v1::WatchRoundsRequest {}).await;
        assert_eq!(code(answer), ErrorCode::WrongRole);
    }
    for role in [Role::Silo, Role::Worker] {
        let mut client = OperatorServiceClient::new(world.channel(role, "x"));
        let answer = client.list_jobs(v1::ListJobsRequest { limit: 0 }).await;
        assert_eq!(code(answer), ErrorCode::WrongRole);
        let request = v1::SubmitJobRequest {
            request_id: "id".to_owned(),
            spec_toml: spec(1, 1, ""),
        };
        assert_eq!(code(client.submit_job(request).await), ErrorCode::WrongRole);
        let request = v1::PauseJobRequest::default();
        assert_eq!(code(client.pause_job(request).await), ErrorCode::WrongRole);
        let request = v1::ResumeJobRequest::default();
        assert_eq!(code(client.resume_job(request).await), ErrorCode::WrongRole);
        let request = v1::ListReviewRequest::default();
        assert_eq!(
            code(client.list_review(request).await),
            ErrorCode::WrongRole
        );
        let request = v1::ReviewPairsRequest::default();
        assert_eq!(
            code(client.review_pairs(request).await),
            ErrorCode::WrongRole
        );
        let request = v1::ListArtefactsRequest::default();
        let answer = client.list_artefacts(request).await;
        assert_eq!(code(answer), ErrorCode::WrongRole);
        let request = v1::GetArtefactRequest::default();
        assert_eq!(
            code(client.get_artefact(request).await),
            ErrorCode::WrongRole
        );
        let request = v1::DeleteJobFilesRequest::default();
        let answer = client.delete_job_files(request).await;
        assert_eq!(code(answer), ErrorCode::WrongRole);
    }
    for role in [Role::Silo, Role::Operator] {
        let mut client = WorkerServiceClient::new(world.channel(role, "x"));
        let wrong = ErrorCode::WrongRole;
        let answer = client.claim_job(v1::ClaimJobRequest::default()).await;
        assert_eq!(code(answer), wrong);
        let request = v1::RenewJobLeaseRequest::default();
        assert_eq!(code(client.renew_job_lease(request).await), wrong);
        let request = v1::ReadJournalRequest::default();
        assert_eq!(code(client.read_journal(request).await), wrong);
        let request = v1::AppendJournalRequest::default();
        assert_eq!(code(client.append_journal(request).await), wrong);
        let request = v1::FindMissingObjectsRequest::default();
        assert_eq!(code(client.find_missing_objects(request).await), wrong);
        let request = futures::stream::iter([v1::PutObjectRequest::default()]);
        assert_eq!(code(client.put_object(request).await), wrong);
        let request = v1::GetObjectRequest::default();
        assert_eq!(code(client.get_object(request).await), wrong);
        let request = v1::RemoveObjectsRequest::default();
        assert_eq!(code(client.remove_objects(request).await), wrong);
        let request = v1::ReadReviewsRequest::default();
        assert_eq!(code(client.read_reviews(request).await), wrong);
        let request = v1::PutArtefactRequest::default();
        assert_eq!(code(client.put_artefact(request).await), wrong);
        let request = v1::ReleaseJobRequest::default();
        assert_eq!(code(client.release_job(request).await), wrong);
    }
}

#[tokio::test]
async fn health_and_reflection_are_for_every_member() {
    let world = World::start().await;
    for role in [Role::Silo, Role::Operator, Role::Worker] {
        let channel = world.channel(role, "x");
        for service in ["FederationService", "OperatorService", "WorkerService"] {
            let request = HealthCheckRequest {
                service: format!("concord.v1.{service}"),
            };
            let answer = HealthClient::new(channel.clone()).check(request).await;
            assert_eq!(answer.unwrap().into_inner().status, 1);
        }
        let mut reflection =
            tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient::new(
                channel,
            );
        let request = tonic_reflection::pb::v1::ServerReflectionRequest {
            host: String::new(),
            message_request: Some(
                tonic_reflection::pb::v1::server_reflection_request::MessageRequest::ListServices(
                    String::new(),
                ),
            ),
        };
        let answer = reflection
            .server_reflection_info(futures::stream::iter([request]))
            .await;
        let answer = answer
            .unwrap()
            .into_inner()
            .message()
            .await
            .unwrap()
            .unwrap();
        let text = format!("{answer:?}");
        for service in [
            "concord.v1.FederationService",
            "concord.v1.OperatorService",
            "concord.v1.WorkerService",
            "grpc.health.v1.Health",
        ] {
            assert!(text.contains(service), "{text}");
        }
    }
}

async fn get(address: std::net::SocketAddr, path: &str) -> String {
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn metrics_and_probes_are_served_on_a_listener_of_their_own() {
    let world = World::start_with(|config| {
        config.ops.enabled = true;
        config.ops.address = ([127, 0, 0, 1], 0).into();
    })
    .await;
    let address = world.server().ops_addr.unwrap();
    assert!(get(address, "/livez").await.starts_with("HTTP/1.1 200"));
    assert!(get(address, "/readyz").await.starts_with("HTTP/1.1 200"));
    let [mut a] = world.silos(["a"]).await;
    let job_id = world.submit(&spec(1, 1, "")).await;
    a.contribute(&job_id, 1, 1.0, 1).await;
    let metrics = eventually("the published round in the metrics", async || {
        let text = get(address, "/metrics").await;
        let none_yet = "concord_rounds_total{phase=\"published\"} 0";
        (!text.contains(none_yet) && text.contains("concord_round_seconds")).then_some(text)
    })
    .await;
    for name in [
        "concord_contributions_total{outcome=\"discarded\"}",
        "concord_tls_handshakes_refused_total{reason=\"unknown_ca\"}",
        "concord_datastore_transactions_total{name=\"record_contribution\",outcome=\"committed\"}",
        "concord_transfer_bytes_total{direction=\"up\"}",
        "concord_worker_leases_total{outcome=\"expired\"}",
        "concord_worker_journal_lines_total",
        "concord_process_resident_memory_bytes",
        "# HELP concord_round_seconds",
    ] {
        assert!(metrics.contains(name), "{name} is missing in\n{metrics}");
    }
    assert!(
        !metrics.contains("concord_tls_certificate_expiry_seconds 0"),
        "{metrics}"
    );
}
