//! How fast a training step is: our half of `deploy/bench/training.sh`, with the flags and the output of
//! `deploy/interop/bench_training.py`. Times are those of the fastest of the epochs; the first one, which fills the cache, is
//! given besides. Tokenising is not included, what a round does before and after its steps is.

use std::{collections::BTreeSet, path::PathBuf, sync::Arc, time::Instant};

use anyhow::{Context as _, ensure};
use clap::Parser;
use concord_common::job::{AlgorithmSpec, CkaEstimator, JobSpec, Regulariser, TrainingSpec};
use concord_learning::{
    Kind, LearningError,
    backbone::{Backbone, BackboneFiles},
    cache::{CacheMode, CacheSettings},
    data::{InputKind, Label, Problem, Row, TaskData},
    tokenize::TextTokenizer,
    torch::{TorchSettings, TorchThread},
    trainer::{Continue, LocalTrainer, TrainerSetup},
};

/// Times training epochs of the local trainer on rows of a CSV file with the columns text,label or text_a,text_b,label
#[derive(Debug, Clone, Parser)]
struct Arguments {
    /// Hugging Face folder of the backbone
    #[arg(long)]
    backbone: PathBuf,
    /// CSV file
    #[arg(long)]
    data: PathBuf,
    /// Rows taken from its beginning
    #[arg(long, default_value_t = 512)]
    rows: usize,
    /// Rows in a batch
    #[arg(long, default_value_t = 32)]
    batch_size: u32,
    /// Longest input in tokens
    #[arg(long, default_value_t = 128)]
    max_length: u32,
    /// Width of each of the two adapters
    #[arg(long, default_value_t = 16)]
    bottleneck: u64,
    /// Layers with adapters, counted from 0: 4,5; or all
    #[arg(long, default_value = "all")]
    layers: String,
    /// Threads of libtorch
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Epochs that are timed
    #[arg(long, default_value_t = 3)]
    epochs: u32,
    /// Strength of the contrastive term
    #[arg(long, default_value_t = 0.0)]
    mu: f64,
    /// Strength of the global adapter's regularisation
    #[arg(long, default_value_t = 0.0)]
    alpha: f64,
    /// Keep what lies below the first adapter
    #[arg(long)]
    cache: bool,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let torch = TorchThread::start(TorchSettings {
        intra_op_threads: arguments.threads,
    })?;
    let data = read(&arguments)?;
    let report = torch.run_blocking("bench", move || bench(&arguments, &data))?;
    println!("{report}");
    Ok(())
}

fn read(arguments: &Arguments) -> anyhow::Result<TaskData> {
    let mut reader = csv::Reader::from_path(&arguments.data)?;
    let header = reader.headers()?.clone();
    let column = |name: &str| header.iter().position(|found| found == name);
    let label = column("label").context("no column `label`")?;
    let first = column("text")
        .or(column("text_a"))
        .context("no column `text`")?;
    let second = column("text_b");
    let mut train = Vec::new();
    for record in reader.records().take(arguments.rows) {
        let record = record?;
        train.push(Row {
            text: record[first].to_owned(),
            pair: second.map(|second| record[second].to_owned()),
            label: Label::Class(record[label].to_owned()),
        });
    }
    ensure!(
        !train.is_empty(),
        "{} has no rows",
        arguments.data.display()
    );
    let kind = if second.is_some() {
        InputKind::Pair
    } else {
        InputKind::Single
    };
    Ok(TaskData {
        kind,
        problem: Problem::Classification {
            classes: TaskData::classes_of(&train)?,
        },
        train,
        validation: Vec::new(),
        test: Vec::new(),
    })
}

fn spec(arguments: &Arguments, backbone: &Backbone) -> Result<TrainingSpec, LearningError> {
    let config = backbone.config();
    let layers: BTreeSet<u32> = match arguments.layers.as_str() {
        "all" => BTreeSet::new(),
        list => list
            .split(',')
            .map(str::parse)
            .collect::<Result<_, _>>()
            .map_err(|error| LearningError::Config(format!("--layers {list}: {error}")))?,
    };
    let text = format!(
        r#"kind = "federated-training"
name = "bench"
task = "bench"
backbone = {{ name = "bench", hidden = {}, layers = {} }}
adapter = {{ bottleneck = {} }}
algorithm = {{ name = "fedmcp" }}
training = {{ batch_size = {}, max_length = {} }}
rounds = {{ count = 1 }}
"#,
        config.hidden,
        config.layers,
        arguments.bottleneck,
        arguments.batch_size,
        arguments.max_length
    );
    let parsed = JobSpec::parse(&text).map_err(|refusal| LearningError::Config(refusal.message))?;
    let mut spec = parsed.training().clone();
    spec.adapter.layers = layers;
    spec.algorithm = AlgorithmSpec::Fedmcp {
        mu: arguments.mu,
        tau: 0.5,
        alpha: arguments.alpha,
        regulariser: Regulariser::Distance,
        cka: CkaEstimator::Unbiased,
    };
    Ok(spec)
}

fn bench(arguments: &Arguments, data: &TaskData) -> Result<serde_json::Value, LearningError> {
    let backbone = Arc::new(Backbone::load(&arguments.backbone, Kind::Float)?);
    let files = BackboneFiles::find(&arguments.backbone)?;
    let tokenizer = TextTokenizer::load(
        &files.tokenizer,
        backbone.config(),
        arguments.max_length as usize,
    )?;
    let spec = spec(arguments, &backbone)?;
    let silo = "bench".parse().expect("`bench` follows the rule for names");
    let mut trainer = LocalTrainer::new(
        TrainerSetup {
            spec: &spec,
            silo: &silo,
            backbone: Arc::clone(&backbone),
            tokenizer: &tokenizer,
            data,
            cache: CacheSettings {
                mode: if arguments.cache {
                    CacheMode::On
                } else {
                    CacheMode::Off
                },
                memory_bytes: 2 << 30,
                disk: None,
            },
        },
        None,
    )?;
    let payload = spec
        .adapter_shape()
        .initial_payload(spec.initial_scale(), concord_common::seed::Seed(0))
        .map_err(|refusal| LearningError::Config(refusal.message))?;
    // The first call sets up thread pools and buffers; it ends after its first step and leaves no trace.
    let warm_up = trainer.train_round(1, &payload, &mut |_| Continue::Stop);
    if !matches!(warm_up, Err(LearningError::Cancelled)) {
        warm_up?;
    }
    let (mut times, mut steps) = (Vec::new(), 0);
    for round in 1..=arguments.epochs {
        let started = Instant::now();
        trainer.train_round(round, &payload, &mut |progress| {
            steps = progress.steps;
            Continue::Yes
        })?;
        times.push(started.elapsed().as_secs_f64());
    }
    let fastest = times.iter().copied().fold(f64::INFINITY, f64::min);
    Ok(serde_json::json!({
        "rows": data.train.len(),
        "steps": steps,
        "layers": spec.adapter_layers(),
        "threads": arguments.threads,
        "cache": arguments.cache,
        "seconds_first_epoch": times[0],
        "seconds_per_epoch": fastest,
        "milliseconds_per_step": 1000.0 * fastest / steps as f64,
        "examples_per_second": data.train.len() as f64 / fastest,
        "peak_rss_mb": concord_common::telemetry::peak_rss_bytes().map(|bytes| bytes >> 20),
    }))
}
