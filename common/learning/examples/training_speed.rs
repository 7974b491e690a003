//! How fast a silo trains: the counterpart of `deploy/interop/bench_training.py`.
//!
//! `cargo run --release -p concord-learning --example training_speed -- --backbone FOLDER --data train.csv [--layers 4,5] [--threads 1] ...`
//!
//! One FedMCP round over the first rows of a CSV file (columns `text,label` or `text_a,text_b,label`). With `--work equal` the batches are consecutive
//! rows padded to the longest of each and nothing is cached, as in the Python program; with `--work usual` batches are bucketed by length and the
//! frozen prefix is cached, as in a silo: in as much memory as a silo gives it by default or as `--cache SIZE` says, and in a file of `--cache-folder`,
//! if that is given, as far as memory is short. Prints one line of JSON; times are those of the fastest epoch, tokenizing not included. The first
//! epoch fills the cache and is reported apart. `rows_of_last_epoch` says how many rows came from memory, from disk, and were computed.

use std::{collections::HashMap, path::PathBuf, process::ExitCode, sync::Arc, time::Instant};

use concord_common::{SiloId, config::ByteSize, job::JobSpec};
use concord_learning::{
    Kind, LearningError,
    backbone::{Backbone, BackboneFiles},
    batch::Batching,
    cache::{CacheMode, CacheSettings, DiskBudget},
    data::{InputKind, Label, Problem, Row, TaskData},
    tokenize::TextTokenizer,
    torch::{TorchSettings, TorchThread},
    trainer::{Continue, LocalTrainer, TrainerSetup},
};

/// Most bytes in the folder: a client's `cache.folder_size`.
const FOLDER_SIZE: u64 = 4 << 30;

fn main() -> ExitCode {
    match Arguments::read().and_then(|arguments| {
        let settings = TorchSettings {
            intra_op_threads: arguments.number("threads"),
        };
        let thread = TorchThread::start(settings)?;
        thread.run_blocking("training speed", move || measure(&arguments))
    }) {
        Ok(line) => {
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

struct Arguments(HashMap<String, String>);

impl Arguments {
    /// Empty stands for what a silo has by default.
    const DEFAULTS: [(&str, &str); 14] = [
        ("backbone", ""),
        ("data", ""),
        ("rows", "512"),
        ("batch-size", "32"),
        ("max-length", "128"),
        ("bottleneck", "16"),
        ("layers", "all"),
        ("threads", "1"),
        ("epochs", "3"),
        ("mu", "0.0"),
        ("alpha", "0.0"),
        ("work", "usual"),
        ("cache", ""),
        ("cache-folder", ""),
    ];

    fn read() -> Result<Self, LearningError> {
        let mut values: HashMap<String, String> = Self::DEFAULTS
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect();
        let words: Vec<String> = std::env::args().skip(1).collect();
        for pair in words.chunks(2) {
            let known = pair[0]
                .strip_prefix("--")
                .filter(|key| values.contains_key(*key));
            let (Some(key), Some(value)) = (known, pair.get(1)) else {
                return Err(LearningError::Config(format!(
                    "unknown or incomplete: {}",
                    pair[0]
                )));
            };
            values.insert(key.to_owned(), value.clone());
        }
        Ok(Self(values))
    }

    fn text(&self, key: &str) -> &str {
        &self.0[key]
    }

    fn number(&self, key: &str) -> usize {
        self.text(key).parse().unwrap_or(0)
    }
}

/// What the prefix cache may hold.
fn cache_settings(arguments: &Arguments, mode: CacheMode) -> Result<CacheSettings, LearningError> {
    let mut settings = CacheSettings {
        mode,
        ..CacheSettings::default()
    };
    let (memory, folder) = (arguments.text("cache"), arguments.text("cache-folder"));
    if !memory.is_empty() {
        let size: ByteSize = memory
            .parse()
            .map_err(|error| LearningError::Config(format!("--cache: {error}")))?;
        settings.memory_bytes = size.bytes();
    }
    if !folder.is_empty() {
        settings.disk = Some(DiskBudget {
            folder: folder.into(),
            bytes: FOLDER_SIZE,
        });
    }
    Ok(settings)
}

/// The first rows of the file, the class of each being its label.
fn read_rows(arguments: &Arguments) -> Result<TaskData, LearningError> {
    let file = PathBuf::from(arguments.text("data"));
    let broken = |error: csv::Error| LearningError::Data(format!("{}: {error}", file.display()));
    let mut reader = csv::Reader::from_path(&file).map_err(broken)?;
    let headers = reader.headers().map_err(broken)?.clone();
    let column = |name: &str| headers.iter().position(|header| header == name);
    let text = column("text").or(column("text_a"));
    let (Some(text), Some(label)) = (text, column("label")) else {
        return Err(LearningError::Data(
            "the file needs columns text and label".to_owned(),
        ));
    };
    let pair = column("text_b");
    let train = reader
        .records()
        .take(arguments.number("rows"))
        .map(|record| {
            let record = record.map_err(broken)?;
            Ok(Row {
                text: record[text].to_owned(),
                pair: pair.map(|second| record[second].to_owned()),
                label: Label::Class(record[label].to_owned()),
            })
        })
        .collect::<Result<Vec<_>, LearningError>>()?;
    Ok(TaskData {
        kind: if pair.is_some() {
            InputKind::Pair
        } else {
            InputKind::Single
        },
        problem: Problem::Classification {
            classes: TaskData::classes_of(&train)?,
        },
        train,
        validation: Vec::new(),
        test: Vec::new(),
    })
}

fn specification(arguments: &Arguments, backbone: &Backbone) -> Result<JobSpec, LearningError> {
    let layers = match arguments.text("layers") {
        "all" => String::new(),
        list => format!("layers = [{list}]"),
    };
    Ok(JobSpec::parse(&format!(
        "kind = \"federated-training\"\nname = \"speed\"\ntask = \"speed\"\n\
         [backbone]\nname = \"bench\"\nhidden = {}\nlayers = {}\n\
         [adapter]\nbottleneck = {}\n{layers}\n\
         [algorithm]\nname = \"fedmcp\"\nmu = {}\nalpha = {}\n\
         [training]\nbatch_size = {}\nmax_length = {}\n[rounds]\ncount = 100\n",
        backbone.config().hidden,
        backbone.config().layers,
        arguments.text("bottleneck"),
        arguments.text("mu"),
        arguments.text("alpha"),
        arguments.text("batch-size"),
        arguments.text("max-length"),
    ))?)
}

fn measure(arguments: &Arguments) -> Result<String, LearningError> {
    let folder = PathBuf::from(arguments.text("backbone"));
    let backbone = Arc::new(Backbone::load(&folder, Kind::Float)?);
    let tokenizer = TextTokenizer::load(
        &BackboneFiles::find(&folder)?.tokenizer,
        backbone.config(),
        arguments.number("max-length"),
    )?;
    let spec = specification(arguments, &backbone)?;
    let spec = spec.training();
    let equal = match arguments.text("work") {
        "equal" => true,
        "usual" => false,
        other => {
            return Err(LearningError::Config(format!(
                "--work is equal or usual, not {other}"
            )));
        }
    };
    let data = read_rows(arguments)?;
    let padded_tokens = equal
        .then(|| padded_tokens(&tokenizer, &data, arguments.number("batch-size")))
        .transpose()?;
    let silo: SiloId = "bench"
        .parse()
        .map_err(|error| LearningError::Config(format!("{error}")))?;
    let mut trainer = LocalTrainer::new(
        TrainerSetup {
            spec,
            silo: &silo,
            backbone,
            tokenizer: &tokenizer,
            data: &data,
            cache: cache_settings(
                arguments,
                if equal { CacheMode::Off } else { CacheMode::On },
            )?,
        },
        None,
    )?;
    if equal {
        trainer.set_batching(Batching::InOrder);
    }
    let mut payload = spec.initial_adapter()?;
    let mut seconds = Vec::new();
    let mut losses = Vec::new();
    let mut steps = 0;
    let mut before = trainer.cache_stats();
    // One round more: the first sets up thread pools and fills the cache.
    for round in 0..=arguments.number("epochs") as u32 {
        before = trainer.cache_stats();
        let started = Instant::now();
        let result = trainer.train_round(round + 1, &payload, &mut |progress| {
            steps = progress.steps;
            Continue::Yes
        })?;
        seconds.push(started.elapsed().as_secs_f64());
        payload = apply(&payload, result.update.payload())?;
        losses.extend(
            result
                .training
                .iter()
                .filter(|(name, _)| name == "loss")
                .map(|(_, loss)| *loss),
        );
    }
    let best = seconds[1..].iter().copied().fold(f64::INFINITY, f64::min);
    let rows = data.train.len() as f64;
    let stats = trainer.cache_stats();
    let last = stats.since(&before);
    Ok(format!(
        "{{\"work\": \"{}\", \"rows\": {rows}, \"steps\": {steps}, \"layers\": {:?}, \"threads\": {}, \"padded_tokens\": {}, \
         \"seconds_per_epoch\": {best:.4}, \
         \"first_epoch_seconds\": {:.4}, \"milliseconds_per_step\": {:.3}, \"examples_per_second\": {:.2}, \"cache_mb\": {:.1}, \
         \"cache_disk_mb\": {:.1}, \"rows_of_last_epoch\": [{}, {}, {}], \
         \"first_and_last_loss\": [{:.4}, {:.4}], \"peak_rss_mb\": {}}}",
        arguments.text("work"),
        spec.adapter_layers(),
        arguments.text("threads"),
        padded_tokens.map_or("null".to_owned(), |tokens| tokens.to_string()),
        seconds[0],
        1000.0 * best / steps as f64,
        rows / best,
        stats.memory_bytes as f64 / 1e6,
        stats.disk_bytes as f64 / 1e6,
        last.memory_hits(),
        last.disk_hits,
        last.misses,
        losses.first().copied().unwrap_or(f64::NAN),
        losses.last().copied().unwrap_or(f64::NAN),
        peak_rss_mb().map_or("null".to_owned(), |mb| format!("{mb:.1}")),
    ))
}

/// Tokens of an epoch of consecutive rows, padding counted: equal work means as many as in Python.
fn padded_tokens(
    tokenizer: &TextTokenizer,
    data: &TaskData,
    batch_size: usize,
) -> Result<usize, LearningError> {
    let texts: Vec<(&str, Option<&str>)> = data
        .train
        .iter()
        .map(|row| (row.text.as_str(), row.pair.as_deref()))
        .collect();
    let encoded = tokenizer.encode_all(&texts)?;
    Ok(encoded
        .chunks(batch_size)
        .map(|batch| batch.len() * batch.iter().map(|row| row.ids.len()).max().unwrap_or(0))
        .sum())
}

/// The adapter that results from this silo's update alone.
fn apply(payload: &[u8], update: &[u8]) -> Result<Vec<u8>, LearningError> {
    let base = concord_common::adapter::decode_f32(payload)?;
    let delta = concord_common::adapter::decode_f32(update)?;
    let sum: Vec<f32> = base.iter().zip(&delta).map(|(x, d)| x + d).collect();
    Ok(concord_common::adapter::encode_f32(&sum))
}

/// In units of 10^6 bytes.
fn peak_rss_mb() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024.0 / 1e6)
}
