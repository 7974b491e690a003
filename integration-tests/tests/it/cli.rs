//! The command lines: help for every command, exit codes, samples.

use std::{collections::BTreeSet, fs, path::Path};

use concord_integration_tests::harness::{Federation, ServerOptions, run, tiny_backbone};
use serde_json::Value;

use super::{job_toml, operator_of, runtime, submit};

/// The commands that a help text lists.
fn listed(help: &str) -> Vec<String> {
    help.lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.strip_prefix("  ")?.split_whitespace().next())
        .filter(|name| *name != "help")
        .map(str::to_owned)
        .collect()
}

/// Every command of a program with its help text, from the top down.
fn helps(program: &str) -> Vec<(Vec<String>, String)> {
    let mut found = Vec::new();
    let mut open = vec![vec![]];
    while let Some(command) = open.pop() {
        let arguments: Vec<String> = command
            .iter()
            .cloned()
            .chain(["--help".to_owned()])
            .collect();
        let output = run(program, Path::new("."), &arguments).unwrap();
        assert_eq!(output.code(), 0, "{program} {arguments:?}: {output:?}");
        for name in listed(&output.stdout) {
            open.push(command.iter().cloned().chain([name]).collect::<Vec<_>>());
        }
        found.push((command, output.stdout));
    }
    found
}

#[test]
fn every_command_has_help_that_says_what_it_does() {
    let mut commands = BTreeSet::new();
    for program in [
        "concord-server",
        "concord",
        "concord-client",
        "concord-artaug",
        "concord-loadgen",
    ] {
        for (command, help) in helps(program) {
            let first = help.lines().next().unwrap();
            assert!(
                first.len() >= 10 && !first.starts_with("Usage"),
                "{program} {command:?}: {help}"
            );
            commands.insert(format!("{program} {}", command.join(" ")).trim().to_owned());
        }
    }
    for expected in [
        "concord-server run",
        "concord-server check-config",
        "concord-server pki init",
        "concord-server pki issue",
        "concord job submit",
        "concord job list",
        "concord job show",
        "concord job watch",
        "concord job pause",
        "concord job resume",
        "concord job cancel",
        "concord round list",
        "concord round show",
        "concord silo list",
        "concord silo approve",
        "concord silo suspend",
        "concord silo revoke",
        "concord artaug review",
        "concord artaug artefacts",
        "concord artaug fetch",
        "concord-client run",
        "concord-client status",
        "concord-client check-config",
        "concord-client predict",
        "concord-client evaluate",
        "concord-client export",
        "concord-client simulate",
        "concord-artaug run",
    ] {
        assert!(
            commands.contains(expected),
            "{expected} is missing from {commands:#?}"
        );
    }
}

#[test]
fn every_program_tells_its_version() {
    for program in [
        "concord-server",
        "concord",
        "concord-client",
        "concord-artaug",
        "concord-loadgen",
    ] {
        let output = run(program, Path::new("."), &["--version"]).unwrap();
        assert_eq!(
            output.success().unwrap(),
            format!("{program} {}\n", env!("CARGO_PKG_VERSION"))
        );
    }
}

/// Runs `concord` against the server with an operator's certificate.
pub(super) fn concord(
    federation: &Federation,
    arguments: &[&str],
) -> concord_integration_tests::harness::Output {
    let files = federation
        .issue(concord_common::Role::Operator, "test-operator")
        .unwrap();
    let address = federation.grpc_address().to_string();
    let connection = [
        "--server",
        &address,
        "--certificate",
        files.certificate.to_str().unwrap(),
        "--key",
        files.key.to_str().unwrap(),
        "--ca",
        files.ca.to_str().unwrap(),
    ];
    run(
        "concord",
        federation.path(),
        &[arguments, &connection].concat(),
    )
    .unwrap()
}

#[test]
fn operators_submit_list_show_and_cancel_with_stable_exit_codes() {
    let mut federation = Federation::new(&ServerOptions::default()).unwrap();
    federation.start_server().unwrap();
    fs::write(federation.path().join("job.toml"), job_toml(&["silo-a"], 2)).unwrap();
    let submitted = concord(&federation, &["job", "submit", "job.toml", "--json"])
        .success()
        .unwrap();
    let submitted: Value = serde_json::from_str(&submitted).unwrap();
    let job_id = submitted["job"]["job_id"].as_str().unwrap().to_owned();

    let table = concord(&federation, &["job", "list"]).success().unwrap();
    assert!(table.contains(&job_id), "{table}");
    let shown = concord(&federation, &["job", "show", &job_id, "--json"])
        .success()
        .unwrap();
    let shown: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(shown["job"]["job_id"], job_id.as_str());
    let rounds = concord(&federation, &["round", "list", &job_id])
        .success()
        .unwrap();
    assert!(rounds.contains('1'), "{rounds}");
    concord(&federation, &["round", "show", &job_id, "1"])
        .success()
        .unwrap();
    concord(&federation, &["silo", "list"]).success().unwrap();
    concord(&federation, &["job", "cancel", &job_id])
        .success()
        .unwrap();
    // Watching a job that was cancelled ends at once and says so.
    assert_eq!(concord(&federation, &["job", "watch", &job_id]).code(), 5);

    assert_eq!(
        concord(&federation, &["job", "show", "no-such-job"]).code(),
        4
    );
    assert_eq!(
        concord(&federation, &["job", "submit", "no-such-file.toml"]).code(),
        2
    );
    assert_eq!(concord(&federation, &["job", "wibble"]).code(), 2);
    fs::write(
        federation.path().join("bad.toml"),
        "kind = \"federated-training\"\n",
    )
    .unwrap();
    let refused = concord(&federation, &["job", "submit", "bad.toml"]);
    assert_eq!(refused.code(), 1, "{refused:?}");
    assert!(refused.stderr.contains("INVALID_JOB_SPEC"), "{refused:?}");
    federation.stop_server().unwrap();
    let unreachable = concord(&federation, &["job", "list"]);
    assert_eq!(unreachable.code(), 3, "{unreachable:?}");
}

#[test]
fn a_silos_certificate_is_no_operators() {
    let mut federation = Federation::new(&ServerOptions::default()).unwrap();
    federation.start_server().unwrap();
    let files = federation
        .issue(concord_common::Role::Silo, "silo-a")
        .unwrap();
    let address = federation.grpc_address().to_string();
    let arguments = [
        "job",
        "list",
        "--server",
        &address,
        "--certificate",
        files.certificate.to_str().unwrap(),
        "--key",
        files.key.to_str().unwrap(),
        "--ca",
        files.ca.to_str().unwrap(),
    ];
    let output = run("concord", federation.path(), &arguments).unwrap();
    assert_ne!(output.code(), 0);
    assert!(output.stderr.contains("operator"), "{output:?}");
}

#[test]
fn every_sample_of_a_job_is_taken_by_a_server() {
    let mut federation = Federation::new(&ServerOptions::default()).unwrap();
    federation.start_server().unwrap();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/config/jobs");
    let mut count = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let spec = fs::read_to_string(&path).unwrap();
        let mut operator = operator_of(&federation);
        let request = concord_proto::v1::SubmitJobRequest {
            request_id: format!("sample-{count}"),
            spec_toml: spec,
        };
        let result = runtime().block_on(operator.submit_job(request));
        assert!(result.is_ok(), "{}: {result:?}", path.display());
        count += 1;
    }
    assert!(count >= 2);
}

#[test]
fn the_servers_sample_passes_check_config_with_certificates_in_place() {
    let federation = Federation::new(&ServerOptions::default()).unwrap();
    let sample = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/config/server.toml");
    let folder = federation.pki_folder();
    let text = fs::read_to_string(sample)
        .unwrap()
        .replace(
            "federation = \"example\"",
            &format!("federation = \"{}\"", federation.name()),
        )
        .replace(
            "/etc/concord/pki/server.",
            folder.join("server-main.").to_str().unwrap(),
        )
        .replace(
            "/etc/concord/pki/ca.crt",
            folder.join("ca.crt").to_str().unwrap(),
        );
    let names_others = |line: &str| !line.starts_with('#') && line.contains("/etc/");
    assert!(
        !text.lines().any(names_others),
        "the sample names other files than this test expects"
    );
    fs::write(federation.path().join("sample.toml"), text).unwrap();
    let check = ["check-config", "--config", "sample.toml"];
    run("concord-server", federation.path(), &check)
        .unwrap()
        .success()
        .unwrap();
}

#[test]
fn the_sample_of_simulated_silos_runs_with_data_in_place() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    fs::create_dir_all(data.join("clinic-a")).unwrap();
    let rows = |count: usize, row: &dyn Fn(usize) -> String| -> String {
        (0..count).map(|number| row(number) + "\n").collect()
    };
    for split in ["train", "validation", "test"] {
        let text = rows(8, &|number| {
            let (word, label) = [("apples", "fruit"), ("the", "other")][number % 2];
            format!("of {word} to {},{label}", "rai ".repeat(number))
        });
        let path = data.join(format!("clinic-a/{split}.csv"));
        fs::write(path, format!("text,label\n{text}")).unwrap();
    }
    let pairs = rows(40, &|number| {
        let (word, label) = [("apples", "yes"), ("the", "no")][number % 2];
        let question = format!("of {word}{}", " rai".repeat(number));
        serde_json::json!({ "question": question, "answer": "to the", "helpful": label })
            .to_string()
    });
    fs::write(data.join("clinic-b.jsonl"), pairs).unwrap();

    let sample = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/config/silos.toml");
    let text = fs::read_to_string(sample)
        .unwrap()
        .replace(
            "/srv/models/all-minilm-l6-v2",
            tiny_backbone().to_str().unwrap(),
        )
        .replace("/srv/data", data.to_str().unwrap());
    assert!(
        !text.contains("/srv/"),
        "the sample names other files than this test expects"
    );
    fs::write(folder.path().join("silos.toml"), text).unwrap();
    let job = job_toml(&[], 1)
        .replace(
            "name = \"none\", hidden = 4",
            "name = \"minilm-l6\", hidden = 24",
        )
        .replace("min_silos = 0", "min_silos = 2")
        + "training = { max_length = 16 }\n";
    fs::write(folder.path().join("job.toml"), job).unwrap();
    let simulate = [
        "simulate",
        "--silos",
        "silos.toml",
        "--job",
        "job.toml",
        "--json",
    ];
    let report = run("concord-client", folder.path(), &simulate)
        .unwrap()
        .success()
        .unwrap();
    let report: Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report["state"], "succeeded", "{report}");
    let silos: Vec<&Value> = report["silos"]
        .as_array()
        .unwrap()
        .iter()
        .map(|silo| &silo["silo_id"])
        .collect();
    assert_eq!(silos, ["clinic-a", "clinic-b"]);
}

#[test]
fn a_jobs_request_id_makes_a_repeated_command_safe() {
    let mut federation = Federation::new(&ServerOptions::default()).unwrap();
    federation.start_server().unwrap();
    fs::write(federation.path().join("job.toml"), job_toml(&["silo-a"], 1)).unwrap();
    let once = || {
        let command = [
            "job",
            "submit",
            "job.toml",
            "--request-id",
            "request",
            "--json",
        ];
        let text = concord(&federation, &command).success().unwrap();
        let answer: Value = serde_json::from_str(&text).unwrap();
        answer["job"]["job_id"].as_str().unwrap().to_owned()
    };
    let first = once();
    assert_eq!(first, once());
    let by_call = runtime().block_on(submit(
        &mut operator_of(&federation),
        job_toml(&["silo-a"], 1),
    ));
    assert_eq!(first, by_call);
}
