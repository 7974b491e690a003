use std::fs;

use concord_common::{job::AlgorithmSpec, round::job::JobState};

use super::*;
use crate::testing::{silo, spec, tiny_backbone, write_toy_task};

/// Three toy silos over the tiny backbone.
fn silos(folder: &Path) -> SimulatedSilos {
    let mut silos = SimulatedSilos {
        tasks: BTreeMap::new(),
        backbones: Vec::new(),
        threads: 1,
        cache: CacheSettings::default(),
    };
    silos.add_backbone("tiny", &tiny_backbone());
    for (number, name) in ["east", "north", "south"].into_iter().enumerate() {
        let task = write_toy_task(&folder.join("data").join(name), number as u64);
        silos.tasks.insert(silo(name), task);
    }
    silos
}

fn plan(spec_toml: &str) -> Plan {
    Plan {
        spec_toml: spec_toml.to_owned(),
        algorithm: None,
        seed: None,
    }
}

/// Runs the plans one after the other in one simulator.
async fn run_all(plans: &[Plan]) -> Vec<SimulationReport> {
    let folder = tempfile::tempdir().unwrap();
    let simulator = Simulator::start(
        silos(folder.path()),
        folder.path(),
        CancellationToken::new(),
    )
    .unwrap();
    let mut reports = Vec::new();
    for (number, plan) in plans.iter().enumerate() {
        reports.push(simulator.run(plan, number, |_| {}).await.unwrap());
    }
    reports
}

async fn run(plan: &Plan) -> SimulationReport {
    run_all(std::slice::from_ref(plan)).await.remove(0)
}

#[tokio::test]
async fn a_simulation_runs_to_its_end_and_reports_everything() {
    let report = run(&plan(&spec("fedmcp", 2, ""))).await;
    assert_eq!(report.state, JobState::Succeeded);
    assert_eq!(report.versions.len(), 3);
    assert_eq!(report.payload_bytes, 4 * 2 * (2 * 24 * 4 + 4 + 24));
    let names: Vec<&str> = report
        .silos
        .iter()
        .map(|silo| silo.silo_id.as_str())
        .collect();
    assert_eq!(names, ["east", "north", "south"]);
    for silo in &report.silos {
        assert_eq!(silo.examples, 40);
        assert!(silo.best_test["accuracy"] >= 0.0 && silo.last_test["accuracy"] >= 0.0);
        assert!(silo.best_round.is_some() && silo.majority.is_some());
    }
    // Training, before and after aggregation in each round; the two tests at the end.
    assert_eq!(report.metrics.len(), 3 * (2 * 3 + 2));
}

#[tokio::test]
async fn the_same_seed_gives_the_same_adapters_and_another_seed_others() {
    let same = plan(&spec("fedmcp", 2, ""));
    let other = Plan {
        seed: Some(8),
        ..same.clone()
    };
    let (first, second, third) = (run(&same).await, run(&same).await, run(&other).await);
    assert_eq!(first.versions, second.versions);
    assert_eq!(first.silos, second.silos);
    assert_eq!(third.seed, 8);
    assert_ne!(first.versions[0], third.versions[0]);
    assert_ne!(first.versions[2], third.versions[2]);
}

#[tokio::test]
async fn jobs_that_share_their_rows_give_what_each_gives_alone() {
    let plans = [
        plan(&spec("fedavg", 2, "")),
        plan(&spec("fedmcp", 2, "")),
        // Another first adapter layer: other rows are prepared.
        plan(&spec("fedmcp", 2, "").replace("bottleneck = 4", "bottleneck = 4\nlayers = [1]")),
        // Another position in the same layers: other rows again.
        plan(&after_attention()),
        plan(&spec("fedmcp", 2, "")),
    ];
    let together = run_all(&plans).await;
    for (plan, report) in plans.iter().zip(together) {
        let alone = run(plan).await;
        assert_eq!(report.versions, alone.versions, "{}", report.algorithm);
        assert_eq!(report.silos, alone.silos);
    }
}

fn after_attention() -> String {
    let with = "bottleneck = 4\nposition = \"attention\"";
    spec("fedmcp", 2, "").replace("bottleneck = 4", with)
}

#[tokio::test]
async fn adapters_after_the_attention_are_trained_evaluated_and_averaged() {
    let (plain, moved) = (plan(&spec("fedmcp", 2, "")), plan(&after_attention()));
    let (plain, report) = (run(&plain).await, run(&moved).await);
    assert_eq!(report.state, JobState::Succeeded);
    // The same first adapter and layout, and from there on another one.
    assert_eq!(report.payload_bytes, plain.payload_bytes);
    assert_eq!(report.versions[0], plain.versions[0]);
    assert_ne!(report.versions[2], plain.versions[2]);
    assert!(report.silos.iter().all(|silo| silo.best_round.is_some()));
    // Better than three classes at random.
    let losses: f64 = report.silos.iter().map(|silo| silo.last_test["loss"]).sum();
    assert!(losses / 3.0 < 3.0_f64.ln(), "{:?}", report.silos);
    assert_eq!(run(&moved).await.versions, report.versions);
}

#[tokio::test]
async fn the_size_of_the_cache_changes_nothing() {
    let plan = plan(&spec("fedmcp", 1, ""));
    let folder = tempfile::tempdir().unwrap();
    let small = SimulatedSilos {
        cache: CacheSettings {
            memory_bytes: 20_000,
            ..CacheSettings::default()
        },
        ..silos(folder.path())
    };
    let simulator = Simulator::start(small, folder.path(), CancellationToken::new()).unwrap();
    let report = simulator.run(&plan, 1, |_| {}).await.unwrap();
    assert_eq!(report.versions, run(&plan).await.versions);
}

#[tokio::test]
async fn local_exchanges_nothing() {
    let local = Plan {
        algorithm: Some("local".to_owned()),
        ..plan(&spec("fedmcp", 2, ""))
    };
    let report = run(&local).await;
    assert_eq!(report.algorithm, "local");
    assert_eq!(report.versions[0], report.versions[1]);
    assert_eq!(report.versions[0], report.versions[2]);
    assert!(
        report
            .silos
            .iter()
            .all(|silo| silo.best_test["accuracy"] > 0.0)
    );
}

/// The toy job for these silos.
fn job_for(silos: &str) -> String {
    let with = format!("task = \"toy\"\nsilos = {silos}");
    spec("fedavg", 1, "").replace("task = \"toy\"", &with)
}

#[tokio::test]
async fn a_job_for_some_of_the_silos_runs_with_those_and_says_who_is_left_out() {
    let report = run(&plan(&job_for("[\"north\", \"south\"]"))).await;
    let names: Vec<&str> = report
        .silos
        .iter()
        .map(|silo| silo.silo_id.as_str())
        .collect();
    assert_eq!(names, ["north", "south"]);
    assert_eq!(report.left_out, [silo("east")]);
}

#[tokio::test]
async fn silos_that_the_job_names_and_that_are_not_here_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let simulator = Simulator::start(
        silos(folder.path()),
        folder.path(),
        CancellationToken::new(),
    )
    .unwrap();
    let job = job_for("[\"west\", \"north\", \"alps\"]");
    let error = simulator.run(&plan(&job), 1, |_| {}).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "the job names silos that are not here: alps, west; there are east, north, south; \
         give data for them, or take them out of the job's `silos`"
    );
}

#[tokio::test]
async fn no_algorithm_reports_a_number_that_the_gate_does_not_know() {
    for algorithm in [
        "local", "fedavg", "fedprox", "moon", "ditto", "fedrep", "fedmcp",
    ] {
        let changed = Plan {
            algorithm: Some(algorithm.to_owned()),
            ..plan(&spec("fedmcp", 2, ""))
        };
        let report = run(&changed).await;
        let points: Vec<&str> = report
            .metrics
            .iter()
            .filter(|entry| entry.silo_id.as_str() == "north")
            .map(|entry| entry.point)
            .collect();
        for point in concord_common::wire::MetricPoint::ALL {
            // One that the gate has held back is missing.
            assert!(points.contains(&point.as_str()), "{algorithm}: {point:?}");
        }
    }
}

#[tokio::test]
async fn a_silo_with_bad_data_ends_the_simulation_with_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let silos = silos(folder.path());
    fs::write(folder.path().join("data/north/train.csv"), "text,label\n").unwrap();
    let simulator = Simulator::start(silos, folder.path(), CancellationToken::new()).unwrap();
    let error = simulator
        .run(&plan(&spec("fedavg", 1, "")), 1, |_| {})
        .await
        .unwrap_err();
    assert!(
        matches!(&error, SimulateError::Silo { silo, .. } if silo.as_str() == "north"),
        "{error}"
    );
}

#[test]
fn an_algorithm_takes_the_place_of_the_jobs_and_an_unknown_one_is_named() {
    let plan = |name: &str| Plan {
        algorithm: Some(name.to_owned()),
        ..plan(&spec("fedmcp", 1, ""))
    };
    let spec_of = |plan: &Plan| JobSpec::parse(&plan.spec().unwrap()).unwrap();
    assert_eq!(
        spec_of(&plan("ditto")).training().algorithm,
        AlgorithmSpec::Ditto { lambda: 0.1 }
    );
    // The job's own settings stay where the name is its own.
    let tuned = Plan {
        spec_toml: spec("fedmcp\"\nmu = 0.25 #", 1, ""),
        ..plan("fedmcp")
    };
    assert!(matches!(
        spec_of(&tuned).training().algorithm,
        AlgorithmSpec::Fedmcp { mu, .. } if (mu - 0.25).abs() < 1e-12
    ));
    let refusal = plan("sgd").spec().unwrap_err();
    assert!(refusal.message.contains("sgd"), "{refusal}");
}

const SILOS: &str = r#"
[torch]
threads = 2
[cache]
memory = "3 MiB"
[[backbone]]
name = "tiny"
path = "models/tiny"
[[silo]]
id = "north"
[silo.task]
format = "csv"
train = "north/train.csv"
validation = "north/validation.csv"
test = "north/test.csv"
[[silo]]
id = "south"
[silo.task]
kind = "pair"
format = "jsonl"
columns.text_b = "second"
file = "/data/south.jsonl"
split = { seed = 3 }
"#;

#[test]
fn silos_are_read_from_a_file_with_paths_of_its_folder() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("silos.toml");
    fs::write(&path, SILOS).unwrap();
    let silos = SimulatedSilos::read(&path).unwrap();
    assert_eq!(silos.tasks.len(), 2);
    assert_eq!((silos.threads, silos.cache.memory_bytes), (2, 3 << 20));
    assert_eq!(silos.cache_of_one().memory_bytes, (3 << 20) / 2);
    assert_eq!(silos.backbones[0].path, folder.path().join("models/tiny"));
    let mut task = silos.tasks[&silo("north")].clone();
    assert_eq!(*task.paths_mut()[0], folder.path().join("north/train.csv"));

    fs::write(&path, SILOS.replace("\"south\"", "\"north\"")).unwrap();
    assert!(
        SimulatedSilos::read(&path)
            .unwrap_err()
            .to_string()
            .contains("listed twice")
    );
    fs::write(&path, SILOS.replace("threads = 2", "threads = 0")).unwrap();
    assert!(
        SimulatedSilos::read(&path)
            .unwrap_err()
            .to_string()
            .contains("torch.threads")
    );
    fs::write(&path, SILOS.replace("threads", "thread")).unwrap();
    assert!(
        SimulatedSilos::read(&path)
            .unwrap_err()
            .to_string()
            .contains("thread")
    );
}

#[test]
fn a_folder_of_tasks_is_a_silo_for_each() {
    let folder = tempfile::tempdir().unwrap();
    let list = r#"{"seed": 0, "tasks": [
        {"name": "spam", "kind": "single", "problem": "classification", "title": "mail"},
        {"name": "glosses", "kind": "pair", "problem": "regression"}]}"#;
    fs::write(folder.path().join("tasks.json"), list).unwrap();
    let silos = SimulatedSilos::read(folder.path()).unwrap();
    let glosses = &silos.tasks[&silo("glosses")];
    assert_eq!(glosses.columns.text_b.as_deref(), Some("text_b"));
    assert_eq!(silos.tasks[&silo("spam")].columns.text, "text");
    assert!(SimulatedSilos::read(&folder.path().join("none")).is_err());
}

#[test]
fn daemons_configurations_make_a_simulation() {
    let folder = tempfile::tempdir().unwrap();
    let config = |threads: u32| {
        format!(
            "[server]\naddress = \"h:1\"\n[tls]\ncertificate = \"c\"\nkey = \"k\"\nca = \"a\"\n[state]\nfolder = \"s\"\n\
             [torch]\nthreads = {threads}\n[[backbone]]\nname = \"tiny\"\npath = \"tiny\"\n\
             [[task]]\nname = \"toy\"\nformat = \"csv\"\nfile = \"all.csv\"\nsplit = {{}}\n"
        )
    };
    let paths: Vec<(SiloId, PathBuf)> = ["north", "south"]
        .into_iter()
        .map(|name| {
            let path = folder.path().join(format!("{name}.toml"));
            fs::write(&path, config(3)).unwrap();
            (silo(name), path)
        })
        .collect();
    let silos = SimulatedSilos::from_daemons(&paths, "toy").unwrap();
    assert_eq!(
        (silos.tasks.len(), silos.threads, silos.backbones.len()),
        (2, 3, 1)
    );
    assert_eq!(
        silos.cache_of_one(),
        CacheSettings::default(),
        "each silo has a daemon's share"
    );
    let error = SimulatedSilos::from_daemons(&paths, "other")
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("north.toml") && error.contains("`other`"),
        "{error}"
    );
}
