//! Real daemons that train a tiny model: whole jobs over TLS, through kills and restarts on either side.

mod refusals;
mod results;

use std::fs;

use concord_integration_tests::harness::{
    Daemon, Federation, PATIENCE, ServerOptions, Task, run, wait_for,
};
use concord_proto::v1;
use serde_json::Value;

use super::{operator_of, runtime, submit};

/// Three silos whose tasks have unlike labels; one has rows of two texts.
pub(crate) fn tasks() -> [(&'static str, Task); 3] {
    let task = |words: &[&'static str], labels: &[&'static str], pair| Task {
        words: words.to_vec(),
        labels: labels.to_vec(),
        mark: "rai",
        pair,
        rows: 40,
    };
    [
        (
            "silo-a",
            task(&["apples", "the"], &["fruit", "other"], false),
        ),
        (
            "silo-b",
            task(&["rai", "of", "cl"], &["one", "two", "three"], false),
        ),
        ("silo-c", task(&["ol", "to"], &["yes", "no"], true)),
    ]
}

/// A FedMCP job for the three.
pub(crate) fn job(rounds: u32) -> String {
    format!(
        r#"kind = "federated-training"
name = "daemons"
task = "test"
silos = ["silo-a", "silo-b", "silo-c"]
seed = 5
backbone = {{ name = "tiny", hidden = 24, layers = 2 }}
adapter = {{ bottleneck = 4, private_start = "near-global" }}
algorithm = {{ name = "fedmcp", mu = 1.0 }}
training = {{ batch_size = 8, learning_rate = 0.01, max_length = 16, epochs = 2 }}
rounds = {{ count = {rounds}, min_silos = 3, weighting = "uniform", max_time = "5m" }}
"#
    )
}

/// A federation whose server has been started once, so that its address is known.
pub(crate) fn federation() -> Federation {
    let mut federation = Federation::new(&ServerOptions::default()).unwrap();
    federation.start_server().unwrap();
    federation
}

fn daemons(federation: &Federation) -> Vec<Daemon> {
    let address = federation.grpc_address().to_string();
    tasks()
        .iter()
        .map(|(name, task)| Daemon::new(federation, name, &address, task).unwrap())
        .collect()
}

/// The job as the operator sees it.
fn show(federation: &Federation, job_id: &str) -> v1::GetJobResponse {
    let request = v1::GetJobRequest {
        job_id: job_id.to_owned(),
    };
    runtime()
        .block_on(operator_of(federation).get_job(request))
        .unwrap()
        .into_inner()
}

/// Waits until the job has ended well and every silo has reported its last test.
pub(crate) fn wait_for_success(federation: &Federation, job_id: &str) -> v1::GetJobResponse {
    wait_for("finished job", PATIENCE * 3, || {
        let shown = show(federation, job_id);
        let job = shown.job.as_ref().unwrap();
        assert!(
            !matches!(job.state(), v1::JobState::Failed | v1::JobState::Cancelled),
            "{job:?}"
        );
        let tested = shown
            .metrics
            .iter()
            .filter(|report| report.point() == v1::MetricPoint::LastTest)
            .count();
        Ok((job.state() == v1::JobState::Succeeded && tested == 3).then_some(shown))
    })
    .unwrap()
}

/// Waits until the daemon has tried in vain to reach its server.
fn wait_for_a_failed_attempt(daemon: &mut Daemon) {
    let program = daemon.program().unwrap();
    program
        .wait_for_log("a failed attempt", PATIENCE, |log| {
            log.contains("will go on after a pause").then_some(())
        })
        .unwrap();
}

/// Waits until round `number` has an accepted contribution, or a later one has begun.
fn wait_for_round(federation: &Federation, job_id: &str, number: u32) {
    wait_for("a contribution in the round", PATIENCE, || {
        let shown = show(federation, job_id);
        let accepted = shown.silos.iter().map(|silo| silo.accepted).max();
        Ok((accepted >= Some(number)).then_some(()))
    })
    .unwrap();
}

/// The versions that the job's rounds published, as hexadecimal text.
fn published(federation: &Federation, job_id: &str) -> Vec<String> {
    let request = v1::ListRoundsRequest {
        job_id: job_id.to_owned(),
    };
    let rounds = runtime()
        .block_on(operator_of(federation).list_rounds(request))
        .unwrap()
        .into_inner()
        .rounds;
    rounds
        .iter()
        .map(|round| {
            let version: &[u8] = &round.published_version;
            concord_common::Digest::try_from(version)
                .unwrap()
                .to_string()
        })
        .collect()
}

/// What `concord-client simulate` says about the same job over the same silos.
fn simulated(federation: &Federation, daemons: &[Daemon], rounds: u32) -> Value {
    let spec = federation.path().join("job.toml");
    fs::write(&spec, job(rounds)).unwrap();
    let mut arguments = vec![
        "simulate".to_owned(),
        "--json".to_owned(),
        format!("--job={}", spec.display()),
    ];
    for daemon in daemons {
        arguments.push(format!(
            "--silo={}={}",
            daemon.name(),
            daemon.config().display()
        ));
    }
    let output = run("concord-client", federation.path(), &arguments).unwrap();
    serde_json::from_str(&output.success().unwrap()).unwrap()
}

/// The published versions of a simulation; its first is the one that the server draws.
fn simulated_versions(report: &Value) -> Vec<String> {
    let versions = report["versions"].as_array().unwrap();
    versions[1..]
        .iter()
        .map(|version| version.as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn a_job_over_tls_gives_the_adapter_bytes_and_metrics_of_simulate() {
    let federation = federation();
    let mut daemons = daemons(&federation);
    for daemon in &mut daemons {
        daemon.start(&[]).unwrap();
    }
    let job_id = runtime().block_on(submit(&mut operator_of(&federation), job(3)));
    let shown = wait_for_success(&federation, &job_id);
    let report = simulated(&federation, &daemons, 3);
    assert_eq!(published(&federation, &job_id), simulated_versions(&report));

    let entries = report["metrics"].as_array().unwrap();
    let mut compared = 0;
    for real in &shown.metrics {
        let point = real
            .point()
            .as_str_name()
            .trim_start_matches("METRIC_POINT_");
        let entry = entries.iter().find(|entry| {
            entry["silo_id"] == real.silo_id.as_str()
                && entry["round"] == real.round
                && entry["point"] == point.to_lowercase()
        });
        let entry = entry.unwrap_or_else(|| panic!("simulate has no report like {real:?}"));
        for metric in &real.metrics {
            if metric.name != "seconds" {
                let simulated = entry["metrics"][&metric.name].as_f64().unwrap();
                // Reading a number from JSON may round its last bit.
                let bound = 1e-14 * metric.value.abs();
                assert!(
                    (simulated - metric.value).abs() <= bound,
                    "{real:?} {entry}"
                );
                compared += 1;
            }
        }
    }
    assert!(compared > 50, "{compared}");
}

#[test]
fn daemons_outlive_a_server_that_is_not_up_yet_and_one_that_is_killed() {
    let mut federation = federation();
    let mut daemons = daemons(&federation);
    federation.stop_server().unwrap();
    let pids: Vec<u32> = daemons
        .iter_mut()
        .map(|daemon| {
            daemon.start(&[]).unwrap();
            daemon.program().unwrap().pid()
        })
        .collect();
    wait_for_a_failed_attempt(&mut daemons[0]);
    federation.start_server().unwrap();
    let job_id = runtime().block_on(submit(&mut operator_of(&federation), job(4)));
    for round in 1..=2 {
        wait_for_round(&federation, &job_id, round);
        federation.kill_server().unwrap();
        federation.start_server().unwrap();
    }
    wait_for_success(&federation, &job_id);
    for (daemon, pid) in daemons.iter_mut().zip(pids) {
        let program = daemon.program().unwrap();
        assert!(program.is_running(), "{}", program.log());
        assert_eq!(program.pid(), pid);
    }
    let report = simulated(&federation, &daemons, 4);
    assert_eq!(published(&federation, &job_id), simulated_versions(&report));
}

#[test]
fn a_daemon_that_is_killed_goes_on_where_it_was() {
    let federation = federation();
    let mut daemons = daemons(&federation);
    for daemon in &mut daemons {
        daemon.start(&[]).unwrap();
    }
    let job_id = runtime().block_on(submit(&mut operator_of(&federation), job(4)));
    for round in 1..=3 {
        wait_for_round(&federation, &job_id, round);
        let victim = &mut daemons[round as usize % 3];
        victim.kill().unwrap();
        victim.start(&[]).unwrap();
    }
    let shown = wait_for_success(&federation, &job_id);
    assert!(
        shown.silos.iter().all(|silo| silo.accepted == 4),
        "{:?}",
        shown.silos
    );
    let report = simulated(&federation, &daemons, 4);
    assert_eq!(published(&federation, &job_id), simulated_versions(&report));
}
