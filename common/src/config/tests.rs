use super::*;

#[derive(Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sample {
    name: String,
    listen: ListenSection,
    #[serde(default)]
    log: LogSection,
    tls: TlsSection,
    #[serde(default)]
    limits: Limits,
    #[serde(default)]
    folders: Vec<PathBuf>,
}

#[derive(Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Limits {
    payload: ByteSize,
    #[serde(with = "humantime_serde")]
    patience: Duration,
    retries: u32,
    strict: bool,
    ratio: f64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            payload: ByteSize::mebibytes(64),
            patience: Duration::from_mins(1),
            retries: 3,
            strict: true,
            ratio: 0.5,
        }
    }
}

const TEXT: &str = r#"
name = "north"
[listen]
address = "127.0.0.1:0"
max_connections = 7
handshake_timeout = "3s"
[tls]
certificate = "server.crt"
key = "server.key"
ca = "ca.crt"
[limits]
payload = "128 MiB"
patience = "2m 30s"
"#;

fn environment(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect()
}

fn read(text: &str, variables: &[(&str, &str)]) -> Result<Sample, ConfigError> {
    load_text(
        Some((Path::new("sample.toml"), text)),
        environment(variables),
    )
}

fn refusal(text: &str, variables: &[(&str, &str)]) -> String {
    read(text, variables).unwrap_err().to_string()
}

#[test]
fn a_file_is_read_and_the_rest_has_its_defaults() {
    let sample = read(TEXT, &[]).unwrap();
    assert_eq!(sample.listen.max_connections, 7);
    assert_eq!(sample.listen.max_handshakes, 64);
    assert_eq!(
        sample.listen.limits().handshake_timeout,
        Duration::from_secs(3)
    );
    assert_eq!(sample.limits.payload, ByteSize::mebibytes(128));
    assert_eq!(sample.limits.patience, Duration::from_secs(150));
    assert_eq!(sample.log, LogSection::default());
    assert_eq!(sample.tls.ca, PathBuf::from("ca.crt"));
}

#[test]
fn the_environment_goes_before_the_file() {
    let sample = read(
        TEXT,
        &[
            ("CONCORD__NAME", "south"),
            ("CONCORD__LIMITS__PAYLOAD", "1 MiB"),
            ("CONCORD__LIMITS__RETRIES", "9"),
            ("CONCORD__LIMITS__STRICT", "false"),
            ("CONCORD__LIMITS__RATIO", "0.25"),
            ("CONCORD__LOG__FORMAT", "json"),
            ("CONCORD__LISTEN__ADDRESS", "[::1]:7443"),
            ("CONCORD__FOLDERS", r#"["a", "b"]"#),
            ("PATH", "/bin"),
        ],
    )
    .unwrap();
    assert_eq!(sample.name, "south");
    assert_eq!(sample.limits.payload, ByteSize::mebibytes(1));
    assert_eq!(sample.limits.retries, 9);
    assert!(!sample.limits.strict);
    assert!((sample.limits.ratio - 0.25).abs() < f64::EPSILON);
    assert_eq!(sample.log.format, LogFormat::Json);
    assert_eq!(sample.listen.address, "[::1]:7443".parse().unwrap());
    assert_eq!(sample.folders, [PathBuf::from("a"), PathBuf::from("b")]);
    assert_eq!(sample.limits.patience, Duration::from_secs(150));
}

#[test]
fn a_whole_configuration_can_come_from_the_environment() {
    let sample: Sample = load_text(
        None,
        environment(&[
            ("CONCORD__NAME", "north"),
            ("CONCORD__LISTEN__ADDRESS", "127.0.0.1:1"),
            (
                "CONCORD__TLS",
                r#"{ certificate = "a", key = "b", ca = "c" }"#,
            ),
        ]),
    )
    .unwrap();
    assert_eq!(sample.tls.key, PathBuf::from("b"));
}

#[test]
fn an_unknown_key_is_named_with_its_file() {
    let error = refusal(&format!("{TEXT}\nretires = 3\n"), &[]);
    assert!(
        error.contains("retires") && error.contains("sample.toml"),
        "{error}"
    );
    let error = refusal(&format!("{TEXT}\n[extra]\na = 3\n"), &[]);
    assert!(error.contains("extra"), "{error}");
}

#[test]
fn an_unknown_key_in_the_environment_is_named_with_its_variable() {
    let error = refusal(TEXT, &[("CONCORD__TLS__CERTIFICAT", "x")]);
    assert!(error.contains("certificat"), "{error}");
    assert!(error.contains("CONCORD__TLS__CERTIFICAT"), "{error}");
}

#[test]
fn a_missing_key_is_named() {
    let error = refusal(&TEXT.replace("name = \"north\"", ""), &[]);
    assert!(
        error.contains("`name`") || error.contains("\"name\""),
        "{error}"
    );
    let error = refusal(&TEXT.replace("key = \"server.key\"", ""), &[]);
    assert!(error.contains("tls.key"), "{error}");
}

#[test]
fn a_value_of_the_wrong_kind_is_named_by_key() {
    for (from, to, key) in [
        (
            "max_connections = 7",
            "max_connections = \"many\"",
            "listen.max_connections",
        ),
        (
            "max_connections = 7",
            "max_connections = -1",
            "listen.max_connections",
        ),
        (
            "patience = \"2m 30s\"",
            "patience = \"soon\"",
            "limits.patience",
        ),
        (
            "payload = \"128 MiB\"",
            "payload = \"big\"",
            "limits.payload",
        ),
        (
            "address = \"127.0.0.1:0\"",
            "address = \"here\"",
            "listen.address",
        ),
    ] {
        let error = refusal(&TEXT.replace(from, to), &[]);
        assert!(error.contains(key), "{to}: {error}");
    }
    let error = refusal(TEXT, &[("CONCORD__LIMITS__RETRIES", "few")]);
    assert!(error.contains("limits.retries"), "{error}");
    assert!(error.contains("CONCORD__LIMITS__RETRIES"), "{error}");
}

#[test]
fn a_file_that_is_no_toml_is_refused_with_the_line() {
    let error = refusal("name = \"north\"\nlisten = [", &[]);
    assert!(
        error.contains("sample.toml") && error.contains("line 2"),
        "{error}"
    );
}

#[test]
fn a_variable_that_is_no_key_or_no_value_is_refused_by_name() {
    let error = refusal(TEXT, &[("CONCORD__TLS____KEY", "x")]);
    assert!(error.contains("CONCORD__TLS____KEY"), "{error}");
    let error = refusal(TEXT, &[("CONCORD__FOLDERS", "[\"a\"")]);
    assert!(error.contains("CONCORD__FOLDERS"), "{error}");
}

#[test]
fn a_missing_file_is_named() {
    let error = load::<Sample>(Some(Path::new("/nowhere/server.toml")), [])
        .unwrap_err()
        .to_string();
    assert!(error.contains("/nowhere/server.toml"), "{error}");
}

#[test]
fn a_file_on_disk_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("server.toml");
    std::fs::write(&path, TEXT).unwrap();
    let sample: Sample = load(Some(&path), []).unwrap();
    assert_eq!(sample, read(TEXT, &[]).unwrap());
}
