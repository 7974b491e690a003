use std::path::Path;

use concord_common::{
    config::load_text,
    job::{JobSpec, Submission},
};

use super::*;

const SAMPLE: &str = include_str!("../../../deploy/config/server.toml");
const MINIMAL: &str = r#"
federation = "north"
state_dir = "/var/lib/concord"
[listen]
address = "127.0.0.1:7600"
[tls]
certificate = "server.crt"
key = "server.key"
ca = "ca.crt"
"#;

fn parse(text: &str) -> Result<ServerConfig, InvalidConfig> {
    let config: ServerConfig = load_text(Some((Path::new("server.toml"), text)), [])?;
    config.check()?;
    Ok(config)
}

#[test]
fn the_sample_is_accepted_and_shows_the_defaults() {
    let sample = parse(SAMPLE).unwrap();
    let minimal = parse(MINIMAL).unwrap();
    assert_eq!(sample.limits, minimal.limits);
    assert_eq!(sample.spool, minimal.spool);
    assert_eq!(sample.jobs, minimal.jobs);
    assert_eq!(sample.workers, minimal.workers);
    assert_eq!(sample.retention, minimal.retention);
    assert_eq!(sample.ops, minimal.ops);
    assert_eq!(sample.log, minimal.log);
    assert_eq!(sample.durability, minimal.durability);
    assert_eq!(sample.enrollment, minimal.enrollment);
    assert_eq!(sample.stop_timeout, minimal.stop_timeout);
}

#[test]
fn the_sample_comments_every_setting() {
    let mut commented = false;
    for line in SAMPLE.lines() {
        let is_setting = line.contains(" = ") && !line.starts_with('#');
        assert!(!is_setting || commented, "no comment above: {line}");
        commented = line.starts_with('#');
    }
}

#[test]
fn an_unknown_key_is_named() {
    for (text, key) in [
        (format!("colour = 1\n{MINIMAL}"), "colour"),
        (
            format!("{MINIMAL}\n[limits]\nmax_transfer = 1"),
            "max_transfer",
        ),
        (format!("{MINIMAL}\n[jobs]\nmax = 1"), "max"),
        (format!("{MINIMAL}\n[ops]\nlisten = 1"), "listen"),
    ] {
        let error = parse(&text).unwrap_err().to_string();
        assert!(error.contains(key), "{error}");
    }
}

#[test]
fn a_value_out_of_range_is_named() {
    for (text, key) in [
        (
            format!("{MINIMAL}\n[limits]\nmax_transfers = 0"),
            "limits.max_transfers",
        ),
        (
            format!("{MINIMAL}\n[limits]\nchunk_size = \"2 MiB\""),
            "limits.chunk_size",
        ),
        (format!("{MINIMAL}\n[jobs]\nlease = \"1ms\""), "jobs.lease"),
        (
            format!("{MINIMAL}\n[retention]\nversions = 1"),
            "retention.versions",
        ),
        (
            format!("{MINIMAL}\n[workers]\nmax_running = 0"),
            "workers.max_running",
        ),
        (
            format!("{MINIMAL}\n[workers]\nlease = \"1ms\""),
            "workers.lease",
        ),
        (
            format!("{MINIMAL}\n[workers]\nmax_disk = \"1 kB\""),
            "workers.max_disk",
        ),
        (
            format!("{MINIMAL}\n[workers]\nmax_total_disk = \"1 kB\""),
            "workers.max_total_disk",
        ),
        (format!("{MINIMAL}\n[log]\nfilter = \"=,=\""), "log.filter"),
        (MINIMAL.replace("north", "North!"), "federation"),
    ] {
        let error = parse(&text).unwrap_err().to_string();
        assert!(error.contains(key), "{error}");
    }
}

#[test]
fn a_variable_overrides_the_file() {
    let variable = ("CONCORD__JOBS__MAX_RUNNING".to_owned(), "7".to_owned());
    let config: ServerConfig =
        load_text(Some((Path::new("server.toml"), MINIMAL)), [variable]).unwrap();
    assert_eq!(config.jobs.max_running, 7);
}

#[test]
fn a_worker_needs_its_program_and_its_configuration() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name).display().to_string();
    let with = |program: &str, config: &str| {
        let (program, config) = (file(program), file(config));
        parse(&format!(
            "{MINIMAL}\n[workers]\nprogram = \"{program}\"\nconfig = \"{config}\""
        ))
    };
    for name in ["worker", "worker.toml"] {
        std::fs::write(file(name), "").unwrap();
    }
    let command = with("worker", "worker.toml")
        .unwrap()
        .workers
        .command()
        .unwrap();
    assert_eq!(command.program.display().to_string(), file("worker"));
    for (program, config, key) in [
        ("no-worker", "worker.toml", "workers.program"),
        ("worker", "no-file.toml", "workers.config"),
    ] {
        let error = with(program, config).unwrap_err().to_string();
        assert!(error.contains(key), "{error}");
        assert!(error.contains(&file("no-")), "{error}");
    }
    // Without a configuration none is started, whatever the program.
    let none = parse(&format!("{MINIMAL}\n[workers]\nprogram = \"/none\"")).unwrap();
    assert_eq!(none.workers.command(), None);
    // The worker stands beside the server's program unless something else is said.
    let beside = WorkersSection {
        config: Some("worker.toml".into()),
        ..WorkersSection::default()
    };
    let own = std::env::current_exe().unwrap();
    let program = beside.command().unwrap().program;
    assert_eq!(program, own.with_file_name("concord-artaug"));
}

#[test]
fn a_workers_configuration_beside_the_servers_is_taken_if_its_program_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    let own = file("server.toml");
    let program = file("worker");
    let text = format!("{MINIMAL}\n[workers]\nprogram = \"{}\"", program.display());
    std::fs::write(&own, text).unwrap();
    let command = || {
        let config = ServerConfig::load(Some(&own), []).unwrap();
        config.workers.command().map(|command| command.config)
    };
    assert_eq!(command(), None);
    std::fs::write(file("artaug-worker.toml"), "").unwrap();
    assert_eq!(command(), None);
    std::fs::write(&program, "").unwrap();
    assert_eq!(command(), Some(file("artaug-worker.toml")));
    // What the server's own file says goes first.
    std::fs::write(file("other.toml"), "").unwrap();
    let other = format!("config = \"{}\"", file("other.toml").display());
    let text = std::fs::read_to_string(&own).unwrap();
    std::fs::write(&own, format!("{text}\n{other}")).unwrap();
    assert_eq!(command(), Some(file("other.toml")));
}

#[test]
fn every_sample_job_is_accepted() {
    Submission::parse(include_str!("../../../deploy/artaug/job.toml")).unwrap();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/config/jobs");
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        JobSpec::parse(&text).unwrap_or_else(|refusal| panic!("{}: {refusal}", path.display()));
        names.push(path);
    }
    assert!(names.len() >= 2, "{names:?}");
}
