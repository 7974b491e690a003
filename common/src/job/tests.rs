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

/// The minimal specification with a value, given as TOML, in place of the one at `path`.
fn with(path: &str, value: &str) -> String {
    let mut table: toml::Table = MINIMAL.parse().unwrap();
    let value = format!("value = {value}").parse::<toml::Table>().unwrap()["value"].clone();
    match path.split_once('.') {
        None => table.insert(path.to_owned(), value),
        Some((section, key)) => table
            .entry(section)
            .or_insert_with(|| toml::Table::new().into())
            .as_table_mut()
            .unwrap()
            .insert(key.to_owned(), value),
    };
    table.to_string()
}

fn assert_refused(path: &str, value: &str, key: &str) {
    let refusal = JobSpec::parse(&with(path, value)).unwrap_err();
    assert_eq!(refusal.code, ErrorCode::InvalidJobSpec);
    assert!(
        refusal.message.starts_with(&format!("`{key}`: ")),
        "{path} = {value}: {}",
        refusal.message
    );
}

#[test]
fn each_bad_value_is_refused_by_its_key() {
    let long = format!("\"{}\"", "a".repeat(101));
    let table: [(&str, &[&str]); 31] = [
        ("name", &["\"\"", "\"two\\nlines\"", &long]),
        ("task", &["\"\"", &long]),
        ("backbone.name", &["\"\"", &long]),
        ("backbone.hidden", &["0", "65537"]),
        ("backbone.layers", &["0", "1001"]),
        ("adapter.bottleneck", &["0", "65537"]),
        ("adapter.private_bottleneck", &["0", "65537"]),
        ("adapter.layers", &["[6]", "[0, 7]"]),
        ("adapter.scale_global", &["-100.1", "100.1", "nan"]),
        ("adapter.scale_private", &["-100.1", "100.1", "nan"]),
        ("adapter.init_up", &["0.0", "1.1", "nan"]),
        ("adapter.private_noise", &["0.0", "10.1", "nan"]),
        ("algorithm.mu", &["-0.1", "1000.1", "nan"]),
        ("algorithm.tau", &["0.0", "1000.1", "nan"]),
        ("algorithm.alpha", &["-0.1", "1000.1", "nan"]),
        ("training.epochs", &["0", "1001"]),
        ("training.batch_size", &["0", "3", "65537"]),
        ("training.learning_rate", &["0.0", "10.1", "nan"]),
        ("training.head_learning_rate", &["0.0", "10.1", "nan"]),
        ("training.weight_decay", &["-0.1", "10.1", "nan"]),
        ("training.clip_norm", &["-1.0", "1000001.0", "nan"]),
        ("training.max_length", &["3", "8193"]),
        ("training.max_examples", &["0"]),
        ("rounds.count", &["0", "10001"]),
        ("rounds.min_silos", &["0", "100001"]),
        ("rounds.max_silos", &["0", "1", "100001"]),
        ("rounds.max_time", &["\"0s\"", "\"999ms\"", "\"31days\""]),
        ("rounds.min_time", &["\"11m\""]),
        ("limits.max_examples", &["0"]),
        ("limits.max_update_norm", &["0.0", "-1.0", "inf", "nan"]),
        ("head.classes", &["2"]),
    ];
    for (key, values) in table {
        for value in values {
            assert_refused(key, value, key);
        }
    }
}

#[test]
fn bad_values_of_other_choices_are_refused_by_their_keys() {
    let near = r#"{ bottleneck = 16, private_bottleneck = 8, private_start = "near-global" }"#;
    for (path, value, key) in [
        (
            "algorithm",
            r#"{ name = "fedprox", mu = -0.1 }"#,
            "algorithm.mu",
        ),
        (
            "algorithm",
            r#"{ name = "moon", mu = 1000.1 }"#,
            "algorithm.mu",
        ),
        (
            "algorithm",
            r#"{ name = "moon", tau = 0.0 }"#,
            "algorithm.tau",
        ),
        (
            "algorithm",
            r#"{ name = "ditto", lambda = -0.1 }"#,
            "algorithm.lambda",
        ),
        (
            "algorithm",
            r#"{ name = "ditto", lambda = 1000.1 }"#,
            "algorithm.lambda",
        ),
        (
            "algorithm",
            r#"{ name = "fedrep", head_epochs = 0 }"#,
            "algorithm.head_epochs",
        ),
        (
            "algorithm",
            r#"{ name = "fedrep", head_epochs = 1001 }"#,
            "algorithm.head_epochs",
        ),
        ("adapter", near, "adapter.private_start"),
        ("head", r#"{ sharing = "shared" }"#, "head.classes"),
        (
            "head",
            r#"{ sharing = "shared", classes = 0 }"#,
            "head.classes",
        ),
        (
            "head",
            r#"{ sharing = "shared", classes = 100001 }"#,
            "head.classes",
        ),
        // The default waits for two silos.
        ("silos", r#"["alone"]"#, "rounds.min_silos"),
    ] {
        assert_refused(path, value, key);
    }
}

#[test]
fn an_unknown_value_is_refused_by_its_key_with_what_is_allowed() {
    let with = |line: &str| MINIMAL.replace("bottleneck = 16", &format!("bottleneck = 16\n{line}"));
    for (text, key, allowed) in [
        (
            with("position = \"between\""),
            "`adapter.position`",
            "`ffn` or `attention`",
        ),
        (with("position = 2"), "`adapter.position`", ""),
        (
            with("combine = \"product\""),
            "`adapter.combine`",
            "`sum`, `mean`, `gate`",
        ),
        (
            format!("{MINIMAL}[head]\npool = \"max\""),
            "`head.pool`",
            "`mean` or `cls`",
        ),
        (
            MINIMAL.replace("count = 3", "count = \"three\""),
            "`rounds.count`",
            "",
        ),
    ] {
        let refusal = JobSpec::parse(&text).unwrap_err();
        assert_eq!(refusal.code, ErrorCode::InvalidJobSpec);
        let message = refusal.message;
        assert!(
            message.contains(key) && message.contains(allowed),
            "{message}"
        );
    }
}

#[test]
fn adapters_stand_after_the_feed_forward_network_unless_the_job_says_otherwise() {
    let with = |line: &str| MINIMAL.replace("bottleneck = 16", &format!("bottleneck = 16\n{line}"));
    let plain = JobSpec::parse(MINIMAL).unwrap();
    assert_eq!(plain.training().adapter.position, AdapterPosition::Ffn);
    // Written as it was before there was a choice: states in vaults are bound to these bytes.
    let said = JobSpec::parse(&with("position = \"ffn\"")).unwrap();
    assert_eq!(said, plain);
    assert!(!plain.to_toml().unwrap().contains("position"));

    let moved = JobSpec::parse(&with("position = \"attention\"")).unwrap();
    let position = moved.training().adapter.position;
    assert_eq!(position, AdapterPosition::Attention);
    let text = moved.to_toml().unwrap();
    assert!(
        text.contains(&format!("position = \"{position}\"")),
        "{text}"
    );
    assert_eq!(JobSpec::parse(&text).unwrap(), moved);
    // What travels is the same.
    let payload = |spec: &JobSpec| spec.training().initial_adapter().unwrap();
    assert_eq!(payload(&moved), payload(&plain));
    let layout = |spec: &JobSpec| spec.training().adapter_shape().layout().unwrap();
    assert_eq!(layout(&moved), layout(&plain));
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
