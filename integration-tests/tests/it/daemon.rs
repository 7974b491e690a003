//! Real daemons that train a tiny model: whole jobs over TLS, through kills and restarts on either side.

use std::{
    fs,
    path::{Path, PathBuf},
};

use concord_common::{
    Role, RoundNumber, Timestamp,
    round::Outcome,
    wire::{Receipt, SignedReceipt},
};
use concord_integration_tests::harness::{
    Daemon, Federation, Output, PATIENCE, ServerOptions, Task, run, run_with_input, wait_for,
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
    daemons[0]
        .program()
        .unwrap()
        .wait_for_log("a failed attempt", PATIENCE, |log| {
            log.contains("will go on after a pause").then_some(())
        })
        .unwrap();
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

#[test]
fn what_a_job_leaves_can_be_used_and_the_daemon_ends_in_good_order() {
    let mut federation = federation();
    let mut daemons = daemons(&federation);
    for daemon in &mut daemons {
        daemon.start(&[]).unwrap();
    }
    let job_id = runtime().block_on(submit(&mut operator_of(&federation), job(2)));
    wait_for_success(&federation, &job_id);

    let folder = daemons[0].folder().to_owned();
    let config = daemons[0].config().display().to_string();
    let client = |arguments: &[&str]| {
        let all: Vec<&str> = [&arguments[..1], &["--config", &config], &arguments[1..]].concat();
        run("concord-client", &folder, &all).unwrap()
    };
    let status: Value =
        serde_json::from_str(&client(&["status", "--json"]).success().unwrap()).unwrap();
    assert_eq!(status["running"], true);
    assert_eq!(status["status"]["last_receipt"]["outcome"], "accepted");
    let receipts = fs::read_to_string(folder.join("state/receipts.jsonl")).unwrap();
    let receipts: Vec<Value> = receipts
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(receipts.len(), 2, "{receipts:?}");
    for (receipt, round) in receipts.iter().zip(1..) {
        assert!(is_signed(receipt), "{receipt}");
        assert_eq!(receipt["round"], round);
        assert_eq!(receipt["outcome"], "accepted");
    }
    assert!(
        client(&["check-config"])
            .success()
            .unwrap()
            .contains("acceptable")
    );

    // The rows' class follows from one word, and 40 rows are enough to see that.
    let evaluated = client(&["evaluate", "--file", "test.csv"])
        .success()
        .unwrap();
    assert!(evaluated.contains("accuracy"), "{evaluated}");
    let predicted = run_with_input(
        "concord-client",
        &folder,
        &["predict", "--config", &config],
        b"of apples to rai\nof the to rai\n",
    )
    .unwrap()
    .success()
    .unwrap();
    let lines = json_lines(&predicted);
    assert_eq!(lines.len(), 2);
    for line in &lines {
        assert!((probabilities(line).iter().sum::<f64>() - 1.0).abs() < 1e-5);
        assert_eq!(line.get("logits"), None, "{line}");
    }
    files_are_predicted_with_logits(&folder, &client);
    an_unseen_label_ends_an_evaluation(&folder, &client);
    the_model_is_exported_in_both_formats(&folder, &client);

    for daemon in &mut daemons {
        let status = daemon.program().unwrap().terminate(PATIENCE).unwrap();
        assert!(
            status.success(),
            "{status}: {}",
            daemon.program().unwrap().log()
        );
    }
    assert_eq!(client(&["status"]).code(), 3);

    // A new life shows the last receipt at once, without a server.
    federation.stop_server().unwrap();
    daemons[0].start(&[]).unwrap();
    daemons[0]
        .program()
        .unwrap()
        .wait_for_log("a failed attempt", PATIENCE, |log| {
            log.contains("will go on after a pause").then_some(())
        })
        .unwrap();
    let status: Value =
        serde_json::from_str(&client(&["status", "--json"]).success().unwrap()).unwrap();
    assert_eq!(status["status"]["last_receipt"]["round"], 2);
}

/// Runs a command of `concord-client` with a silo's configuration.
type Client<'a> = &'a dyn Fn(&[&str]) -> Output;

fn json_lines(text: &str) -> Vec<Value> {
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// A prediction's probabilities, in the order of the classes' names.
fn probabilities(line: &Value) -> Vec<f64> {
    let by_class = line["probabilities"].as_object().unwrap();
    by_class.values().map(|p| p.as_f64().unwrap()).collect()
}

fn files_are_predicted_with_logits(folder: &Path, client: Client<'_>) {
    let csv = "note,text\n1,\"of apples, to rai\"\n2,of the to rai\n";
    let jsonl = "{\"text\":\"of apples, to rai\"}\n{\"text\":\"of the to rai\"}\n";
    let [from_csv, from_jsonl] = [("csv", csv), ("jsonl", jsonl)].map(|(format, text)| {
        let file = format!("new.{format}");
        fs::write(folder.join(&file), text).unwrap();
        let predict = ["predict", "--input", &file, "--format", format, "--logits"];
        json_lines(&client(&predict).success().unwrap())
    });
    assert_eq!(from_csv.len(), 2);
    assert_eq!(from_csv, from_jsonl);
    for line in &from_csv {
        let logits = line["logits"].as_array().unwrap();
        let powers: Vec<f64> = logits.iter().map(|x| x.as_f64().unwrap().exp()).collect();
        let sum: f64 = powers.iter().sum();
        let expected = probabilities(line);
        assert_eq!(powers.len(), expected.len(), "{line}");
        for (power, probability) in powers.iter().zip(expected) {
            assert!((power / sum - probability).abs() < 1e-5, "{line}");
        }
    }
}

fn an_unseen_label_ends_an_evaluation(folder: &Path, client: Client<'_>) {
    let text = "text,label\nof apples to rai,fruit\nof the to rai,strange\n";
    fs::write(folder.join("odd.csv"), text).unwrap();
    let output = client(&["evaluate", "--file", "odd.csv"]);
    assert_eq!(output.code(), 1, "{output:?}");
    assert_eq!(output.stdout, "");
    for part in ["odd.csv:3", "does not occur in the training rows"] {
        assert!(output.stderr.contains(part), "{output:?}");
    }
}

fn the_model_is_exported_in_both_formats(folder: &Path, client: Client<'_>) {
    for (format, wanted) in [
        ("safetensors", &["README.md", "model.safetensors"][..]),
        (
            "adapterhub",
            &[
                "README.md",
                "adapter.safetensors",
                "adapter_config.json",
                "concord_head.safetensors",
            ],
        ),
    ] {
        let export = ["export", "--format", format, "--out", format];
        client(&export).success().unwrap();
        let mut found: Vec<String> = fs::read_dir(folder.join(format))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        found.sort();
        assert_eq!(found, wanted);
        let again = client(&export);
        assert_eq!(again.code(), 1, "{again:?}");
        assert!(again.stderr.contains("is there already"), "{again:?}");
    }
}

/// Whether a line of `receipts.jsonl` has a signature of its own public key on what it says.
fn is_signed(line: &Value) -> bool {
    let bytes = |name: &str| -> Vec<u8> {
        let text = line[name].as_str().unwrap();
        (0..text.len())
            .step_by(2)
            .map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap())
            .collect()
    };
    let text = |name: &str| line[name].as_str().unwrap();
    let receipt = Receipt {
        job: text("job").parse().unwrap(),
        round: RoundNumber(u32::try_from(line["round"].as_u64().unwrap()).unwrap()),
        silo: text("silo").parse().unwrap(),
        payload_digest: text("payload_digest").parse().unwrap(),
        outcome: Outcome::from_parts(text("outcome"), "").unwrap(),
        recorded_at: Timestamp(line["recorded_at_ms"].as_i64().unwrap()),
    };
    let signed = SignedReceipt {
        receipt,
        signature: bytes("signature").try_into().unwrap(),
    };
    signed.verify(&bytes("public_key")).is_ok()
}

#[test]
fn a_silo_without_the_backbone_declines_and_the_job_says_who_and_why() {
    let federation = federation();
    let mut daemons = daemons(&federation);
    let config = daemons[1].config();
    let text = fs::read_to_string(&config).unwrap();
    fs::write(
        &config,
        text.replace("name = \"tiny\"", "name = \"another\""),
    )
    .unwrap();
    for daemon in &mut daemons {
        daemon.start(&[]).unwrap();
    }
    let spec = job(2).replace("min_silos = 3", "min_silos = 2");
    let job_id = runtime().block_on(submit(&mut operator_of(&federation), spec));
    let shown = wait_for("finished job", PATIENCE * 2, || {
        let shown = show(&federation, &job_id);
        let state = shown.job.as_ref().unwrap().state();
        Ok(matches!(state, v1::JobState::Succeeded | v1::JobState::Failed).then_some(shown))
    })
    .unwrap();
    assert_eq!(shown.job.unwrap().state(), v1::JobState::Succeeded);
    let declined = shown
        .silos
        .iter()
        .find(|silo| silo.silo_id == "silo-b")
        .unwrap();
    assert_eq!(declined.reason, "UNKNOWN_BACKBONE", "{declined:?}");
    assert_eq!(declined.accepted, 0);
}

#[test]
fn two_daemons_cannot_share_a_state_folder() {
    let federation = federation();
    let mut daemons = daemons(&federation);
    daemons[0].start(&[]).unwrap();
    let second = run(
        "concord-client",
        daemons[0].folder(),
        &["run", "--config", "client.toml"],
    )
    .unwrap();
    assert_ne!(second.code(), 0);
    assert!(second.stderr.contains("another daemon"), "{second:?}");
}

#[test]
fn an_operators_certificate_does_not_make_a_daemon() {
    let federation = federation();
    let daemons = daemons(&federation);
    let operator = federation.issue(Role::Operator, "anna").unwrap();
    let config: PathBuf = daemons[0].config();
    let silo = federation.issue(Role::Silo, "silo-a").unwrap();
    let text = fs::read_to_string(&config)
        .unwrap()
        .replace(
            silo.certificate.to_str().unwrap(),
            operator.certificate.to_str().unwrap(),
        )
        .replace(silo.key.to_str().unwrap(), operator.key.to_str().unwrap());
    fs::write(&config, text).unwrap();
    let check = ["check-config", "--config", "client.toml"];
    let output = run("concord-client", daemons[0].folder(), &check).unwrap();
    assert_eq!(output.code(), 78, "{output:?}");
    assert!(output.stderr.contains("operator"), "{output:?}");
}
