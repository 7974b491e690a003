//! Who is not let in, what each side learns of it, and that there is no way around.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::Path,
    sync::Arc,
    time::Duration,
};

use concord_common::{
    Clock as _, Role, SpiffeId, SystemClock,
    config::TlsSection,
    pki::{CertificateAuthority, DAY},
    tls::explain_tls_error,
};
use concord_integration_tests::{
    harness::{Daemon, Federation, PATIENCE, ServerOptions, wait_for},
    silo::{Silo, operator},
};
use concord_proto::v1;
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, SignatureScheme, StreamOwned,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    pki_types::{CertificateDer, ServerName, UnixTime},
};

use super::{code, daemon::tasks, operator_of, runtime, silo, silo_with};
use crate::server::metric;

fn federation() -> Federation {
    let mut federation = Federation::new(&ServerOptions::default()).unwrap();
    federation.start_server().unwrap();
    federation
}

/// What a silo with these files is told when it calls.
fn refusal(federation: &Federation, files: &TlsSection) -> String {
    let mut silo = silo_with(federation, "silo-a", files);
    let status = runtime()
        .block_on(silo.raw().get_server_info(v1::GetServerInfoRequest {}))
        .unwrap_err();
    match explain_tls_error(&status) {
        Some(sentence) => sentence,
        None => panic!("the failure was none of TLS: {status:?}"),
    }
}

/// Waits until the server has counted handshakes that it refused for `reason`, and has logged one.
fn assert_counted(federation: &mut Federation, reason: &str) {
    let series = format!("concord_tls_handshakes_refused_total{{reason=\"{reason}\"}}");
    assert_noted(federation, &series, 1.0, &[reason, "refused"]);
}

/// Waits until a series has reached `count`, and until a line of the server's log has all of `words`.
fn assert_noted(federation: &mut Federation, series: &str, count: f64, words: &[&str]) {
    let address = federation.ops_address();
    wait_for(series, PATIENCE, || {
        Ok(metric(address, series).filter(|found| *found >= count))
    })
    .unwrap();
    let what = format!("a line with {words:?}");
    federation
        .server()
        .unwrap()
        .wait_for_log(&what, PATIENCE, |log| {
            log.lines()
                .any(|line| words.iter().all(|word| line.contains(word)))
                .then_some(())
        })
        .unwrap();
}

/// A certificate that the federation's CA signs with other dates than the command would.
fn issue_dated(federation: &Federation, name: &str, ended: Duration) -> TlsSection {
    let ca = CertificateAuthority::load(&federation.pki_folder()).unwrap();
    let id = SpiffeId::new(federation.name(), Role::Silo, name).unwrap();
    let not_before = SystemClock.now() - ended - DAY;
    let issued = ca.issue(&id, &[], &[], not_before, DAY).unwrap();
    let folder = federation.path().join("dated");
    let written = issued.write(&folder, false).unwrap();
    TlsSection {
        certificate: written.certificate,
        key: written.key,
        ca: federation.pki_folder().join("ca.crt"),
    }
}

/// Takes any server, so that a test can connect as no proper client would.
#[derive(Debug)]
struct TakeAnyServer;

impl ServerCertVerifier for TakeAnyServer {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![
            SignatureScheme::ECDSA_NISTP256_SHA256,
            SignatureScheme::ECDSA_NISTP384_SHA384,
            SignatureScheme::ED25519,
        ]
    }
}

/// What a client without any certificate gets from its first read.
fn connect_bare(address: SocketAddr) -> std::io::Error {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(TakeAnyServer))
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let name = ServerName::try_from("localhost").unwrap();
    let connection = ClientConnection::new(Arc::new(config), name).unwrap();
    let socket = TcpStream::connect(address).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut stream = StreamOwned::new(connection, socket);
    let written = stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
    let mut byte = [0];
    match written.and_then(|()| stream.read(&mut byte)) {
        Err(error) => error,
        Ok(count) => panic!("the server let a client without a certificate read {count} bytes"),
    }
}

#[test]
fn a_client_without_a_certificate_is_refused_counted_and_logged() {
    let mut federation = federation();
    let error = connect_bare(federation.grpc_address());
    assert!(error.to_string().contains("CertificateRequired"), "{error}");
    assert_counted(&mut federation, "no_certificate");
}

/// The first message of a client that speaks TLS 1.2 and nothing newer.
fn tls12_client_hello() -> Vec<u8> {
    let extensions: Vec<u8> = [
        &[0, 10, 0, 4, 0, 2, 0, 23][..],     // supported groups: P-256
        &[0, 13, 0, 4, 0, 2, 4, 3],          // signature algorithms: ECDSA with SHA-256
        &[0, 16, 0, 5, 0, 3, 2, b'h', b'2'], // application protocol: h2
    ]
    .concat();
    let mut body = vec![3, 3];
    body.extend([7; 32]); // random
    body.push(0); // no session
    body.extend([0, 2, 0xc0, 0x2b]); // ECDHE-ECDSA-AES128-GCM-SHA256
    body.extend([1, 0]); // no compression
    body.extend((extensions.len() as u16).to_be_bytes());
    body.extend(extensions);
    let mut hello = vec![22, 3, 1];
    hello.extend((body.len() as u16 + 4).to_be_bytes());
    hello.extend([1, 0]);
    hello.extend((body.len() as u16).to_be_bytes());
    hello.extend(body);
    hello
}

#[test]
fn tls_before_1_3_is_refused_with_an_alert() {
    let mut federation = federation();
    let mut socket = TcpStream::connect(federation.grpc_address()).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.write_all(&tls12_client_hello()).unwrap();
    let mut answer = [0; 7];
    socket.read_exact(&mut answer).unwrap();
    // Record type alert; level fatal; protocol_version (RFC 8446 section 6).
    assert_eq!((answer[0], answer[5], answer[6]), (21, 2, 70), "{answer:?}");
    assert_counted(&mut federation, "protocol");
}

#[test]
fn a_client_that_does_not_speak_tls_gets_no_word_of_http() {
    let mut federation = federation();
    let mut socket = TcpStream::connect(federation.grpc_address()).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
        .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        .unwrap();
    let mut answer = Vec::new();
    // The connection ends with a TLS alert, or is reset after it.
    let _ = socket.read_to_end(&mut answer);
    assert!(answer.is_empty() || answer[0] == 21, "{answer:?}");
    assert_counted(&mut federation, "protocol");
}

#[test]
fn a_certificate_of_another_ca_is_refused_with_a_reason_on_both_sides() {
    let mut federation = federation();
    let other = Federation::new(&ServerOptions::default()).unwrap();
    let mut files = other.issue(Role::Silo, "silo-a").unwrap();
    // It trusts the right server, but its own certificate comes from elsewhere.
    files.ca = federation.pki_folder().join("ca.crt");
    let sentence = refusal(&federation, &files);
    assert!(sentence.contains("does not know the CA"), "{sentence}");
    assert_counted(&mut federation, "unknown_ca");
}

#[test]
fn an_expired_certificate_is_refused_with_a_reason_on_both_sides() {
    let mut federation = federation();
    let files = issue_dated(&federation, "late", Duration::from_secs(2));
    let sentence = refusal(&federation, &files);
    assert!(sentence.contains("expired"), "{sentence}");
    assert_counted(&mut federation, "expired");
}

#[test]
fn a_daemon_whose_certificate_has_expired_says_so_and_runs_on_until_it_has_a_new_one() {
    let mut federation = federation();
    let address = federation.grpc_address().to_string();
    let [(name, task), ..] = tasks();
    let mut daemon = Daemon::new(&federation, name, &address, &task).unwrap();
    let good = federation.issue(Role::Silo, name).unwrap();
    let renewed = [&good.certificate, &good.key].map(|path| (path, fs::read(path).unwrap()));
    let late = issue_dated(&federation, name, Duration::from_secs(2));
    fs::copy(&late.certificate, &good.certificate).unwrap();
    fs::copy(&late.key, &good.key).unwrap();

    daemon.start(&[]).unwrap();
    let program = daemon.program().unwrap();
    let pid = program.pid();
    let sentence = "the server refused this certificate: it has expired";
    program
        .wait_for_log(sentence, PATIENCE, |log| {
            log.lines()
                .any(|line| line.contains(sentence) && line.contains("will go on after a pause"))
                .then_some(())
        })
        .unwrap();
    assert_counted(&mut federation, "expired");

    for (path, bytes) in renewed {
        fs::write(path, bytes).unwrap();
    }
    let program = daemon.program().unwrap();
    program.signal("HUP").unwrap();
    program
        .wait_for_log("connection", PATIENCE, |log| {
            log.contains("\"message\":\"connected\"").then_some(())
        })
        .unwrap();
    assert!(program.is_running() && program.pid() == pid);
}

#[test]
fn a_server_of_another_ca_is_refused_by_the_silo() {
    let mut federation = federation();
    let other = Federation::new(&ServerOptions::default()).unwrap();
    let files = other.issue(Role::Silo, "silo-a").unwrap();
    let sentence = refusal(&federation, &files);
    assert!(sentence.contains("not signed by the CA"), "{sentence}");
    assert_counted(&mut federation, "refused_by_client");
}

#[test]
fn a_servers_certificate_cannot_be_used_by_a_client() {
    let federation = federation();
    let files = federation.issue(Role::Server, "second").unwrap();
    let id = "silo-a".parse().unwrap();
    assert!(Silo::new(id, &files, federation.name(), &federation.url()).is_err());
}

#[test]
fn silos_and_operators_cannot_use_each_others_service() {
    let mut federation = federation();
    let silo_files = federation.issue(Role::Silo, "silo-a").unwrap();
    let operator_files = federation.issue(Role::Operator, "anna").unwrap();
    runtime().block_on(async {
        let mut as_operator = operator(&silo_files, federation.name(), &federation.url()).unwrap();
        let status = as_operator
            .list_jobs(v1::ListJobsRequest { limit: 0 })
            .await
            .unwrap_err();
        assert_eq!(code(&status), "WRONG_ROLE");
        assert!(status.message().contains("silo-a"), "{status}");

        let mut as_silo = silo_with(&federation, "anna", &operator_files);
        let status = as_silo
            .raw()
            .get_server_info(v1::GetServerInfoRequest {})
            .await
            .unwrap_err();
        assert_eq!(code(&status), "WRONG_ROLE");
    });
    let series = "concord_refusals_total{code=\"WRONG_ROLE\"}";
    for caller in ["/silo/silo-a", "/operator/anna"] {
        let words = ["a caller was refused", "WRONG_ROLE", caller];
        assert_noted(&mut federation, series, 2.0, &words);
    }
}

#[test]
fn a_silo_is_who_its_certificate_says_whatever_its_messages_say() {
    let federation = federation();
    let mut honest = silo(&federation, "silo-a");
    let mut operator = operator_of(&federation);
    runtime().block_on(async {
        let job_id = super::submit(&mut operator, super::job_toml(&["silo-a"], 1)).await;
        let mut watch = honest.watch().await.unwrap();
        honest.next_notice(&mut watch, &job_id, 0).await.unwrap();
        let report = v1::MetricReport {
            silo_id: "silo-b".to_owned(),
            job_id: job_id.clone(),
            round: 1,
            point: v1::MetricPoint::Training as i32,
            metrics: vec![v1::Metric {
                name: "loss".to_owned(),
                value: 0.5,
            }],
        };
        let request = v1::ReportMetricsRequest {
            report: Some(report),
        };
        honest.raw().report_metrics(request).await.unwrap();
        let job = operator
            .get_job(v1::GetJobRequest { job_id })
            .await
            .unwrap()
            .into_inner();
        assert_eq!(job.metrics[0].silo_id, "silo-a");
    });
}

#[test]
fn keys_are_private_and_a_readable_one_is_not_used() {
    use std::os::unix::fs::PermissionsExt as _;
    let federation = federation();
    let files = federation.issue(Role::Silo, "silo-a").unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&files.key), 0o600);
    assert_eq!(mode(&federation.pki_folder().join("ca.key")), 0o600);
    std::fs::set_permissions(&files.key, std::fs::Permissions::from_mode(0o644)).unwrap();
    let id = "silo-a".parse().unwrap();
    let error = Silo::new(id, &files, federation.name(), &federation.url()).unwrap_err();
    assert!(error.to_string().contains("chmod 600"), "{error}");
}
