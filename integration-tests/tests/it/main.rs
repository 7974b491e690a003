//! Concord's programs as their users run them. One test binary: `cargo test -p concord-integration-tests`, after
//! `cargo build --workspace --bins`.

#![expect(
    clippy::unwrap_used,
    reason = "all of this crate is tests and their helpers"
)]

mod artaug;
mod artaug_cli;
mod canary;
mod cli;
mod daemon;
mod demo_files;
mod docs;
mod load;
mod notify;
mod operator;
mod rounds;
mod server;
mod tls;
mod tour;

use std::sync::LazyLock;

use concord_common::{Role, SiloId, code::Refusal, config::TlsSection};
use concord_integration_tests::{
    harness::Federation,
    silo::{Silo, operator},
};
use concord_proto::v1::{self, operator_service_client::OperatorServiceClient};
use tokio::runtime::Runtime;
use tonic::{Status, transport::Channel};

/// The runtime that all tests of this process share.
fn runtime() -> &'static Runtime {
    static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap()
    });
    &RUNTIME
}

/// A silo with these files.
fn silo_with(federation: &Federation, name: &str, files: &TlsSection) -> Silo {
    let _inside = runtime().enter();
    let id: SiloId = name.parse().unwrap();
    Silo::new(id, files, federation.name(), &federation.url()).unwrap()
}

/// A silo with a certificate made for it.
fn silo(federation: &Federation, name: &str) -> Silo {
    let files = federation.issue(Role::Silo, name).unwrap();
    silo_with(federation, name, &files)
}

/// An operator with a certificate made for it.
fn operator_of(federation: &Federation) -> OperatorServiceClient<Channel> {
    let files = federation.issue(Role::Operator, "test-operator").unwrap();
    let _inside = runtime().enter();
    operator(&files, federation.name(), &federation.url()).unwrap()
}

/// A job for `silos` with an adapter of 4 x 2 and 4 x 2 weights in each of two layers.
fn job_toml(silos: &[&str], rounds: u32) -> String {
    let names: Vec<String> = silos.iter().map(|name| format!("\"{name}\"")).collect();
    format!(
        r#"kind = "federated-training"
name = "test"
task = "none"
silos = [{names}]
seed = 7
backbone = {{ name = "none", hidden = 4, layers = 2 }}
adapter = {{ bottleneck = 2 }}
algorithm = {{ name = "fedavg" }}
rounds = {{ count = {rounds}, min_silos = {count}, max_time = "5m" }}
"#,
        names = names.join(", "),
        count = silos.len(),
    )
}

/// Submits a job and gives its id.
async fn submit(operator: &mut OperatorServiceClient<Channel>, spec_toml: String) -> String {
    let request = v1::SubmitJobRequest {
        request_id: "request".to_owned(),
        spec_toml,
    };
    let response = operator.submit_job(request).await.unwrap().into_inner();
    response.job.unwrap().job_id
}

/// The code that a refused call carries.
fn code(status: &Status) -> &'static str {
    match Refusal::from_status(status) {
        Some(refusal) => refusal.code.as_str(),
        None => panic!("the status is no refusal of Concord's: {status:?}"),
    }
}
