use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

use concord_common::{
    Clock as _, Role, SpiffeId, SystemClock, error_text, pki::CertificateAuthority,
};

use super::*;
use crate::{
    config::ClientConfig,
    testing::{tiny_backbone, write_toy_task},
};

mod units;

/// A silo's folder with everything that a configuration names.
struct Silo {
    folder: tempfile::TempDir,
}

impl Silo {
    fn new(role: Role) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let now = SystemClock.now();
        let ca = CertificateAuthority::create("north", now, 30).unwrap();
        let id = SpiffeId::new("north", role, "clinic-a").unwrap();
        let issued = ca.issue(&id, &[], &[], now, DAY).unwrap();
        issued.write(folder.path(), true).unwrap();
        ca.write(folder.path(), true).unwrap();
        write_toy_task(&folder.path().join("data"), 1);
        let silo = Self { folder };
        let name = format!("{role}-clinic-a");
        silo.configure(&format!(
            r#"
[server]
address = "localhost:7443"
[tls]
certificate = "{name}.crt"
key = "{name}.key"
ca = "ca.crt"
[state]
folder = "state"
[[backbone]]
name = "tiny"
path = "{}"
[[task]]
name = "toy"
format = "csv"
train = "data/train.csv"
validation = "data/validation.csv"
test = "data/test.csv"
"#,
            tiny_backbone().display()
        ));
        silo
    }

    fn config(&self) -> PathBuf {
        self.folder.path().join("client.toml")
    }

    fn configure(&self, text: &str) {
        fs::write(self.config(), text).unwrap();
    }

    fn change(&self, from: &str, to: &str) {
        let text = fs::read_to_string(self.config()).unwrap();
        assert!(text.contains(from), "{from}");
        self.configure(&text.replace(from, to));
    }

    /// The exit code and what is said of a configuration that is refused.
    fn refused(&self) -> (u8, String) {
        let error = check_config(&self.config(), &mut Vec::new()).unwrap_err();
        (error.exit_code(), error_text(&error))
    }
}

const DAY: std::time::Duration = std::time::Duration::from_hours(24);

#[test]
fn a_good_configuration_is_shown_with_all_that_it_names() {
    let mut out = Vec::new();
    check_config(&Silo::new(Role::Silo).config(), &mut out).unwrap();
    let text = String::from_utf8(out).unwrap();
    for wanted in [
        "spiffe://north/silo/clinic-a",
        "https://localhost:7443",
        "tiny: ",
        "toy: 40 training, 12 validation, 12 test rows; 3 classes",
        "the configuration is acceptable",
    ] {
        assert!(text.contains(wanted), "{wanted}: {text}");
    }
}

#[test]
fn a_backbone_that_is_not_there_is_a_fault_of_the_configuration_with_key_and_path() {
    let silo = Silo::new(Role::Silo);
    let backbone = tiny_backbone();
    silo.change(&backbone.display().to_string(), "models/none");
    let (code, text) = silo.refused();
    assert_eq!(code, EXIT_CONFIG);
    let path = silo.folder.path().join("models/none");
    assert!(
        text.contains("`backbone.path` of backbone `tiny`")
            && text.contains(&path.display().to_string()),
        "{text}"
    );
    // An empty folder, and one whose configuration is of no known family.
    fs::create_dir_all(&path).unwrap();
    let (code, text) = silo.refused();
    assert_eq!(code, EXIT_CONFIG);
    assert!(text.contains("config.json"), "{text}");
    for file in ["model.safetensors", "tokenizer.json"] {
        fs::write(path.join(file), "").unwrap();
    }
    fs::write(path.join("config.json"), "{\"model_type\": \"gpt9\"}").unwrap();
    let (code, text) = silo.refused();
    assert_eq!(code, EXIT_CONFIG);
    assert!(text.contains("gpt9"), "{text}");
}

#[test]
fn what_is_wrong_is_told_once() {
    let silo = Silo::new(Role::Silo);
    silo.change("\"ca.crt\"", "\"no-ca.crt\"");
    let (code, text) = silo.refused();
    assert_eq!(code, EXIT_CONFIG);
    assert_eq!(text.matches("os error 2").count(), 1, "{text}");
    assert!(text.contains("no-ca.crt"), "{text}");
}

#[test]
fn data_that_cannot_be_used_is_refused_with_the_task() {
    let silo = Silo::new(Role::Silo);
    silo.change("data/train.csv", "data/none.csv");
    let (code, text) = silo.refused();
    assert_eq!(code, EXIT_CONFIG);
    assert!(
        text.contains("`toy`") && text.contains("data/none.csv"),
        "{text}"
    );
    silo.change("data/none.csv", "data");
    let (code, text) = silo.refused();
    assert_eq!(code, EXIT_CONFIG);
    assert!(text.contains("irectory"), "{text}");
    fs::write(silo.folder.path().join("empty.csv"), "").unwrap();
    silo.change("\"data\"", "\"empty.csv\"");
    let (_, text) = silo.refused();
    assert!(
        text.contains("empty.csv") && text.contains("the file is empty"),
        "{text}"
    );
}

#[test]
fn a_label_that_is_not_known_is_told_at_the_terminal() {
    let silo = Silo::new(Role::Silo);
    let test = silo.folder.path().join("data/test.csv");
    fs::write(&test, "text,label\nthe rain,whether\n").unwrap();
    let (code, text) = silo.refused();
    assert_eq!(code, EXIT_CONFIG);
    assert!(
        text.contains("test.csv:2") && text.contains("\"whether\""),
        "{text}"
    );
    let label = DataError::UnseenLabel {
        file: test,
        line: 2,
        label: "whether".to_owned(),
    };
    let text = error_text(&CommandError::from(label));
    assert_eq!(text.matches("whether").count(), 1, "{text}");
    assert_eq!(text.matches("test.csv").count(), 1, "{text}");
}

#[test]
fn a_state_folder_that_is_none_or_open_to_others_is_refused() {
    let silo = Silo::new(Role::Silo);
    let state = silo.folder.path().join("state");
    fs::create_dir(&state).unwrap();
    fs::set_permissions(&state, fs::Permissions::from_mode(0o750)).unwrap();
    let (code, text) = silo.refused();
    assert_eq!(code, EXIT_CONFIG);
    assert!(
        text.contains("`state.folder`") && text.contains("(mode 750)"),
        "{text}"
    );
    silo.change("\"state\"", "\"client.toml\"");
    let (code, text) = silo.refused();
    assert_eq!(code, EXIT_CONFIG);
    assert!(text.contains("it is no folder"), "{text}");
}

#[tokio::test]
async fn a_cache_folder_in_which_no_file_can_be_made_is_refused_by_the_daemon_too() {
    let silo = Silo::new(Role::Silo);
    silo.change("[state]", "[cache]\nfolder = \"cache\"\n[state]");
    let cache = silo.folder.path().join("cache");
    // It is not there; then it is no folder.
    for made in [false, true] {
        if made {
            fs::write(&cache, "").unwrap();
        }
        let started = Box::pin(run(&silo.config())).await.unwrap_err();
        let started = (started.exit_code(), error_text(&started));
        for (code, text) in [silo.refused(), started] {
            assert_eq!(code, EXIT_CONFIG);
            assert!(
                text.contains("`cache.folder`") && text.contains(&cache.display().to_string()),
                "{text}"
            );
        }
    }
    // A cache that is off needs none.
    silo.change("[cache]", "[cache]\nenabled = false");
    check_config(&silo.config(), &mut Vec::new()).unwrap();
    silo.change("enabled = false", "enabled = true");
    fs::remove_file(&cache).unwrap();
    fs::create_dir(&cache).unwrap();
    check_config(&silo.config(), &mut Vec::new()).unwrap();
}

#[test]
fn a_certificate_of_another_role_is_refused() {
    let (code, text) = Silo::new(Role::Operator).refused();
    assert_eq!(code, EXIT_CONFIG);
    assert!(
        text.contains("spiffe://north/operator/clinic-a") && text.contains("silo"),
        "{text}"
    );
}

#[test]
fn a_state_folder_in_use_is_tried_again_and_a_bad_configuration_is_not() {
    let busy = CommandError::Busy("/var/lib/concord-client".into());
    assert_eq!(busy.exit_code(), EXIT_TEMPORARY);
    assert!(busy.to_string().contains("/var/lib/concord-client"));
    assert_eq!(CommandError::Unfit(String::new()).exit_code(), EXIT_CONFIG);
}

#[test]
fn a_reader_that_has_gone_is_no_failure() {
    let output = |kind: io::ErrorKind| CommandError::Output(kind.into());
    assert!(output(io::ErrorKind::BrokenPipe).is_closed_output());
    assert!(!output(io::ErrorKind::StorageFull).is_closed_output());
    assert_eq!(output(io::ErrorKind::StorageFull).exit_code(), 1);
}

#[test]
fn the_page_lists_the_exit_codes() {
    let page = include_str!("../../../docs/configuration.md");
    let table = page
        .split_once("| Exit code of `concord-client` | Meaning |")
        .expect("the page has the table")
        .1;
    let listed: Vec<u8> = table
        .lines()
        .skip(2)
        .take_while(|line| line.starts_with('|'))
        .map(|line| line.split('`').nth(1).unwrap().parse().unwrap())
        .collect();
    // 2 is clap's for wrong usage.
    assert_eq!(
        listed,
        [
            0,
            1,
            2,
            state::EXIT_NOT_RUNNING,
            EXIT_TEMPORARY,
            EXIT_CONFIG
        ]
    );
}
