//! "Five minutes" in the README.

use std::{env, fs, net::TcpListener, os::unix::fs::symlink, path::Path, process::Command};

use concord_integration_tests::harness::{PATIENCE, program_path, run, tiny_backbone};
use serde_json::Value;

use super::docs::read;

/// What the section says, and the lines that it tells to type.
fn tour() -> (String, Vec<String>) {
    let readme = read("README.md");
    let (_, rest) = readme.split_once("\n## Five minutes\n").unwrap();
    let section = rest.split("\n## ").next().unwrap();
    let lines = section
        .lines()
        .filter_map(|line| line.strip_prefix("    "))
        .map(str::to_owned)
        .collect();
    (section.to_owned(), lines)
}

/// Whatever happens, nothing is left running, and a failure comes with the logs.
const ORDER: &str = r"pids=
trap 'code=$?; [ $code = 0 ] || tail -n 15 ./*.log >&2; kill $pids 2>/dev/null || true; wait; exit $code' EXIT
";

/// Server and daemons end by the README's words, and end well.
const END: &str = "kill %1 %2 %3\nfor pid in $pids; do wait $pid; done\npids=\n";

/// What somebody types, who has built the programs: on the tests' backbone, at ports that are free.
fn script(lines: &[String]) -> String {
    let mut script = ORDER.to_owned();
    for line in lines {
        if line.starts_with("make ") {
            continue;
        }
        if line.starts_with("concord job submit ") {
            // People type slower than a server starts.
            script += "until concord silo list >/dev/null 2>&1; do sleep 0.1; done\n";
        }
        if line.starts_with("concord-client simulate ") {
            script += END;
        }
        script += line;
        script += "\n";
        if line.ends_with(" &") {
            script += "pids=\"$pids $!\"\n";
        }
    }
    let port = TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .unwrap()
        .port()
        .to_string();
    let listens = "listen.address = \"127.0.0.1:7600\"";
    let listens_free = format!("{listens}\nops.address = \"127.0.0.1:0\"");
    for (from, to) in [
        (listens, listens_free.as_str()),
        ("7600", port.as_str()),
        ("hidden = 384, layers = 6", "hidden = 24, layers = 2"),
        ("layers = [4, 5]", "layers = [0, 1]"),
        ("batch_size = 8", "batch_size = 8, max_length = 16"),
    ] {
        assert!(script.contains(from), "{from} is not in:\n{script}");
        script = script.replace(from, to);
    }
    script
}

#[test]
fn the_readmes_five_minutes_can_be_typed_as_they_stand() {
    let (section, lines) = tour();
    assert!(section.contains("`kill %1 %2 %3` ends server and daemons"));
    let folder = tempfile::tempdir().unwrap();
    let backbones = folder.path().join("cache/backbones");
    fs::create_dir_all(&backbones).unwrap();
    symlink(
        fs::canonicalize(tiny_backbone()).unwrap(),
        backbones.join("all-minilm-l6-v2"),
    )
    .unwrap();
    let programs = program_path("concord").unwrap();
    let path = format!(
        "{}:{}",
        programs.parent().unwrap().display(),
        env::var("PATH").unwrap()
    );
    let patience = (PATIENCE * 3).as_secs().to_string();
    let output = Command::new("timeout")
        .args(["--kill-after=30", &patience])
        .args(["bash", "-euc", &script(&lines)])
        .current_dir(folder.path())
        .env("PATH", path)
        .env("CONCORD_CACHE", folder.path().join("cache"))
        .output()
        .unwrap();
    let (said, complaints) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "{said}\n{complaints}");

    let checked = said.matches("the configuration is acceptable").count();
    assert_eq!(checked, 3, "{said}");
    let predicted = said.lines().find(|line| line.contains("\"probabilities\""));
    let predicted: Value = serde_json::from_str(predicted.unwrap()).unwrap();
    let probabilities = predicted["probabilities"].as_object().unwrap();
    assert!(probabilities.keys().eq(["machine", "money"]), "{predicted}");
    // Sixteen things, three sentences about each.
    assert!(said.contains("\"rows\": 48"), "{said}");
    let here = folder.path().join("target/tour");
    assert!(here.join("adapter/adapter_config.json").is_file(), "{said}");
    // As many as the job has rounds: what left, out of the log.
    let left = said.matches("\"kind\":\"contribution\"").count();
    assert!(left >= 5, "{said}");
}

#[test]
fn the_readmes_commands_have_the_options_that_it_gives_them() {
    let (_, lines) = tour();
    let mut seen = 0;
    for line in &lines {
        let command = line.rsplit(" | ").next().unwrap();
        let mut words = command.split_whitespace().peekable();
        let program = words.next().unwrap_or_default();
        if !["concord", "concord-server", "concord-client"].contains(&program) {
            continue;
        }
        let mut help = Vec::new();
        while let Some(word) = words.next_if(|word| {
            word.bytes().all(|b| b.is_ascii_lowercase() || b == b'-') && !word.starts_with('-')
        }) {
            help.push(word);
        }
        help.push("--help");
        let text = run(program, Path::new("."), &help)
            .unwrap()
            .success()
            .unwrap();
        for option in words.filter(|word| word.starts_with("--")) {
            assert!(
                text.split_whitespace().any(|word| word == option),
                "{line}: {option} is not in {text}"
            );
        }
        seen += 1;
    }
    assert!(seen > 15, "{seen}");
}
