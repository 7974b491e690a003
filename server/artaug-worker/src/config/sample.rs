//! The commented sample of the configuration.

use std::collections::BTreeSet;

use concord_artaug::endpoint::EndpointSettings;

use super::*;

const SAMPLE: &str = include_str!("../../../../deploy/config/artaug-worker.toml");

fn read(text: &str) -> WorkerConfig {
    let path = Path::new("/etc/concord/artaug-worker.toml");
    let config: WorkerConfig = config::load_text(Some((path, text)), Vec::new()).unwrap();
    config.settled(Path::new("/etc/concord")).unwrap()
}

/// The sample with the settings that it shows as comments: lines such as `# key = value` and `# [section]`.
fn with_comments() -> String {
    let is_setting = |line: &str| {
        line.starts_with("[data")
            || line.starts_with("[allowed")
            || line.split_once(" = ").is_some_and(|(key, _)| {
                key.bytes()
                    .all(|byte| byte.is_ascii_lowercase() || byte == b'_')
            })
    };
    SAMPLE
        .lines()
        .map(|line| match line.strip_prefix("# ") {
            Some(setting) if is_setting(setting) => setting,
            _ => line,
        })
        .fold(String::new(), |text, line| text + line + "\n")
}

#[test]
fn the_sample_is_accepted_and_says_the_defaults() {
    let config = read(SAMPLE);
    assert_eq!(config.limits, LimitsSection::default());
    assert_eq!(config.log, LogSection::default());
    assert_eq!(config.server.request_timeout, default_request_timeout());
    assert_eq!(config.server.max_backoff, default_max_backoff());
    // Whoever installs it as it stands lets jobs call nothing.
    assert!(config.allowed.endpoints.is_empty());
    assert!(config.federation.is_none() && config.data.icons.is_none());
}

#[test]
fn the_sample_shows_every_setting() {
    let text = with_comments();
    let config = read(&text);
    assert_eq!(config.federation.as_deref(), Some("example"));
    assert_eq!(config.limits.gpu, Some(0));
    let endpoint = &config.allowed.endpoints["vision"];
    assert_eq!(endpoint.requests_per_minute, Some(60));
    assert!(endpoint.key_file.is_some() && endpoint.ca_file.is_some());
    let defaults = EndpointSettings {
        key_file: endpoint.key_file.clone(),
        ca_file: endpoint.ca_file.clone(),
        requests_per_minute: endpoint.requests_per_minute,
        ..EndpointSettings::new(&endpoint.url)
    };
    assert_eq!(*endpoint, defaults);
    assert!(config.data.icons.is_some() && config.data.brisque.is_some());
    assert!(config.data.image_text.is_some());

    // Every field of the structs that settings are read into.
    let shown: BTreeSet<&str> = text
        .lines()
        .filter_map(|line| Some(line.split_once(" = ")?.0))
        .chain(text.lines().filter(|line| line.starts_with('[')))
        .flat_map(|line| line.trim_matches(['[', ']']).split('.'))
        .collect();
    let sources = [
        include_str!("../config.rs"),
        include_str!("../../../artaug/src/endpoint/settings.rs"),
    ];
    let fields: Vec<&str> = sources
        .iter()
        .flat_map(|source| source.lines())
        .filter_map(|line| line.strip_prefix("    pub ")?.split_once(": "))
        .map(|(name, _)| name)
        .filter(|name| !name.contains([' ', '(']))
        .collect();
    assert!(fields.len() > 25, "{fields:?}");
    for field in fields {
        assert!(shown.contains(field), "the sample does not show `{field}`");
    }
}
