//! The operator's program as people and scripts meet it: what it says and which exit code it ends with.

use std::{fs, time::Duration};

use concord_common::{
    Clock as _, Role, SpiffeId, SystemClock,
    config::TlsSection,
    pki::{CertificateAuthority, DAY},
};
use concord_integration_tests::{
    harness::{Federation, Output, PATIENCE, Program, ServerOptions, run},
    silo::{Notice, Silo},
};
use concord_proto::v1;
use serde_json::Value;

use super::{code, job_toml, operator_of, runtime, silo, submit};

fn started(extra: &str) -> Federation {
    let mut federation = Federation::new(&ServerOptions {
        extra: extra.to_owned(),
        ..ServerOptions::default()
    })
    .unwrap();
    federation.start_server().unwrap();
    federation
}

/// The options that name server and certificates.
fn connection(address: &str, files: &TlsSection) -> Vec<String> {
    [
        ("--server", address),
        ("--certificate", files.certificate.to_str().unwrap()),
        ("--key", files.key.to_str().unwrap()),
        ("--ca", files.ca.to_str().unwrap()),
    ]
    .into_iter()
    .flat_map(|(name, value)| [name.to_owned(), value.to_owned()])
    .collect()
}

fn concord_at(federation: &Federation, address: &str, command: &[&str]) -> Output {
    let files = federation.issue(Role::Operator, "test-operator").unwrap();
    let mut arguments: Vec<String> = command.iter().map(|word| (*word).to_owned()).collect();
    arguments.extend(connection(address, &files));
    run("concord", federation.path(), &arguments).unwrap()
}

fn concord(federation: &Federation, command: &[&str]) -> Output {
    concord_at(federation, &federation.grpc_address().to_string(), command)
}

/// Begins to watch a job and waits until the first state has come.
fn watching(federation: &Federation, job_id: &str, log: &str) -> Program {
    let files = federation.issue(Role::Operator, "test-operator").unwrap();
    let mut arguments: Vec<String> = ["--json", "job", "watch", job_id]
        .map(str::to_owned)
        .to_vec();
    arguments.extend(connection(&federation.grpc_address().to_string(), &files));
    let mut program = Program::start("concord", log, federation.path(), &arguments, &[]).unwrap();
    program
        .wait_for_log("the job's first state", PATIENCE, |log| {
            log.contains("\"state\":").then_some(())
        })
        .unwrap();
    program
}

/// Waits until a round of the job asks this silo.
async fn asked(silo: &mut Silo, job_id: &str) {
    let mut watch = silo.watch().await.unwrap();
    let notice = silo.next_notice(&mut watch, job_id, 0).await.unwrap();
    assert!(matches!(notice, Notice::Work { .. }), "{notice:?}");
}

#[test]
fn watching_a_job_ends_with_the_code_that_says_how_the_job_ended() {
    let federation = started("");
    let mut silo = silo(&federation, "silo-a");
    let mut operator = operator_of(&federation);
    let job_id = runtime().block_on(async {
        let job_id = submit(&mut operator, job_toml(&["silo-a"], 1)).await;
        asked(&mut silo, &job_id).await;
        job_id
    });
    let mut watch = watching(&federation, &job_id, "failed");
    let decline = v1::DeclineJobRequest {
        job_id: job_id.clone(),
        reason: "UNKNOWN_TASK".to_owned(),
        message: "there is no such task".to_owned(),
    };
    runtime().block_on(silo.raw().decline_job(decline)).unwrap();
    assert_eq!(watch.wait(PATIENCE).unwrap().code(), Some(1));
    let again = concord(&federation, &["job", "watch", &job_id]);
    assert_eq!(again.code(), 1, "{again:?}");
    assert!(again.stdout.contains("has failed: "), "{again:?}");

    fs::write(federation.path().join("job.toml"), job_toml(&["silo-b"], 1)).unwrap();
    let text = concord(&federation, &["job", "submit", "job.toml", "--json"])
        .success()
        .unwrap();
    let submitted: Value = serde_json::from_str(&text).unwrap();
    let job_id = submitted["job"]["job_id"].as_str().unwrap();
    let mut watch = watching(&federation, job_id, "cancelled");
    concord(&federation, &["job", "cancel", job_id])
        .success()
        .unwrap();
    assert_eq!(watch.wait(PATIENCE).unwrap().code(), Some(5));
}

#[test]
fn an_interrupted_watch_says_so_and_leaves_the_job_alone() {
    let federation = started("");
    let mut operator = operator_of(&federation);
    let job_id = runtime().block_on(submit(&mut operator, job_toml(&["silo-a"], 1)));
    let mut watch = watching(&federation, &job_id, "interrupted");
    watch.signal("INT").unwrap();
    assert_eq!(watch.wait(PATIENCE).unwrap().code(), Some(130));
    let log = watch.log();
    let said: Vec<&str> = log.lines().filter(|line| !line.starts_with('{')).collect();
    assert_eq!(
        said,
        ["error: interrupted; what the server was asked to do goes on"]
    );
    let text = concord(&federation, &["job", "show", &job_id, "--json"])
        .success()
        .unwrap();
    let shown: Value = serde_json::from_str(&text).unwrap();
    assert!(shown["job"]["ended_at"].is_null(), "{text}");
}

#[test]
fn a_server_that_is_not_there_is_one_clear_sentence_and_exit_code_3() {
    let mut federation = started("");
    let address = federation.grpc_address().to_string();
    let probes = federation.ops_address().to_string();
    let others = [
        ("no-such-host.invalid:7600", "no-such-host.invalid"),
        (probes.as_str(), "does not speak TLS"),
    ];
    for (address, part) in others {
        let answer = concord_at(&federation, address, &["silo", "list"]);
        assert_one_sentence(&answer, 3, part);
    }
    for nonsense in ["not a host", "ftp://hub:21"] {
        let answer = concord_at(&federation, nonsense, &["silo", "list"]);
        assert_one_sentence(&answer, 2, nonsense);
    }
    federation.stop_server().unwrap();
    // Also for a watch: only a server that was there is waited for.
    for command in [
        &["silo", "list"][..],
        &["job", "watch", "some-job"],
        &["job", "cancel", "some-job"],
    ] {
        let answer = concord(&federation, command);
        assert_one_sentence(&answer, 3, &address);
    }
}

/// Nothing on standard output and one line on standard error.
fn assert_one_sentence(answer: &Output, code: i32, part: &str) {
    assert_eq!(answer.code(), code, "{answer:?}");
    assert_eq!(answer.stdout, "", "{answer:?}");
    let lines: Vec<&str> = answer.stderr.lines().collect();
    let [line] = lines[..] else {
        panic!("more or less than a sentence: {answer:?}");
    };
    assert!(line.starts_with("error: ") && line.contains(part), "{line}");
}

#[test]
fn an_expired_certificate_is_named_as_the_reason() {
    let federation = started("");
    let ca = CertificateAuthority::load(&federation.pki_folder()).unwrap();
    let id = SpiffeId::new(federation.name(), Role::Operator, "late").unwrap();
    let begin = SystemClock.now() - DAY - DAY;
    let issued = ca.issue(&id, &[], &[], begin, DAY).unwrap();
    let written = issued
        .write(&federation.path().join("dated"), false)
        .unwrap();
    let files = TlsSection {
        certificate: written.certificate,
        key: written.key,
        ca: federation.pki_folder().join("ca.crt"),
    };
    let mut arguments = vec!["silo".to_owned(), "list".to_owned()];
    arguments.extend(connection(&federation.grpc_address().to_string(), &files));
    let answer = run("concord", federation.path(), &arguments).unwrap();
    assert_one_sentence(&answer, 3, "expired");
}

#[test]
fn silos_are_approved_suspended_and_revoked_by_the_real_program() {
    let federation = started("enrollment = \"manual\"");
    let mut silo = silo(&federation, "silo-a");
    let mut call = || {
        let call = silo.raw().get_server_info(v1::GetServerInfoRequest {});
        runtime().block_on(call).err().map(|status| code(&status))
    };
    assert_eq!(call(), Some("NOT_ENROLLED"));
    let table = concord(&federation, &["silo", "list"]).success().unwrap();
    assert!(table.contains("pending"), "{table}");
    let table = concord(&federation, &["silo", "approve", "silo-a"])
        .success()
        .unwrap();
    assert!(
        table.contains("active") && table.contains("pending"),
        "{table}"
    );
    assert_eq!(call(), None);
    for (word, before, after) in [
        ("suspend", "active", "suspended"),
        ("revoke", "suspended", "revoked"),
    ] {
        let text = concord(&federation, &["silo", word, "silo-a", "--json"])
            .success()
            .unwrap();
        let answer: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(answer["before"], before);
        assert_eq!(answer["silo"]["enrollment"], after);
        assert_eq!(call(), Some("NOT_ENROLLED"));
    }
    let refused = concord(&federation, &["silo", "approve", "silo-a"]);
    assert_one_sentence(&refused, 1, "WRONG_ENROLLMENT");
    let unknown = concord(&federation, &["silo", "suspend", "silo-z"]);
    assert_one_sentence(&unknown, 4, "UNKNOWN_SILO");
}

#[test]
fn a_watch_goes_on_when_its_server_comes_back() {
    let mut federation = started("");
    let mut operator = operator_of(&federation);
    let job_id = runtime().block_on(submit(&mut operator, job_toml(&["silo-a"], 1)));
    let mut watch = watching(&federation, &job_id, "patient");
    federation.stop_server().unwrap();
    watch
        .wait_for_log("word of the server's absence", PATIENCE, |log| {
            log.contains("waiting for it").then_some(())
        })
        .unwrap();
    federation.start_server().unwrap();
    concord(&federation, &["job", "cancel", &job_id])
        .success()
        .unwrap();
    let status = watch.wait(PATIENCE + Duration::from_secs(5)).unwrap();
    assert_eq!(status.code(), Some(5), "{}", watch.log());
}
