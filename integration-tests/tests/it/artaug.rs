//! An ArtAug job from its submission to its files, with the real worker process, which is killed again and again.

mod by_hand;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use concord_common::{Role, round::Outcome};
use concord_integration_tests::{
    harness::{Federation, ServerOptions, program_path, wait_for},
    procfs,
    silo::{Lease, Silo, added},
};
use concord_proto::v1::{self, operator_service_client::OperatorServiceClient};
use tonic::transport::Channel;

use super::{
    job_toml, operator_of,
    rounds::{end, lease},
    runtime, silo, submit,
};

/// How long a whole job may take on a busy machine.
const JOB: Duration = Duration::from_mins(8);

/// A worker is killed as soon as it has written a line with such an event, training and iteration: in every stage, in the middle of those that take time,
/// and once on what an iteration before has made. The last one finds it at bringing the results.
const MOMENTS: [[&str; 3]; 13] = [
    ["generated", "", ""],
    ["advised", "", ""],
    ["regenerated", "", ""],
    ["scored", "", ""],
    ["filtered", "", ""],
    ["reviewed", "", ""],
    ["checkpointed", "first", ""],
    ["checkpointed", "second", ""],
    ["checkpointed", "control", ""],
    ["fused", "", ""],
    ["evaluated", "", ""],
    ["checkpointed", "second", "2"],
    ["decided", "", "2"],
];

/// Folder of the embedded base model, and of what was fetched to go with it.
fn model_folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../deploy/artaug")
}

fn icons() -> PathBuf {
    let cache = std::env::var_os("CONCORD_CACHE").map_or_else(
        || {
            let home = std::env::var_os("HOME").unwrap();
            PathBuf::from(home).join(".cache/concord")
        },
        PathBuf::from,
    );
    let icons = cache.join("sources/icons");
    assert!(
        icons.join("fluent/icons.json").is_file(),
        "no icon sets in {}; run `make test`, which fetches them",
        icons.display()
    );
    icons
}

/// A small job: every stage. Strong regions and a narrow interval make sure that there is a gain to train on.
fn job(name: &str, iterations: u32) -> String {
    format!(
        r#"kind = "artaug"
name = "{name}"
seed = 6
review = true
model = {{ folder = "base" }}
prompts = {{ file = "training.txt" }}
held_out = {{ file = "held-out.txt" }}
advisor = {{ kind = "rules", tail = 0.2, least_excess = 0.05 }}
counts = {{ iterations = {iterations}, pairs = 40, kept = 6, least_kept = 2, held_out = 6 }}
sampler = {{ kind = "euler", steps = 6, guidance = 3.0, region_strength = 5.0, batch = 4 }}
lora = {{ targets = "all-linear", rank = 4, first_steps = 10, second_steps = 10, batch = 4, checkpoint_every = 4 }}
evaluation = {{ resamples = 200, confidence = 0.5 }}
limits = {{ least_diversity = 0.1, threads = 1 }}

[scorers]
guard = "none"
filter = [{{ kind = "photometry", least_gain = 0.0 }}]
evaluation = [{{ kind = "statistics" }}]
"#
    )
}

/// A server whose workers have short leases, so that a killed one is replaced soon. It starts them itself.
fn started() -> Federation {
    let worker = program_path("concord-artaug").unwrap();
    let federation = with_prompts(&format!(
        "[workers]\nprogram = \"{}\"\nconfig = \"worker.toml\"\nlease = \"2s\"\n",
        worker.display()
    ));
    write_worker(&federation, "worker");
    federation
}

/// A running server with these further settings, and the job's prompts.
fn with_prompts(extra: &str) -> Federation {
    let options = ServerOptions {
        extra: extra.to_owned(),
        ..ServerOptions::default()
    };
    let mut federation = Federation::new(&options).unwrap();
    // The server wants to see the file; what stands in it follows once the server has its port.
    fs::write(federation.path().join("worker.toml"), "").unwrap();
    federation.start_server().unwrap();
    for (file, side) in [("training.txt", None), ("held-out.txt", Some("--held-out"))] {
        let mut arguments = vec!["base-prompts", "--count", "40", "--seed", "1"];
        arguments.extend(side);
        let prompts = concord_integration_tests::harness::run(
            "concord-artaug",
            federation.path(),
            &arguments,
        )
        .unwrap()
        .success()
        .unwrap();
        fs::write(federation.path().join(file), prompts).unwrap();
    }
    federation
}

/// A worker's certificate and settings: `<name>.toml`; its state is in the folder of that name.
pub(super) fn write_worker(federation: &Federation, name: &str) {
    let tls = federation.issue(Role::Worker, name).unwrap();
    let text = format!(
        r#"federation = "{federation_name}"
state_dir = "{name}"
[server]
address = "{address}"
max_backoff = "1s"
[tls]
certificate = "{certificate}"
key = "{key}"
ca = "{ca}"
[allowed]
model_folders = ["{models}"]
prompt_folders = ["{prompts}"]
[data]
icons = "{icons}"
[limits]
threads = 1
nice = 0
"#,
        federation_name = federation.name(),
        address = federation.grpc_address(),
        certificate = tls.certificate.display(),
        key = tls.key.display(),
        ca = tls.ca.display(),
        models = model_folder().canonicalize().unwrap().display(),
        prompts = federation.path().display(),
        icons = icons().display(),
    );
    fs::write(federation.path().join(format!("{name}.toml")), text).unwrap();
}

async fn show(operator: &mut OperatorServiceClient<Channel>, job_id: &str) -> v1::Job {
    let request = v1::GetJobRequest {
        job_id: job_id.to_owned(),
    };
    let answer = operator.get_job(request).await.unwrap().into_inner();
    answer.job.unwrap()
}

/// SIGKILL.
fn kill(pid: u32) {
    let status = Command::new("kill")
        .args(["-KILL", &pid.to_string()])
        .status();
    assert!(status.unwrap().success());
}

/// Names and digests of what a job has produced.
async fn artefacts(
    operator: &mut OperatorServiceClient<Channel>,
    job_id: &str,
) -> BTreeMap<String, Vec<u8>> {
    let request = v1::ListArtefactsRequest {
        job_id: job_id.to_owned(),
    };
    let answer = operator.list_artefacts(request).await.unwrap().into_inner();
    answer
        .artefacts
        .into_iter()
        .map(|artefact| (artefact.name, artefact.digest))
        .collect()
}

fn is_over(job: &v1::Job) -> bool {
    !matches!(
        job.state(),
        v1::JobState::Queued | v1::JobState::Running | v1::JobState::Unspecified
    )
}

/// The LoRA files among the artefacts: what must be the same to the byte.
fn loras(artefacts: &BTreeMap<String, Vec<u8>>) -> BTreeMap<String, Vec<u8>> {
    artefacts
        .iter()
        .filter(|(name, _)| name.contains("lora") && name.ends_with(".safetensors"))
        .map(|(name, digest)| (name.clone(), digest.clone()))
        .collect()
}

/// The page names what a job leaves, and a job leaves what the page names.
fn every_result_is_documented(results: &BTreeMap<String, Vec<u8>>) {
    let documented = super::docs::documented_results();
    for name in results.keys() {
        let known = ["1", "2"].iter().fold(name.clone(), |name, number| {
            name.replace(&format!("iteration-{number}"), "iteration-N")
                .replace(&format!("manifest-{number}"), "manifest-N")
                .replace(&format!("held-out-{number}"), "held-out-N")
        });
        assert!(documented.contains(&known), "{name} is not on the page");
    }
    for name in documented {
        // What this job was not asked for.
        let is_left_out = ["fused/", "lora/reduced/"]
            .iter()
            .any(|folder| name.starts_with(folder));
        for number in ["-1", "-2"] {
            let name = name.replace("-N", number);
            assert!(is_left_out || results.contains_key(&name), "no {name}");
        }
    }
}

/// The journals of the worker's copies of jobs, together.
fn journals(folder: &Path) -> String {
    let mut text = String::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            text += &journals(&path);
        } else if path.ends_with("journal.jsonl") {
            text += &fs::read_to_string(&path).unwrap_or_default();
        }
    }
    text
}

/// Kills workers, each in the earliest stage of those that none was killed in yet.
struct Killer {
    /// Process of the server, whose children the workers are.
    server: u32,
    /// Where the workers have their copies of the journal.
    folder: PathBuf,
    /// Whole lines that those before the worker at hand have left.
    left: usize,
    /// What is still to come, in a job's order.
    moments: Vec<[&'static str; 3]>,
}

impl Killer {
    /// Whether a worker was killed now.
    fn look(&mut self) -> bool {
        let Some(worker) = procfs::children(self.server).unwrap().first().copied() else {
            return false;
        };
        let journal = journals(&self.folder);
        // Only what the worker at hand has written shows where it is.
        let own: Vec<&str> = whole_lines(&journal).skip(self.left).collect();
        let has = |line: &str, key: &str, value: &str| {
            value.is_empty() || line.contains(&format!("\"{key}\":{value}"))
        };
        let quoted = |text: &str| match text {
            "" => String::new(),
            text => format!("\"{text}\""),
        };
        let reached = self
            .moments
            .iter()
            .position(|[event, training, iteration]| {
                own.iter().any(|line| {
                    has(line, "event", &quoted(event))
                        && has(line, "training", &quoted(training))
                        && has(line, "iteration", iteration)
                })
            });
        let Some(place) = reached else {
            return false;
        };
        self.moments.remove(place);
        kill(worker);
        wait_for("end of the killed worker", Duration::from_secs(20), || {
            let children = procfs::children(self.server)?;
            Ok((!children.contains(&worker)).then_some(()))
        })
        .unwrap();
        // Every second time the next worker is as on another machine: all that it has is what the server kept.
        if self.moments.len().is_multiple_of(2) {
            fs::remove_dir_all(&self.folder).unwrap();
        }
        self.left = whole_lines(&journals(&self.folder)).count();
        true
    }
}

/// A federated job beside the ArtAug job: two silos that always have a round's lease in hand.
struct Rounds {
    job_id: String,
    silos: Vec<Silo>,
    leases: Vec<Lease>,
    /// Rounds of the job.
    count: u32,
    done: u32,
}

impl Rounds {
    async fn begun(federation: &Federation, count: u32) -> Self {
        let names = ["silo-a", "silo-b"];
        let job_id = submit(&mut operator_of(federation), job_toml(&names, count)).await;
        let mut rounds = Self {
            job_id,
            silos: names.map(|name| silo(federation, name)).into(),
            leases: Vec::new(),
            count,
            done: 0,
        };
        rounds.lease().await;
        rounds
    }

    async fn lease(&mut self) {
        for silo in &mut self.silos {
            self.leases.push(lease(silo, &self.job_id, self.done).await);
        }
    }

    /// Both silos answer the round whose leases they have, and take those of the next.
    async fn answer(&mut self) {
        for (silo, lease) in self.silos.iter_mut().zip(self.leases.drain(..)) {
            let base = silo
                .download(&self.job_id, &lease.layout, lease.base)
                .await
                .unwrap();
            let delta = added(&base, 0.5).unwrap();
            let receipt = silo.contribute(&lease, &delta, 10).await.unwrap();
            assert_eq!(receipt.receipt.outcome, Outcome::Accepted);
        }
        self.done += 1;
        if self.done < self.count {
            self.lease().await;
        }
    }

    async fn ended(mut self) -> v1::JobState {
        end(&mut self.silos[0], &self.job_id, self.count).await.0
    }
}

/// The lines that end.
fn whole_lines(text: &str) -> impl Iterator<Item = &str> {
    let lines = text.split_inclusive('\n');
    lines.filter(|line| line.ends_with('\n'))
}

/// Says yes to the pairs that wait for a word.
async fn accept_all(operator: &mut OperatorServiceClient<Channel>, job_id: &str) {
    let job_id = job_id.to_owned();
    let request = v1::ListReviewRequest {
        job_id: job_id.clone(),
    };
    let listed = operator.list_review(request).await.unwrap().into_inner();
    if listed.waiting.is_empty() {
        return;
    }
    let request = v1::ReviewPairsRequest {
        job_id,
        iteration: listed.iteration,
        accepted: listed.waiting,
        rejected: Vec::new(),
    };
    operator.review_pairs(request).await.unwrap();
}

/// Runs a job of two iterations to its end and gives its files; `watch` is called again and again meanwhile.
fn run_job(
    federation: &Federation,
    name: &str,
    mut watch: impl FnMut(),
) -> BTreeMap<String, Vec<u8>> {
    let mut operator = operator_of(federation);
    let job_id = runtime().block_on(submit_as(&mut operator, name, 2));
    let ended = wait_for("end of the job", JOB, || {
        watch();
        runtime().block_on(accept_all(&mut operator, &job_id));
        let job = runtime().block_on(show(&mut operator, &job_id));
        Ok(is_over(&job).then_some(job))
    })
    .unwrap();
    assert_eq!(ended.state(), v1::JobState::Succeeded, "{}", ended.reason);
    runtime().block_on(artefacts(&mut operator, &job_id))
}

async fn submit_as(
    operator: &mut OperatorServiceClient<Channel>,
    name: &str,
    iterations: u32,
) -> String {
    let request = v1::SubmitJobRequest {
        request_id: name.to_owned(),
        spec_toml: job(name, iterations),
    };
    let answer = operator.submit_job(request).await.unwrap().into_inner();
    answer.job.unwrap().job_id
}

#[test]
fn a_worker_killed_in_every_stage_ends_in_the_same_lora_bytes_and_no_round_is_disturbed() {
    let federation = started();
    let results = run_job(&federation, "job", || {});
    every_result_is_documented(&results);
    let whole = loras(&results);
    // With another base the seed may be one after which the first iteration is taken back: then the job needs another one.
    assert!(whole.contains_key("lora/merged/lora.diffusers.safetensors"));
    super::demo_files::the_artaug_demo_has_a_table_for(&federation);

    let mut again = started();
    let mut killer = Killer {
        server: again.server().unwrap().pid(),
        folder: again.path().join("worker"),
        left: 0,
        moments: MOMENTS.to_vec(),
    };
    // Every kill falls into a round that both silos have begun and answer afterwards.
    let mut rounds = runtime().block_on(Rounds::begun(&again, MOMENTS.len() as u32));
    let killed = loras(&run_job(&again, "job", || {
        if killer.look() {
            runtime().block_on(rounds.answer());
        }
    }));
    let missed = killer.moments;
    assert!(missed.is_empty(), "not killed at {missed:?}");
    assert_eq!(killed, whole);
    assert_eq!(runtime().block_on(rounds.ended()), v1::JobState::Succeeded);
}
