//! What a job leaves with a silo, as its user works with it: receipts, answers to rows, exports.

use std::{fs, path::Path};

use concord_common::{
    RoundNumber, Timestamp,
    round::Outcome,
    wire::{Receipt, SignedReceipt},
};
use concord_integration_tests::harness::{Output, PATIENCE, run, run_with_input};
use serde_json::Value;

use super::super::{operator_of, runtime, submit};
use super::{daemons, federation, job, wait_for_a_failed_attempt, wait_for_success};

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
    prefixes_are_computed_once(&daemons[0].program().unwrap().log());
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
    wait_for_a_failed_attempt(&mut daemons[0]);
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

/// The log of a silo whose rows fit in memory: all are computed in the first round, and none after it.
fn prefixes_are_computed_once(log: &str) {
    let lines: Vec<&str> = log
        .lines()
        .filter(|line| line.contains("rows through the prefix cache"))
        .collect();
    let rounds = json_lines(&lines.join("\n"));
    assert_eq!(rounds.len(), 2, "{rounds:?}");
    for (line, round) in rounds.iter().zip(1..) {
        assert_eq!(line["round"], round);
        assert_eq!(line["from_disk"], 0);
        let count = |name: &str| line[name].as_u64().unwrap();
        assert_eq!(count("computed") > 0, round == 1, "{line}");
        assert!(count("from_memory") > 0, "{line}");
    }
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
