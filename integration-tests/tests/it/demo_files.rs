//! `make demo`, `make experiment` and `make artaug-demo` in small, on the real programs: what their scripts write is taken, and
//! what the programs print is understood. `demo_files.py` runs the scripts.

use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use concord_common::job::Submission;
use concord_integration_tests::harness::{Federation, program_path, run, tiny_backbone};
use serde_json::Value;

use super::cli::concord;

/// Runs a command of `demo_files.py`; gives what it found.
fn script<A: AsRef<OsStr>>(command: &str, arguments: &[A]) -> Value {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/demo_files.py");
    let output = Command::new("python3")
        .arg("-B")
        .arg(file)
        .arg(command)
        .args(arguments)
        .output()
        .unwrap();
    let (said, complaints) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "{command}: {said}\n{complaints}");
    serde_json::from_str(said.lines().last().unwrap()).unwrap()
}

/// The folder of the built programs.
fn programs() -> PathBuf {
    let concord = program_path("concord").unwrap();
    concord.parent().unwrap().to_owned()
}

/// `check-config` of one of the programs has nothing against a file.
fn acceptable(program: &str, config: &Path) {
    let folder = config.parent().unwrap();
    let arguments = [
        OsStr::new("check-config"),
        OsStr::new("--config"),
        config.as_os_str(),
    ];
    let said = run(program, folder, &arguments).unwrap().success().unwrap();
    assert!(said.contains("the configuration is acceptable"), "{said}");
}

#[test]
fn every_job_of_the_demos_the_experiment_and_its_comparisons_is_acceptable() {
    let folder = tempfile::tempdir().unwrap();
    let written = script("specifications", &[folder.path()]);
    let mut kinds = [0_u64; 2];
    for entry in fs::read_dir(folder.path()).unwrap() {
        let path = entry.unwrap().path();
        let text = fs::read_to_string(&path).unwrap();
        let spec = Submission::parse(&text)
            .unwrap_or_else(|refusal| panic!("{}: {refusal:?}\n{text}", path.display()));
        match spec {
            Submission::Federated(spec) => {
                assert!(spec.adapter_shape().layout().is_ok(), "{}", path.display());
                kinds[0] += 1;
            }
            Submission::Artaug(_) => kinds[1] += 1,
        }
    }
    assert_eq!(written["written"], kinds[0] + kinds[1]);
    assert!(kinds[0] > 80 && kinds[1] == 1, "{kinds:?}");
}

#[test]
fn the_demo_shows_and_reports_a_job_of_real_programs() {
    let folder = tempfile::tempdir().unwrap();
    let paths = [folder.path().to_owned(), programs(), tiny_backbone()];
    let found = script("demo", &paths);

    let silos = found["report"]["silos"].as_array().unwrap();
    assert_eq!(silos.len(), 3);
    for silo in silos {
        for key in ["local", "final", "seconds", "peak_rss_bytes"] {
            assert!(silo[key].is_number(), "{key}: {silo}");
        }
        for key in ["rounds", "local_rounds"] {
            let values = silo[key].as_array().unwrap();
            assert_eq!(values.len(), 2, "{key}: {silo}");
            assert!(values.iter().all(Value::is_number), "{key}: {silo}");
        }
        assert!(silo["bytes_up"].as_u64() > Some(1000), "{silo}");
        assert!(silo["bytes_down"].as_u64() > Some(1000), "{silo}");
        assert_eq!(
            found["local"][silo["name"].as_str().unwrap()],
            2,
            "{found:#}"
        );
    }
    assert_eq!(found["report"]["server"]["libtorch_mapped"], false);
    // Two layers of width 24 with a bottleneck of 4, in f32.
    assert_eq!(found["report"]["job"]["adapter_bytes"], 1760);
    // What the daemons' status files say of a round under way.
    assert!(found["said"]["training"].as_u64() > Some(0), "{found:#}");
    let shown = found["shown"].as_str().unwrap();
    for part in ["round 2 of 2", "all 2 rounds are published", "training"] {
        assert!(shown.contains(part), "{part}: {shown}");
    }

    // The server, the daemons and the two that train Local: told to end, they ended in good order.
    let ended = found["ended"].as_object().unwrap();
    assert_eq!(ended.len(), 1 + silos.len() + 2, "{ended:?}");
    assert!(ended.contains_key("server"), "{ended:?}");
    for (name, process) in ended {
        assert_eq!(process["code"], 0, "{name}: {process}");
        let running = Path::new("/proc").join(process["pid"].to_string());
        assert!(!running.exists(), "{name} is left running");
    }

    let work = folder.path().join("work");
    acceptable("concord-server", &work.join("server.toml"));
    for silo in silos {
        let name = silo["name"].as_str().unwrap();
        acceptable("concord-client", &work.join(format!("silo-{name}.toml")));
    }
}

#[test]
fn the_experiment_reads_what_simulate_writes() {
    let folder = tempfile::tempdir().unwrap();
    let paths = [folder.path().to_owned(), programs(), tiny_backbone()];
    let found = script("experiment", &paths);

    let arms = found["arms"].as_array().unwrap();
    let rows = found["rows"].as_array().unwrap();
    assert!(arms.len() > 5, "{arms:?}");
    assert_eq!(rows.len(), 2 * arms.len());
    for row in rows {
        for value in [
            &row["best"]["accuracy"],
            &row["last"]["mcc"],
            &row["majority"],
        ] {
            assert!(value.is_number(), "{row}");
        }
        assert_eq!(row["validation"].as_array().unwrap().len(), 2, "{row}");
        let similarities = row["similarities"].as_array().unwrap();
        assert_eq!(similarities.len(), 2, "{row}");
        let contrast = row["arm"] == "fedmcp";
        assert!(!contrast || similarities[0][2].is_number(), "{row}");
    }
    let grid = found["chosen"]["fedmcp"]["grid"].as_array().unwrap();
    assert_eq!(grid.len(), 2, "{grid:?}");
    let page = fs::read_to_string(folder.path().join("results.md")).unwrap();
    for part in [
        "### Verdict",
        "Similarities that the contrastive term saw",
        "spam.svg",
    ] {
        assert!(page.contains(part), "{part}: {page}");
    }
}

#[test]
fn the_artaug_demo_follows_a_job_of_a_real_worker() {
    let folder = tempfile::tempdir().unwrap();
    let found = script("artaug", &[folder.path().to_owned(), programs()]);
    let progress = &found["progress"];
    assert!(progress["done"].as_u64() > Some(0), "{found}");
    assert_eq!(progress["iterations"], 1, "{found}");
    let line = found["line"].as_str().unwrap();
    let stage = progress["stage"].as_str().unwrap();
    assert!(
        line.contains(&format!("iteration 1 of 1   {stage}")),
        "{line}"
    );
    acceptable("concord-server", &folder.path().join("work/server.toml"));
}

/// The table that the ArtAug demo ends with, from the federation's only job.
pub(super) fn the_artaug_demo_has_a_table_for(federation: &Federation) {
    let listed = concord(federation, &["job", "list", "--json"]);
    let listed: Value = serde_json::from_str(&listed.success().unwrap()).unwrap();
    let job = listed["jobs"][0]["job_id"].as_str().unwrap();
    let fetch = ["artaug", "fetch", job, "results"];
    concord(federation, &fetch).success().unwrap();
    // What is planted about the embedded model is said where its results are read.
    for page in ["gallery.html", "MODEL_CARD.md"] {
        let text = fs::read_to_string(federation.path().join("results").join(page)).unwrap();
        assert!(text.contains("planted: three quarters"), "{page}");
    }
    let found = script(
        "artaug-table",
        &[federation.path().join("results/metrics.jsonl")],
    );
    let table: Vec<&str> = found["table"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(Value::as_str)
        .collect();
    for part in [
        "base model",
        "enhanced (differential)",
        "interaction before the filter",
        "pairs kept",
    ] {
        assert!(
            table.iter().any(|line| line.contains(part)),
            "{part}: {table:?}"
        );
    }
}
