//! The systemd units, as far as they can be checked without systemd.

use super::*;

const UNITS: [(&str, &str); 3] = [
    (
        "concord-server",
        include_str!("../../../../deploy/systemd/concord-server.service"),
    ),
    (
        "concord-client",
        include_str!("../../../../deploy/systemd/concord-client.service"),
    ),
    (
        "concord-artaug",
        include_str!("../../../../deploy/systemd/concord-artaug.service"),
    ),
];

/// Directives that `systemd-analyze verify` has taken in these sections. A new one is added here after it has been verified.
const KNOWN: [(&str, &[&str]); 3] = [
    (
        "[Unit]",
        &[
            "Description",
            "Documentation",
            "After",
            "Wants",
            "StartLimitIntervalSec",
            "StartLimitBurst",
        ],
    ),
    (
        "[Service]",
        &[
            "Type",
            "NotifyAccess",
            "ExecStart",
            "WatchdogSec",
            "TimeoutStartSec",
            "TimeoutStopSec",
            "KillSignal",
            "KillMode",
            "Restart",
            "RestartSec",
            "RestartPreventExitStatus",
            "LoadCredential",
            "Environment",
            "User",
            "Group",
            "DynamicUser",
            "StateDirectory",
            "StateDirectoryMode",
            "CacheDirectory",
            "CacheDirectoryMode",
            "WorkingDirectory",
            "UMask",
            "ProtectSystem",
            "ProtectHome",
            "PrivateTmp",
            "PrivateMounts",
            "PrivateDevices",
            "DevicePolicy",
            "InaccessiblePaths",
            "NoExecPaths",
            "ExecPaths",
            "ProtectKernelTunables",
            "ProtectKernelModules",
            "ProtectKernelLogs",
            "ProtectControlGroups",
            "ProtectClock",
            "ProtectHostname",
            "ProtectProc",
            "ProcSubset",
            "PrivateUsers",
            "PrivateIPC",
            "RemoveIPC",
            "KeyringMode",
            "NoNewPrivileges",
            "CapabilityBoundingSet",
            "AmbientCapabilities",
            "RestrictSUIDSGID",
            "RestrictNamespaces",
            "RestrictRealtime",
            "LockPersonality",
            "MemoryDenyWriteExecute",
            "RestrictAddressFamilies",
            "SystemCallArchitectures",
            "SystemCallFilter",
            "SystemCallErrorNumber",
            "LimitNOFILE",
            "LimitCORE",
            "TasksMax",
            "CPUWeight",
            "OOMScoreAdjust",
            "OOMPolicy",
        ],
    ),
    ("[Install]", &["WantedBy"]),
];

/// Section, directive and value of each line that is no comment.
fn directives(unit: &'static str) -> Vec<(&'static str, &'static str, &'static str)> {
    let mut section = "";
    let mut found = Vec::new();
    for line in unit.lines().filter(|line| !line.is_empty()) {
        if line.starts_with('[') {
            section = line;
        } else if !line.starts_with('#') {
            let (name, value) = line.split_once('=').unwrap_or_else(|| panic!("{line}"));
            found.push((section, name, value));
        }
    }
    found
}

#[test]
fn the_units_have_no_directive_that_was_not_verified() {
    for (name, unit) in UNITS {
        for (section, directive, _) in directives(unit) {
            let known = KNOWN.iter().find(|(known, _)| *known == section);
            assert!(
                known.is_some_and(|(_, names)| names.contains(&directive)),
                "{name}: {section} {directive}"
            );
        }
    }
}

#[test]
fn the_units_agree_with_the_programs() {
    for (name, unit) in UNITS {
        let all = directives(unit);
        let values = |wanted: &str| -> Vec<&str> {
            all.iter()
                .filter(|(_, directive, _)| *directive == wanted)
                .map(|(_, _, value)| *value)
                .collect()
        };
        let side = name.trim_start_matches("concord-");
        assert_eq!(
            values("ExecStart"),
            [format!(
                "/usr/bin/{name} run --config /etc/concord/{side}.toml"
            )]
        );
        assert_eq!(values("Type"), ["notify"]);
        assert_eq!(
            values("RestartPreventExitStatus"),
            [EXIT_CONFIG.to_string()],
            "{name}: a temporary failure is tried again"
        );
        assert_eq!(values("Restart"), ["on-failure"]);
        let environment = values("Environment");
        for wanted in [
            "CONCORD__TLS__CA=%d/ca.crt".to_owned(),
            format!("CONCORD__TLS__CERTIFICATE=%d/{side}.crt"),
            format!("CONCORD__TLS__KEY=%d/{side}.key"),
            "MALLOC_ARENA_MAX=2".to_owned(),
        ] {
            assert!(environment.contains(&wanted.as_str()), "{name}: {wanted}");
        }
        for file in [
            "ca.crt".to_owned(),
            format!("{side}.crt"),
            format!("{side}.key"),
        ] {
            let credential = format!("{file}:/etc/concord/pki/{file}");
            assert!(
                values("LoadCredential").contains(&credential.as_str()),
                "{name}: {credential}"
            );
        }
    }
}

#[test]
fn the_clients_unit_overrides_keys_that_the_configuration_has() {
    let silo = Silo::new(Role::Silo);
    let text = fs::read_to_string(silo.config()).unwrap();
    let overrides: Vec<(String, String)> = directives(UNITS[1].1)
        .into_iter()
        .filter(|(_, directive, value)| *directive == "Environment" && value.starts_with("CONCORD"))
        .map(|(_, _, value)| {
            let (name, value) = value.split_once('=').unwrap();
            (name.to_owned(), value.to_owned())
        })
        .collect();
    assert_eq!(overrides.len(), 5);
    let file = (Path::new("client.toml"), text.as_str());
    let config: ClientConfig = concord_common::config::load_text(Some(file), overrides).unwrap();
    assert_eq!(config.tls.key, Path::new("%d/client.key"));
    assert_eq!(config.state.folder, Path::new("%S/concord-client"));
    let cache = config.cache.folder.as_deref();
    assert_eq!(cache, Some(Path::new("%C/concord-client")));
}
