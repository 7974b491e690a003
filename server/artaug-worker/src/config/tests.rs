use super::*;

const MINIMAL: &str = r#"
state_dir = "state"
[server]
address = "localhost:7600"
[tls]
certificate = "pki/worker.crt"
key = "pki/worker.key"
ca = "/etc/ca.crt"
"#;

fn read(text: &str) -> Result<WorkerConfig, SettingsError> {
    let path = Path::new("/etc/concord/worker.toml");
    let config: WorkerConfig = config::load_text(Some((path, text)), Vec::new())?;
    config.settled(Path::new("/etc/concord"))
}

#[test]
fn a_short_file_is_enough_and_its_paths_begin_at_its_folder() {
    let config = read(MINIMAL).unwrap();
    assert_eq!(config.limits, LimitsSection::default());
    assert_eq!(config.state_dir, Path::new("/etc/concord/state"));
    assert_eq!(config.tls.key, Path::new("/etc/concord/pki/worker.key"));
    assert_eq!(config.tls.ca, Path::new("/etc/ca.crt"));
    assert_eq!(config.server_url(), "https://localhost:7600");
    assert!(config.allowed.model_folders.is_empty() && config.data.icons.is_none());
}

#[test]
fn every_setting_can_be_said() {
    let text = format!(
        "federation = \"hub\"\n{MINIMAL}
[allowed]
model_folders = [\"models\"]
prompt_folders = [\"/prompts\"]
[allowed.endpoints.vision]
url = \"http://127.0.0.1:8000/v1\"
key_file = \"vision.key\"
[data]
icons = \"icons\"
brisque = \"brisque.json\"
[data.image_text]
vision = \"a\"
text = \"b\"
projections = \"c\"
[limits]
threads = 2
helpers = 3
memory = \"1 GiB\"
nice = 5
disk = \"2 GiB\"
stop_within = \"5s\"
gpu = 0
[log]
filter = \"debug\""
    );
    let config = read(&text).unwrap();
    let here = |name: &str| Path::new("/etc/concord").join(name);
    assert_eq!(config.allowed.model_folders, [here("models")]);
    assert_eq!(config.allowed.prompt_folders, [Path::new("/prompts")]);
    let endpoint = &config.allowed.endpoints["vision"];
    assert_eq!(endpoint.key_file, Some(here("vision.key")));
    assert_eq!(config.data.icons, Some(here("icons")));
    assert_eq!(config.data.image_text.unwrap().projections, here("c"));
    assert_eq!(config.limits.stop_within, Duration::from_secs(5));
    assert_eq!((config.limits.threads, config.limits.gpu), (2, Some(0)));
}

#[test]
fn what_cannot_be_is_refused_with_its_key() {
    for (addition, key) in [
        ("[limits]\nthreads = 0", "limits.threads"),
        ("[limits]\nhelpers = 0", "limits.helpers"),
        ("[limits]\nmemory = \"1 MiB\"", "limits.memory"),
        ("[limits]\nnice = -5", "limits.nice"),
        ("[limits]\ndisk = \"1 KiB\"", "limits.disk"),
        ("[limits]\nstop_within = \"2h\"", "limits.stop_within"),
        ("[limits]\ncores = 2", "cores"),
        ("[log]\nfilter = \"=,=\"", "log.filter"),
        ("[models]\nfolders = []", "models"),
        ("[allowed]\nfolders = []", "folders"),
        (
            "[allowed.endpoints.vision]\nurl = \"http://x\"\nkey = \"secret\"",
            "key",
        ),
    ] {
        let error = read(&format!("{MINIMAL}\n{addition}")).unwrap_err();
        let text = error.to_string();
        assert!(text.contains(key), "{addition}: {text}");
    }
    let error = read(&MINIMAL.replace("localhost:7600", "https://localhost")).unwrap_err();
    assert!(error.to_string().contains("server.address"), "{error}");
}
