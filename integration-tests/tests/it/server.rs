//! The server as a service: starting, refusing to start, stopping, probes, and what it needs of the machine.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
};

use concord_integration_tests::{
    harness::{Federation, PATIENCE, Program, ServerOptions, run},
    procfs,
};
use concord_proto::v1;
use tokio_stream::StreamExt as _;

use super::{code, job_toml, operator_of, runtime, silo, submit};

/// Status and body of a plain HTTP answer.
pub(crate) fn http_get(address: SocketAddr, path: &str) -> (u16, String) {
    let mut socket = TcpStream::connect(address).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(
        socket,
        "GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n"
    )
    .unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).unwrap();
    let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    (status, body.to_owned())
}

/// The value of one series, named as Prometheus writes it.
pub(crate) fn metric(address: SocketAddr, series: &str) -> Option<f64> {
    let (status, body) = http_get(address, "/metrics");
    assert_eq!(status, 200);
    body.lines()
        .find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
}

fn started() -> Federation {
    let mut federation = Federation::new(&ServerOptions::default()).unwrap();
    federation.start_server().unwrap();
    federation
}

/// How a server that should not start ends: its exit code and what it wrote.
fn refused_to_start(
    federation: &Federation,
    environment: &[(&str, &str)],
) -> (Option<i32>, String) {
    let mut program = Program::start(
        "concord-server",
        "refused",
        federation.path(),
        &["run", "--config", "server.toml"],
        environment,
    )
    .unwrap();
    let status = program.wait(PATIENCE).unwrap();
    (status.code(), program.log())
}

#[test]
fn the_server_needs_no_libtorch_and_little_memory() {
    let mut federation = started();
    let pid = federation.server().unwrap().pid();
    let maps = procfs::mapped_files(pid).unwrap();
    assert!(maps.contains("concord-server"));
    assert!(!maps.contains("torch"), "{maps}");
    let peak = procfs::peak_rss_bytes(pid).unwrap();
    assert!(peak < 60 << 20, "{peak} bytes");
}

#[test]
fn probes_and_metrics_answer_on_their_own_listener() {
    let federation = started();
    let address = federation.ops_address();
    assert_eq!(http_get(address, "/livez").0, 200);
    assert_eq!(http_get(address, "/readyz").0, 200);
    assert_eq!(http_get(address, "/nothing").0, 404);
    assert!(metric(address, "concord_process_resident_memory_bytes").unwrap() > 1e6);
    // Zero before the first event, so that a dashboard has something to draw.
    assert_eq!(
        metric(address, "concord_contributions_total{outcome=\"accepted\"}"),
        Some(0.0)
    );
}

#[test]
fn sigterm_ends_streams_with_a_reason_and_the_program_with_success() {
    let mut federation = started();
    let mut silo = silo(&federation, "silo-a");
    let runtime = runtime();
    let mut watch = runtime.block_on(async {
        let mut watch = silo.watch().await.unwrap();
        watch.next().await.unwrap().unwrap();
        watch
    });
    federation.stop_server().unwrap();
    let status = runtime
        .block_on(async { watch.next().await.unwrap() })
        .unwrap_err();
    assert_eq!(code(&status), "SHUTTING_DOWN");
}

#[test]
fn a_port_in_use_is_named_in_the_error() {
    let federation = Federation::new(&ServerOptions::default()).unwrap();
    let holder = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = holder.local_addr().unwrap().to_string();
    let (code, log) = refused_to_start(&federation, &[("CONCORD__LISTEN__ADDRESS", &address)]);
    assert!(matches!(code, Some(1..)), "{code:?}");
    assert!(log.contains(&address) && log.contains("in use"), "{log}");
}

#[test]
fn two_servers_cannot_share_a_state_folder() {
    let mut federation = started();
    let (code, log) = refused_to_start(&federation, &[]);
    assert!(matches!(code, Some(1..)), "{code:?}");
    assert!(log.contains("another"), "{log}");
    assert!(federation.server().unwrap().is_running());
}

#[test]
fn a_bad_configuration_is_refused_with_the_key_and_exit_code_78() {
    let federation = Federation::new(&ServerOptions::default()).unwrap();
    for (variable, value, named) in [
        ("CONCORD__LISTEN__ADRESS", "127.0.0.1:1", "adress"),
        ("CONCORD__LISTEN__ADDRESS", "nowhere", "listen.address"),
        ("CONCORD__DURABILITY", "forever", "forever"),
        ("CONCORD__LIMITS__MAX_STREAMS", "0", "limits.max_streams"),
        ("CONCORD__LOG__FILTER", "not=a=filter", "log.filter"),
        ("CONCORD__TLS__KEY", "missing.key", "missing.key"),
    ] {
        let (code, log) = refused_to_start(&federation, &[(variable, value)]);
        assert_eq!(code, Some(78), "{variable}: {log}");
        assert!(log.contains(named), "{variable}: {log}");
    }
}

#[test]
fn check_config_says_the_same_without_starting() {
    let federation = Federation::new(&ServerOptions::default()).unwrap();
    let check = ["check-config", "--config", "server.toml"];
    let output = run("concord-server", federation.path(), &check).unwrap();
    assert_eq!(output.code(), 0, "{output:?}");
    let path = federation.path().join("server.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, format!("wibble = 1\n{text}")).unwrap();
    let output = run("concord-server", federation.path(), &check).unwrap();
    assert_eq!(output.code(), 78, "{output:?}");
    assert!(output.stderr.contains("wibble"), "{output:?}");
}

#[test]
fn jobs_survive_a_restart() {
    let mut federation = started();
    let mut operator = operator_of(&federation);
    let runtime = runtime();
    let job_id = runtime.block_on(submit(&mut operator, job_toml(&["silo-a"], 1)));
    federation.stop_server().unwrap();
    federation.start_server().unwrap();
    let mut operator = operator_of(&federation);
    let jobs = runtime
        .block_on(operator.list_jobs(v1::ListJobsRequest { limit: 0 }))
        .unwrap()
        .into_inner()
        .jobs;
    assert_eq!(jobs.len(), 1);
    assert_eq!(jobs[0].job_id, job_id);
    // And the same request finds the same job.
    let again = runtime.block_on(submit(&mut operator, job_toml(&["silo-a"], 1)));
    assert_eq!(again, job_id);
}
