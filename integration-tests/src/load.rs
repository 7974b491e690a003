//! Rounds with training taken out: many silos that answer at once against a real server, measured from outside.
//!
//! Silo i adds `0.001 (i + 1)` to every element and claims `10 (i + 1)` examples, so a silo that is lost or counted twice shows
//! in the result. The last round is recomputed here and must be equal to the bit.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    sync::Arc,
    time::Instant,
};

use anyhow::{Context as _, bail, ensure};
use bytes::BytesMut;
use concord_common::{
    Digest, Role, SiloId,
    adapter::{AdapterVersion, decode_f32},
};
use concord_proto::v1;
use serde::Serialize;
use tokio::{sync::mpsc, task::JoinSet};

use crate::{
    harness::{Federation, ServerOptions},
    procfs,
    silo::{Notice, Silo, add, operator},
};

mod shape;

pub use shape::{LAYERS, TENSORS, shape_for};

/// The unit that the server is shipped with.
const UNIT: &str = include_str!("../../deploy/systemd/concord-server.service");

/// The allocator's settings in a unit: the server runs here as it does as a service.
fn allocator(unit: &str) -> BTreeMap<String, String> {
    unit.lines()
        .filter_map(|line| line.strip_prefix("Environment=")?.split_once('='))
        .filter(|(name, _)| name.starts_with("MALLOC_"))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

/// What to run.
#[derive(Debug, Clone)]
pub struct Load {
    /// Silos.
    pub silos: u32,
    /// Elements of the adapter, at least.
    pub parameters: u64,
    /// Rounds that are timed, after one that is not.
    pub rounds: u32,
    /// `power` or `process`.
    pub durability: String,
}

/// What came out; one line of JSON, with the names that the peers' scripts use.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Always `concord`.
    pub framework: &'static str,
    /// Durability of the spool.
    pub variant: String,
    /// Version of the program.
    pub version: &'static str,
    /// Silos.
    #[serde(rename = "N")]
    pub silos: u32,
    /// Elements of the adapter.
    #[serde(rename = "P")]
    pub parameters: u64,
    /// Timed rounds.
    #[serde(rename = "R")]
    pub rounds: u32,
    /// Size of the adapter in MB.
    pub model_mb: f64,
    /// Tensors of the adapter.
    pub tensors: u64,
    /// Always `mtls`.
    pub security: &'static str,
    /// Seconds of the first round, which is not counted.
    pub warmup_round_s: f64,
    /// Median seconds of a timed round.
    pub wall_s: f64,
    /// Seconds of each timed round.
    pub wall_s_all: Vec<f64>,
    /// Median processor seconds of the server in a timed round.
    pub server_cpu_s: f64,
    /// Processor seconds of all silos together in a timed round, on average.
    pub clients_cpu_s: f64,
    /// Most memory that the server had resident, in MiB, as the peers count it.
    pub server_peak_rss_mb: f64,
    /// Largest difference of the final adapter from its start plus all rounds' means.
    pub check_max_err: f64,
    /// True if the last round's adapter is the weighted mean to the bit, and no round is missing.
    pub ok: bool,
}

/// The moments at which rounds were first seen to be over; the first one is the start.
#[derive(Debug, Default)]
struct Marks {
    at: BTreeMap<u32, Mark>,
}

#[derive(Debug, Clone, Copy)]
struct Mark {
    moment: Instant,
    server_cpu: f64,
    clients_cpu: f64,
}

impl Marks {
    /// Notes that `round` is over, unless another silo saw it before.
    fn note(&mut self, round: u32, server_pid: u32) -> anyhow::Result<()> {
        if let Entry::Vacant(entry) = self.at.entry(round) {
            entry.insert(Mark {
                moment: Instant::now(),
                server_cpu: procfs::cpu_seconds(server_pid)?,
                clients_cpu: procfs::cpu_seconds(std::process::id())?,
            });
        }
        Ok(())
    }

    /// What each round took, by `what` of its two ends.
    fn each(&self, what: impl Fn(&Mark, &Mark) -> f64) -> Vec<f64> {
        let marks: Vec<&Mark> = self.at.values().collect();
        marks
            .windows(2)
            .map(|pair| what(pair[0], pair[1]))
            .collect()
    }
}

/// What the first silo keeps for the check at the end.
#[derive(Debug, Default)]
struct Kept {
    first_base: Vec<u8>,
    last_base: Vec<u8>,
    last: Vec<u8>,
}

/// One silo's part: everything that it needs to answer all rounds.
struct Worker {
    silo: Silo,
    index: u32,
    job_id: Arc<str>,
    keeps: bool,
}

/// Runs a server and silos, and measures.
///
/// # Errors
/// If anything goes wrong, or a contribution is not accepted. A wrong result is in the report.
pub async fn run(load: &Load) -> anyhow::Result<Report> {
    let mut federation = Federation::new(&ServerOptions {
        durability: load.durability.clone(),
        environment: allocator(UNIT),
        ..ServerOptions::default()
    })?;
    federation.start_server()?;
    let server_pid = federation.server()?.pid();
    let (hidden, bottleneck) = shape_for(load.parameters);
    let workers = prepare(load, &federation, hidden, bottleneck).await?;
    let (marks, kept) = answer(workers, server_pid).await?;
    ensure!(
        marks.at.len() == load.rounds as usize + 2,
        "{} rounds were seen instead of {}",
        marks.at.len().saturating_sub(1),
        load.rounds + 1
    );
    let peak = procfs::peak_rss_bytes(server_pid)?;
    ensure!(
        !procfs::mapped_files(server_pid)?.contains("libtorch"),
        "the server has libtorch mapped"
    );
    let (exact, max_err) = check(&kept, load)?;
    federation.stop_server()?;

    let walls = marks.each(|start, end| (end.moment - start.moment).as_secs_f64());
    let server_cpu = marks.each(|start, end| end.server_cpu - start.server_cpu);
    let clients_cpu = marks.each(|start, end| end.clients_cpu - start.clients_cpu);
    let parameters = u64::from(LAYERS) * (2 * hidden * bottleneck + bottleneck + hidden);
    Ok(Report {
        framework: "concord",
        variant: load.durability.clone(),
        version: env!("CARGO_PKG_VERSION"),
        silos: load.silos,
        parameters,
        rounds: load.rounds,
        model_mb: rounded(parameters as f64 * 4.0 / 1e6, 1),
        tensors: TENSORS,
        security: "mtls",
        warmup_round_s: rounded(walls[0], 3),
        wall_s: rounded(median(&walls[1..]), 3),
        wall_s_all: walls[1..].iter().map(|wall| rounded(*wall, 3)).collect(),
        server_cpu_s: rounded(median(&server_cpu[1..]), 3),
        clients_cpu_s: rounded(median(&clients_cpu[1..]), 3),
        server_peak_rss_mb: rounded(peak as f64 / f64::from(1 << 20), 1),
        check_max_err: max_err,
        ok: exact,
    })
}

/// Certificates, connections and the job.
async fn prepare(
    load: &Load,
    federation: &Federation,
    hidden: u64,
    bottleneck: u64,
) -> anyhow::Result<Vec<Worker>> {
    let (name, url) = (federation.name(), federation.url());
    let ids: Vec<SiloId> = (0..load.silos)
        .map(|index| format!("silo-{index:05}").parse())
        .collect::<Result<_, _>>()?;
    let operator_files = federation.issue(Role::Operator, "loadgen")?;
    let submitted = operator(&operator_files, name, &url)?
        .submit_job(v1::SubmitJobRequest {
            request_id: "load".to_owned(),
            spec_toml: job_toml(&ids, hidden, bottleneck, load.rounds + 1),
        })
        .await
        .context("the job was refused")?
        .into_inner();
    let job_id: Arc<str> = submitted.job.context("no job in the answer")?.job_id.into();
    (0_u32..)
        .zip(ids)
        .map(|(index, id)| {
            let files = federation.issue(Role::Silo, id.as_str())?;
            Ok(Worker {
                silo: Silo::new(id, &files, name, &url)?,
                index,
                job_id: Arc::clone(&job_id),
                keeps: index == 0,
            })
        })
        .collect()
}

/// Lets all silos answer until the job has ended.
async fn answer(workers: Vec<Worker>, server_pid: u32) -> anyhow::Result<(Marks, Kept)> {
    let (seen, mut seen_rounds) = mpsc::channel(1024);
    let mut tasks = JoinSet::new();
    for worker in workers {
        tasks.spawn(worker.run(seen.clone()));
    }
    drop(seen);
    let mut marks = Marks::default();
    // Ends when all silos have dropped their senders.
    while let Some(round) = seen_rounds.recv().await {
        marks.note(round, server_pid)?;
    }
    let mut kept = None;
    while let Some(done) = tasks.join_next().await {
        kept = done.context("a silo panicked")??.or(kept);
    }
    Ok((marks, kept.context("the first silo kept nothing")?))
}

impl Worker {
    /// Answers every round until the job ends. Reports each round that it sees to be over: 0 when the first one opens.
    async fn run(mut self, seen: mpsc::Sender<u32>) -> anyhow::Result<Option<Kept>> {
        let name = self.silo.id().clone();
        self.answer_all(&seen)
            .await
            .with_context(|| format!("silo `{name}`"))
    }

    async fn answer_all(&mut self, seen: &mpsc::Sender<u32>) -> anyhow::Result<Option<Kept>> {
        let mut kept = Kept::default();
        let (mut base, mut buffer) = (Vec::new(), BytesMut::new());
        let mut layout = None;
        let mut watch = self.silo.watch().await?;
        let mut done = 0;
        loop {
            match self
                .silo
                .next_notice(&mut watch, &self.job_id, done)
                .await?
            {
                Notice::Work { round, .. } => {
                    seen.send(round - 1).await?;
                    let lease = self.silo.claim(&self.job_id, round).await?;
                    self.silo
                        .download_into(&self.job_id, &lease.layout, lease.base, &mut base)
                        .await?;
                    add(&base, constant(self.index), &mut buffer)?;
                    let delta = buffer.freeze();
                    let receipt = self
                        .silo
                        .contribute(&lease, &delta, examples(self.index))
                        .await?;
                    ensure!(
                        receipt.receipt.outcome == concord_common::round::Outcome::Accepted,
                        "the contribution to round {round} was {:?}",
                        receipt.receipt.outcome
                    );
                    // The memory serves all rounds: a silo that trains would not give it back to the system either. It is
                    // none of ours any more if the connection has not let go of it yet.
                    buffer = delta.try_into_mut().unwrap_or_default();
                    if self.keeps && round == 1 {
                        kept.first_base.clone_from(&base);
                    }
                    layout = Some(lease.layout);
                    done = round;
                }
                Notice::Ended { state, version } => {
                    if state != v1::JobState::Succeeded {
                        bail!("the job ended as {}", state.as_str_name());
                    }
                    seen.send(done).await?;
                    if !self.keeps {
                        return Ok(None);
                    }
                    let layout = layout.context("the job ended before its first round")?;
                    kept.last_base = base;
                    let version = AdapterVersion(Digest::try_from(version.as_slice())?);
                    kept.last = self.silo.download(&self.job_id, &layout, version).await?;
                    return Ok(Some(kept));
                }
            }
        }
    }
}

/// What silo `index` adds.
fn constant(index: u32) -> f32 {
    1e-3 * (index + 1) as f32
}

/// What silo `index` claims.
fn examples(index: u32) -> u64 {
    10 * (u64::from(index) + 1)
}

/// Whether the last round is the weighted mean to the bit, and how far all rounds together are from the plain sum.
fn check(kept: &Kept, load: &Load) -> anyhow::Result<(bool, f64)> {
    let first = decode_f32(&kept.first_base)?;
    let base = decode_f32(&kept.last_base)?;
    let last = decode_f32(&kept.last)?;
    ensure!(
        !last.is_empty() && first.len() == last.len() && base.len() == last.len(),
        "the first silo has not kept its adapters"
    );
    let total: u64 = (0..load.silos).map(examples).sum();
    let weights: Vec<(f32, f64)> = (0..load.silos)
        .map(|index| (constant(index), examples(index) as f64 / total as f64))
        .collect();
    let exact = base.iter().zip(&last).all(|(&base, &last)| {
        // The aggregator's order: one silo after the other, then the base, in f64, rounded once.
        let step = weights.iter().fold(0.0, |step, &(constant, weight)| {
            step + weight * f64::from((base + constant) - base)
        });
        ((f64::from(base) + step) as f32).to_bits() == last.to_bits()
    });
    let step: f64 = weights.iter().map(|&(c, p)| f64::from(c) * p).sum();
    let moved = step * f64::from(load.rounds + 1);
    let max_err = first
        .iter()
        .zip(&last)
        .map(|(&first, &last)| (f64::from(last) - f64::from(first) - moved).abs())
        .fold(0.0, f64::max);
    Ok((exact && max_err < 1e-2, max_err))
}

/// A job that every silo answers, with an adapter of the wanted size.
fn job_toml(silos: &[SiloId], hidden: u64, bottleneck: u64, rounds: u32) -> String {
    let names: Vec<String> = silos.iter().map(|id| format!("\"{id}\"")).collect();
    format!(
        r#"kind = "federated-training"
name = "load"
task = "none"
silos = [{names}]
backbone = {{ name = "none", hidden = {hidden}, layers = {LAYERS} }}
adapter = {{ bottleneck = {bottleneck} }}
algorithm = {{ name = "fedavg" }}
rounds = {{ count = {rounds}, min_silos = {count}, max_time = "10m" }}
"#,
        names = names.join(", "),
        count = silos.len(),
    )
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        length if length % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

fn rounded(value: f64, digits: i32) -> f64 {
    let scale = 10_f64.powi(digits);
    (value * scale).round() / scale
}

#[cfg(test)]
mod tests {
    use super::*;
    use concord_common::{adapter::encode_f32, job::JobSpec};

    #[test]
    fn the_allocator_is_set_as_in_the_unit() {
        assert_eq!(allocator(UNIT)["MALLOC_ARENA_MAX"], "2");
        assert!(allocator("Environment=PATH=/bin").is_empty());
    }

    #[test]
    fn the_load_job_is_one_that_the_server_takes() {
        let silos: Vec<SiloId> = vec!["a".parse().unwrap(), "b".parse().unwrap()];
        let spec = JobSpec::parse(&job_toml(&silos, 404, 44, 3)).unwrap();
        let layout = spec.training().adapter_shape().layout().unwrap();
        assert_eq!(layout.tensors().len() as u64, TENSORS);
        assert_eq!(layout.elements(), 900_000);
    }

    #[test]
    fn a_silo_that_is_counted_twice_is_noticed() {
        let load = Load {
            silos: 2,
            parameters: 2,
            rounds: 1,
            durability: "process".to_owned(),
        };
        let mean = |base: f32, shares: [f64; 2]| {
            let step = (0..2_u32).fold(0.0, |step, index| {
                step + shares[index as usize] * f64::from((base + constant(index)) - base)
            });
            (f64::from(base) + step) as f32
        };
        let right = [1.0 / 3.0, 2.0 / 3.0];
        let rounds = |last: [f64; 2]| {
            let first = [0.5_f32, -3.0];
            let base = first.map(|value| mean(value, right));
            Kept {
                first_base: encode_f32(&first),
                last_base: encode_f32(&base),
                last: encode_f32(&base.map(|value| mean(value, last))),
            }
        };
        assert!(check(&rounds(right), &load).unwrap().0);
        assert!(!check(&rounds([0.5, 0.5]), &load).unwrap().0);
        assert!(!check(&rounds([0.0, 1.0]), &load).unwrap().0);
    }

    #[test]
    fn the_median_of_an_even_count_is_between_the_middle_two() {
        assert!((median(&[4.0, 1.0, 3.0, 2.0]) - 2.5).abs() < 1e-12);
        assert!((median(&[3.0, 1.0, 2.0]) - 2.0).abs() < 1e-12);
    }
}
