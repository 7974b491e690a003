use super::*;

const SAMPLE: &str = include_str!("../../../deploy/config/client.toml");

const MINIMAL: &str = r#"
[server]
address = "localhost:7600"
[tls]
certificate = "pki/silo.crt"
key = "pki/silo.key"
ca = "/etc/ca.crt"
[state]
folder = "state"
[[backbone]]
name = "tiny"
path = "models/tiny"
[[task]]
name = "main"
format = "csv"
train = "train.csv"
validation = "validation.csv"
test = "/data/test.csv"
"#;

fn read(text: &str) -> Result<ClientConfig, SettingsError> {
    let path = Path::new("/etc/concord/client.toml");
    let config: ClientConfig = config::load_text(Some((path, text)), Vec::new())?;
    config.settled(Path::new("/etc/concord"))
}

fn refused(text: &str) -> String {
    read(text).unwrap_err().to_string()
}

#[test]
fn the_sample_is_accepted_and_shows_every_setting_with_its_default() {
    let config = read(SAMPLE).unwrap();
    assert_eq!(config.server.poll_interval, default_poll_interval());
    assert_eq!(config.server.request_timeout, default_request_timeout());
    assert_eq!(config.server.max_backoff, default_max_backoff());
    assert_eq!(config.torch.threads, TorchSection::default().threads);
    assert_eq!(
        CacheSection {
            folder: None,
            ..config.cache
        },
        CacheSection::default()
    );
    assert_eq!(
        EgressSection {
            max_update_norm: None,
            ..config.egress
        },
        EgressSection::default()
    );
    assert_eq!(config.log, LogSection::default());
    assert_eq!(config.tasks.len(), 3);
    for key in [
        "address",
        "poll_interval",
        "request_timeout",
        "max_backoff",
        "certificate",
        "key",
        "ca",
        "folder",
        "threads",
        "enabled",
        "memory",
        "folder_size",
        "max_bytes_per_job",
        "max_update_norm",
        "metrics",
        "algorithms",
        "max_rounds",
        "shared_head",
        "format",
        "filter",
        "name",
        "path",
        "kind",
        "problem",
        "delimiter",
        "columns.text",
        "columns.text_b",
        "columns.label",
        "train",
        "validation",
        "test",
        "file",
        "split",
        "max_bad_rows",
    ] {
        let shown = SAMPLE.lines().any(|line| {
            line.trim_start_matches(['#', ' '])
                .starts_with(&format!("{key} ="))
        });
        assert!(shown, "the sample does not show `{key}`");
    }
}

#[test]
fn relative_paths_start_at_the_files_folder() {
    let config = read(MINIMAL).unwrap();
    assert_eq!(
        config.tls.certificate,
        Path::new("/etc/concord/pki/silo.crt")
    );
    assert_eq!(config.tls.ca, Path::new("/etc/ca.crt"));
    assert_eq!(config.state.folder, Path::new("/etc/concord/state"));
    assert_eq!(
        config.backbones[0].path,
        Path::new("/etc/concord/models/tiny")
    );
    match &config.tasks[0].files {
        Files::PerSplit { train, test, .. } => {
            assert_eq!(train, Path::new("/etc/concord/train.csv"));
            assert_eq!(test, Path::new("/data/test.csv"));
        }
        other @ Files::One { .. } => panic!("{other:?}"),
    }
    assert_eq!(config.server_url(), "https://localhost:7600");
}

#[test]
fn an_unknown_key_is_named_in_every_section() {
    for section in ["server", "tls", "state"] {
        let text = MINIMAL.replace(&format!("[{section}]"), &format!("[{section}]\ncolour = 1"));
        assert!(refused(&text).contains("colour"), "{section}");
    }
    for more in [
        "[torch]",
        "[cache]",
        "[egress]",
        "[policy]",
        "[log]",
        "[[backbone]]",
        "[[task]]",
    ] {
        let text = format!("{MINIMAL}\n{more}\ncolour = 1");
        assert!(
            refused(&text).contains("colour"),
            "{more}: {}",
            refused(&text)
        );
    }
}

#[test]
fn each_bad_value_is_refused_with_its_key() {
    let task = |from: &str, to: &str| refused(&MINIMAL.replace(from, to));
    assert!(task("test = \"/data/test.csv\"", "").contains("`train`"));
    assert!(task("train = \"train.csv\"", "file = \"all.csv\"").contains("`train`"));
    assert!(
        task("format = \"csv\"", "format = \"csv\"\nkind = \"pair\"").contains("columns.text_b")
    );
    assert!(
        task(
            "format = \"csv\"",
            "format = \"csv\"\ncolumns.text_b = \"b\""
        )
        .contains("columns.text_b")
    );
    assert!(
        task(
            "format = \"csv\"",
            "format = \"csv\"\ncolumns.text = \"label\""
        )
        .contains("columns")
    );
    assert!(task("format = \"csv\"", "format = \"csv\"\ndelimiter = \"x\"").contains("delimiter"));
    assert!(task("format = \"csv\"", "format = \"csv\"\nsplit = {}").contains("split"));
    assert!(task("format = \"csv\"", "format = \"excel\"").contains("excel"));
    assert!(task("name = \"main\"", "").contains("task.name"));
    let more = |text: &str| refused(&format!("{MINIMAL}\n{text}"));
    for address in [
        "host",
        "host:",
        ":7443",
        "host:0",
        "host:70000",
        "https://host:7443",
        "host:7443/x",
        "::1:7443",
        "[::1]",
        "user@host:1",
    ] {
        let error = task("localhost:7600", address);
        assert!(
            error.contains("`server.address`") && error.contains(address),
            "{error}"
        );
    }
    for address in [
        "host:7443",
        "a.b-c.example:1",
        "10.0.0.1:7443",
        "[::1]:7443",
    ] {
        read(&MINIMAL.replace("localhost:7600", address)).unwrap();
    }
    assert!(more("[torch]\nthreads = 0").contains("torch.threads"));
    assert!(more("[egress]\nmax_update_norm = 0.0").contains("max_update_norm"));
    assert!(more("[egress]\nmax_update_norm = nan").contains("max_update_norm"));
    assert!(more("[[backbone]]\nname = \"tiny\"\npath = \"x\"").contains("two backbones"));
    let twice = "[[task]]\nname = \"main\"\nformat = \"csv\"\nfile = \"a\"\nsplit = {}";
    assert!(more(twice).contains("two tasks"));
    assert!(more(&twice.replace("split = {}", "")).contains("split"));
    assert!(more(&twice.replace("{}", "{ validation = 0.6, test = 0.4 }")).contains("split"));
}

#[test]
fn the_environment_overrides_the_file() {
    let path = Path::new("client.toml");
    let variables = vec![(
        "CONCORD__STATE__FOLDER".to_owned(),
        "/var/lib/concord-client".to_owned(),
    )];
    let config: ClientConfig = config::load_text(Some((path, MINIMAL)), variables).unwrap();
    assert_eq!(config.state.folder, Path::new("/var/lib/concord-client"));
}
