use std::time::Duration;

use super::*;

const MINIMAL: &str = r#"
kind = "federated-training"
name = "first"
task = "main"

[backbone]
name = "minilm-l6"
hidden = 384
layers = 6

[adapter]
bottleneck = 16

[algorithm]
name = "fedmcp"

[rounds]
count = 3
max_time = "10m"
"#;

#[test]
fn a_minimal_specification_gets_the_defaults() {
    let spec = JobSpec::parse(MINIMAL).unwrap();
    let training = spec.training();
    assert_eq!(training.adapter_layers(), vec![0, 1, 2, 3, 4, 5]);
    assert_eq!(
        training.adapter_shape().layout().unwrap().elements(),
        76_128
    );
    assert_eq!(training.rounds.max_time, Duration::from_mins(10));
    assert!(matches!(
        training.algorithm,
        AlgorithmSpec::Fedmcp {
            cka: CkaEstimator::Unbiased,
            ..
        }
    ));
}

#[test]
fn a_specification_survives_its_text_form() {
    let spec = JobSpec::parse(MINIMAL).unwrap();
    assert_eq!(JobSpec::parse(&spec.to_toml().unwrap()), Ok(spec));
}

#[test]
fn an_unknown_key_is_named() {
    for (line, key) in [
        ("[training]\nlearning_rat = 1.0", "learning_rat"),
        ("[head]\nshape = 1", "shape"),
        ("[limits]\nmax = 1", "max"),
    ] {
        let refusal = JobSpec::parse(&format!("{MINIMAL}\n{line}")).unwrap_err();
        assert_eq!(refusal.code, ErrorCode::InvalidJobSpec);
        assert!(refusal.message.contains(key), "{}", refusal.message);
    }
    let refusal =
        JobSpec::parse(&MINIMAL.replace("name = \"fedmcp\"", "name = \"fedmcp\"\nmoo = 1.0"))
            .unwrap_err();
    assert!(refusal.message.contains("moo"), "{}", refusal.message);
    let refusal = JobSpec::parse(&format!("colour = \"red\"\n{MINIMAL}")).unwrap_err();
    assert!(refusal.message.contains("colour"), "{}", refusal.message);
}

#[test]
fn each_bad_value_is_refused_by_its_key() {
    for (from, to, key) in [
        ("bottleneck = 16", "bottleneck = 0", "adapter.bottleneck"),
        (
            "bottleneck = 16",
            "bottleneck = 16\nlayers = [6]",
            "adapter.layers",
        ),
        (
            "bottleneck = 16",
            "bottleneck = 16\ninit_up = 0.0",
            "adapter.init_up",
        ),
        (
            "bottleneck = 16",
            "bottleneck = 16\nscale_global = nan",
            "adapter.scale_global",
        ),
        (
            "name = \"fedmcp\"",
            "name = \"fedmcp\"\ntau = 0.0",
            "algorithm.tau",
        ),
        (
            "name = \"fedmcp\"",
            "name = \"fedmcp\"\nmu = -1.0",
            "algorithm.mu",
        ),
        ("count = 3", "count = 0", "rounds.count"),
        (
            "count = 3",
            "count = 3\nmin_time = \"1h\"",
            "rounds.min_time",
        ),
        (
            "count = 3",
            "count = 3\n[training]\nbatch_size = 3",
            "training.batch_size",
        ),
        (
            "count = 3",
            "count = 3\n[head]\nsharing = \"shared\"",
            "head.classes",
        ),
        ("name = \"first\"", "name = \"\"", "`name`"),
    ] {
        let text = if to.contains("[training]") || to.contains("[head]") {
            let (values, table) = to.split_once('\n').unwrap();
            format!("{}\n{table}", MINIMAL.replace(from, values))
        } else {
            MINIMAL.replace(from, to)
        };
        let refusal = JobSpec::parse(&text).unwrap_err();
        assert!(refusal.message.contains(key), "{key}: {}", refusal.message);
    }
}

#[test]
fn an_unknown_kind_is_refused() {
    assert!(JobSpec::parse(&MINIMAL.replace("federated-training", "mining")).is_err());
}

#[test]
fn a_submission_is_read_by_its_kind() {
    let federated = Submission::parse(MINIMAL).unwrap();
    assert_eq!((federated.kind(), federated.name()), (FEDERATED, "first"));
    let refusal = Submission::parse("kind = \"artaug\"\nname = \"second\"").unwrap_err();
    assert!(refusal.message.contains("model"), "{}", refusal.message);
    let refusal = Submission::parse("kind = \"mining\"").unwrap_err();
    assert!(refusal.message.contains("mining"), "{}", refusal.message);
}
