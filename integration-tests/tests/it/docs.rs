//! The documentation and the code name the same things.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use concord_common::{
    ErrorCode,
    job::artaug::ArtaugSpec,
    telemetry::names::{self, Kind},
};
use prost::Message as _;
use prost_types::FileDescriptorSet;

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// A file of the repository.
pub(super) fn read(path: &str) -> String {
    fs::read_to_string(repository().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The cells of a Markdown table's rows below the header whose first cell is `first`.
fn table(text: &str, first: &str) -> Vec<Vec<String>> {
    let cells = |line: &str| -> Vec<String> {
        line.trim()
            .trim_matches('|')
            .split('|')
            .map(|cell| cell.trim().to_owned())
            .collect()
    };
    let rows: Vec<Vec<String>> = text
        .lines()
        .skip_while(|line| !line.starts_with(&format!("| {first} |")))
        .skip(2)
        .take_while(|line| line.starts_with('|'))
        .map(cells)
        .collect();
    assert!(!rows.is_empty(), "no table that begins with `{first}`");
    rows
}

/// What stands between backticks.
fn quoted(text: &str) -> Vec<String> {
    text.split('`')
        .skip(1)
        .step_by(2)
        .map(str::to_owned)
        .collect()
}

#[test]
fn the_protocol_page_lists_every_error_code_with_its_grpc_code() {
    let rows = table(&read("docs/protocol.md"), "Code");
    let documented: Vec<(String, String)> = rows
        .iter()
        .map(|row| (row[0].trim_matches('`').to_owned(), row[1].clone()))
        .collect();
    let real: Vec<(String, String)> = ErrorCode::ALL
        .iter()
        .map(|code| {
            let name: String = format!("{:?}", code.grpc_code())
                .chars()
                .enumerate()
                .flat_map(|(index, letter)| {
                    let gap = (index > 0 && letter.is_uppercase()).then_some('_');
                    gap.into_iter().chain(letter.to_uppercase())
                })
                .collect();
            (code.as_str().to_owned(), name)
        })
        .collect();
    assert_eq!(documented, real);
}

#[test]
fn the_protocol_page_lists_every_rpc() {
    let rows = table(&read("docs/protocol.md"), "Service");
    let documented: BTreeSet<String> = rows
        .iter()
        .filter(|row| row[0].contains("concord.v1"))
        .flat_map(|row| quoted(&row[2]))
        .collect();
    let descriptors = FileDescriptorSet::decode(concord_proto::FILE_DESCRIPTOR_SET).unwrap();
    let real: BTreeSet<String> = descriptors
        .file
        .iter()
        .filter(|file| file.package() == "concord.v1")
        .flat_map(|file| &file.service)
        .flat_map(|service| &service.method)
        .map(|method| method.name().to_owned())
        .collect();
    assert_eq!(documented, real);
}

#[test]
fn the_metrics_page_lists_every_metric() {
    let rows = table(&read("docs/metrics.md"), "Metric");
    let documented: Vec<(String, String)> = rows
        .iter()
        .map(|row| (row[0].trim_matches('`').to_owned(), row[1].clone()))
        .collect();
    let real: Vec<(String, String)> = names::ALL
        .iter()
        .map(|metric| {
            let kind = match metric.kind {
                Kind::Counter => "counter",
                Kind::Gauge => "gauge",
                Kind::Histogram => "histogram",
            };
            (metric.name.to_owned(), kind.to_owned())
        })
        .collect();
    assert_eq!(documented, real);
}

/// The keys of a commented sample, those in comments included: `# key = value` is a setting without a default.
fn sample_keys(path: &str) -> BTreeSet<String> {
    let mut section = String::new();
    let mut keys = BTreeSet::new();
    for line in read(path).lines() {
        let line = line.strip_prefix("# ").unwrap_or(line);
        if let Some(name) = line.strip_prefix('[') {
            name.trim_matches(['[', ']']).clone_into(&mut section);
        } else if let Some((key, _)) = line.split_once(" = ")
            && key
                .bytes()
                .all(|b| b.is_ascii_lowercase() || matches!(b, b'_' | b'.'))
        {
            let dot = if section.is_empty() { "" } else { "." };
            keys.insert(format!("{section}{dot}{key}"));
        }
    }
    assert!(keys.len() > 20, "{path}: {keys:?}");
    keys
}

/// What a page says under a heading.
fn part(page: &str, heading: &str) -> String {
    let page = read(page);
    let (_, rest) = page.split_once(&format!("\n## {heading}\n")).unwrap();
    rest.split("\n## ").next().unwrap().to_owned()
}

/// The keys that the page about configuration describes under a heading.
fn documented_keys(heading: &str) -> BTreeSet<String> {
    part("docs/configuration.md", heading)
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once('`'))
        .map(|(key, _)| key.to_owned())
        .collect()
}

#[test]
fn every_setting_of_the_services_is_described() {
    for (heading, sample) in [
        ("Server", "deploy/config/server.toml"),
        ("Client", "deploy/config/client.toml"),
        ("ArtAug worker", "deploy/config/artaug-worker.toml"),
    ] {
        assert_eq!(documented_keys(heading), sample_keys(sample), "{heading}");
    }
}

#[test]
fn every_setting_of_a_job_is_described() {
    let documented = documented_keys("Jobs");
    let sample = sample_keys("deploy/config/jobs/fedmcp.toml");
    let missing: Vec<_> = sample.difference(&documented).collect();
    assert!(missing.is_empty(), "{missing:?}");
    // Settings of other algorithms than the sample's.
    let others: Vec<_> = documented.difference(&sample).collect();
    assert_eq!(others, ["algorithm.head_epochs", "algorithm.lambda"]);
}

#[test]
fn every_setting_of_an_artaug_job_is_described_with_its_default() {
    let documented = documented_keys("ArtAug jobs");
    let path = "deploy/artaug/job.toml";
    let shown = sample_keys(path);
    let missing: Vec<_> = shown.difference(&documented).collect();
    assert!(missing.is_empty(), "{missing:?}");
    // The keys of a scorer stand inside a list in the sample.
    for key in documented.difference(&shown) {
        assert!(key.starts_with("scorers.filter."), "{key} is not in {path}");
    }
    let sample = read(path);
    let mut defaults = 0;
    for row in table(&part("docs/configuration.md", "ArtAug jobs"), "Key") {
        let Some(value) = row[1]
            .strip_prefix('`')
            .and_then(|rest| rest.strip_suffix('`'))
        else {
            continue;
        };
        let key = row[0].trim_matches('`');
        let name = key.rsplit('.').next().unwrap();
        let line = format!("{name} = {value}");
        let is_shown = |text: &str| text.trim_start_matches("# ") == line;
        assert!(
            sample.lines().any(is_shown),
            "{key} is not {value} in {path}"
        );
        defaults += 1;
    }
    assert!(defaults > 30, "{defaults}");
}

/// The fields of the types that settings are read into: those that refuse unknown ones.
fn fields(path: &str) -> BTreeSet<String> {
    let (mut strict, mut inside) = (false, false);
    let mut found = BTreeSet::new();
    for line in read(path).lines() {
        if line.starts_with("#[serde(") {
            strict |= line.contains("deny_unknown_fields");
        } else if line.starts_with("pub struct ") || line.starts_with("pub enum ") {
            inside = strict;
            strict = false;
        } else if line == "}" {
            inside = false;
        } else if let Some((name, _)) = line.split_once(": ").filter(|_| inside) {
            let name = name.trim_start();
            let name = name.strip_prefix("pub ").unwrap_or(name);
            if name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_') {
                found.insert(name.to_owned());
            }
        }
    }
    found
}

#[test]
fn no_setting_of_the_code_is_missing_from_the_page() {
    let sections: [(&str, usize, &[&str]); 4] = [
        (
            "Server",
            40,
            &[
                "server/src/config.rs",
                "server/src/config/limits.rs",
                "server/src/config/workers.rs",
            ],
        ),
        (
            "Jobs",
            30,
            &[
                "common/src/job.rs",
                "common/src/job/algorithm.rs",
                "common/src/job/model.rs",
                "common/src/job/rounds.rs",
                "common/src/job/training.rs",
            ],
        ),
        (
            "ArtAug worker",
            25,
            &[
                "server/artaug-worker/src/config.rs",
                "server/artaug-worker/src/imagetext/model.rs",
                "server/artaug/src/setup.rs",
                "server/artaug/src/endpoint/settings.rs",
            ],
        ),
        (
            "ArtAug jobs",
            50,
            &[
                "common/src/job/artaug.rs",
                "common/src/job/artaug/advice.rs",
                "common/src/job/artaug/bounds.rs",
                "common/src/job/artaug/drawing.rs",
                "common/src/job/artaug/learning.rs",
                "common/src/job/artaug/scorers.rs",
            ],
        ),
    ];
    for (heading, least, paths) in sections {
        let keys = documented_keys(heading);
        let names: BTreeSet<&str> = keys.iter().flat_map(|key| key.split('.')).collect();
        let mut all = BTreeSet::new();
        for path in paths {
            let fields = fields(path);
            assert!(!fields.is_empty(), "{path}");
            for field in &fields {
                assert!(
                    names.contains(field.as_str()),
                    "{path}: `{field}` is not described under {heading}"
                );
            }
            all.extend(fields);
        }
        assert!(all.len() > least, "{heading}: {all:?}");
    }
}

/// The names of a job's results as its page has them, with N for the number of an iteration.
pub(super) fn documented_results() -> BTreeSet<String> {
    let rows = table(
        &part("docs/artaug.md", "What comes out, and how to use it"),
        "name",
    );
    rows.iter().flat_map(|row| quoted(&row[0])).collect()
}

/// The job that a section of ArtAug's page shows.
fn job_of(section: &str) -> ArtaugSpec {
    let page = part("docs/artaug.md", section);
    let lines: Vec<&str> = page
        .lines()
        .skip_while(|line| *line != "    kind = \"artaug\"")
        .take_while(|line| line.is_empty() || line.starts_with("    "))
        .map(|line| line.strip_prefix("    ").unwrap_or(line))
        .collect();
    ArtaugSpec::parse(&lines.join("\n")).unwrap()
}

#[test]
fn the_jobs_on_the_artaug_page_are_acceptable() {
    let first = job_of("A job of your own on the embedded model");
    assert_eq!(first.model.folder, "base");
    let photos = job_of("On a GPU, with a real checkpoint and vLLM");
    assert!(photos.lora.recompute && photos.output.fused);
}

#[test]
fn every_decision_is_in_the_index() {
    let index = read("docs/adr/README.md");
    let files: Vec<String> = fs::read_dir(repository().join("docs/adr"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != "README.md")
        .collect();
    assert!(files.len() > 5);
    for file in files {
        assert!(
            index.contains(&format!("({file})")),
            "{file} is not in docs/adr/README.md"
        );
    }
}

#[test]
fn links_between_pages_lead_somewhere() {
    let mut pages = vec![];
    let mut folders = vec![
        repository(),
        repository().join("docs"),
        repository().join("docs/adr"),
    ];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "md") {
                pages.push(path);
            }
        }
    }
    assert!(pages.len() > 10);
    for page in pages {
        let text = fs::read_to_string(&page).unwrap();
        for link in text.split("](").skip(1) {
            let target = link.split([')', '#']).next().unwrap();
            if target.is_empty() || target.contains("://") {
                continue;
            }
            let path = page.parent().unwrap().join(target);
            assert!(path.exists(), "{}: {target} does not exist", page.display());
        }
    }
}
