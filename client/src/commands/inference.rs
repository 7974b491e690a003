//! `concord-client predict`, `evaluate` and `export`: using a finished job's personal model.

use std::{
    fs::File,
    io::{self, BufRead as _, BufReader, Read, Write},
    path::{Path, PathBuf},
};

use concord_common::{JobId, config::environment};
use concord_learning::{
    data::{InputKind, Problem},
    model::{PersonalModel, Prediction},
};
use serde_json::{Map, Value, json};

use super::CommandError;
use crate::{
    bench::{Input, Workbench},
    config::{ClientConfig, TaskConfig},
    data::{self, BadRows, DataError, Format, Mapping, load_evaluation},
    export::{self, ExportFormat},
    vault::{Header, Record, Vault},
};

/// Inputs that are predicted together.
const BATCH: usize = 256;

/// How the inputs of `predict` are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum InputFormat {
    /// One input a line; the two texts of a pair are separated by a tab.
    Text,
    /// CSV with the task's columns.
    Csv,
    /// JSON objects with the task's columns, one a line.
    Jsonl,
}

/// What to predict.
#[derive(Debug, clap::Args)]
pub struct PredictArgs {
    /// The daemon's configuration.
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// The job whose model is used; may be left out if there is only one.
    #[arg(long)]
    pub job: Option<JobId>,
    /// A file of inputs; standard input otherwise.
    #[arg(long, value_name = "FILE")]
    pub input: Option<PathBuf>,
    /// How the inputs are written.
    #[arg(long, value_enum, default_value = "text")]
    pub format: InputFormat,
    /// Adds the head's outputs before softmax or scaling.
    #[arg(long)]
    pub logits: bool,
}

/// What to evaluate on.
#[derive(Debug, clap::Args)]
pub struct EvaluateArgs {
    /// The daemon's configuration.
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// The job whose model is used; may be left out if there is only one.
    #[arg(long)]
    pub job: Option<JobId>,
    /// A labelled file in the task's format, with the task's columns.
    #[arg(long, value_name = "FILE")]
    pub file: PathBuf,
}

/// What to export.
#[derive(Debug, clap::Args)]
pub struct ExportArgs {
    /// The daemon's configuration.
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// The job whose model is exported; may be left out if there is only one.
    #[arg(long)]
    pub job: Option<JobId>,
    /// The layout of the folder.
    #[arg(long, value_enum)]
    pub format: ExportFormat,
    /// A new folder.
    #[arg(long, value_name = "FOLDER")]
    pub out: PathBuf,
}

/// A personal model out of the vault.
struct Kept {
    config: ClientConfig,
    header: Header,
    model: PersonalModel,
}

impl Kept {
    fn open(path: &Path, job: Option<&JobId>) -> Result<Self, CommandError> {
        let config = ClientConfig::load(path, environment())?;
        let vault = Vault::open(&config.state.folder)?;
        let there: Vec<JobId> = vault
            .jobs()?
            .into_iter()
            .filter(|job| vault.file(job, Record::Model).exists())
            .collect();
        let chosen = match (job, there.as_slice()) {
            (Some(job), _) => job,
            (None, [only]) => only,
            (None, _) => return Err(CommandError::no_model(None, &there)),
        };
        let Some((header, body)) = vault.read(chosen, Record::Model)? else {
            return Err(CommandError::no_model(Some(chosen), &there));
        };
        Ok(Self {
            config,
            header,
            model: PersonalModel::from_bytes(&body)?,
        })
    }

    fn backbone(&self) -> Result<PathBuf, CommandError> {
        let name = &self.model.facts.backbone_name;
        self.config
            .backbones
            .iter()
            .find(|backbone| backbone.name == *name)
            .map(|backbone| backbone.path.clone())
            .ok_or_else(|| {
                CommandError::Unfit(format!(
                    "the configuration has no backbone `{name}`, which the model needs"
                ))
            })
    }

    fn task(&self) -> Result<&TaskConfig, CommandError> {
        let name = &self.header.task;
        self.config
            .tasks
            .iter()
            .find(|task| task.name == *name)
            .ok_or_else(|| {
                CommandError::Unfit(format!(
                    "the configuration has no task `{name}`, whose columns are needed"
                ))
            })
    }

    async fn bench(&self) -> Result<Workbench, CommandError> {
        let bench = Workbench::start(self.config.torch.threads)?;
        bench
            .use_model(&self.backbone()?, self.model.clone())
            .await?;
        Ok(bench)
    }
}

/// Predicts for each input: one JSON object a line, with label and probabilities, or the value of a regression.
///
/// # Errors
/// If there is no model, or an input cannot be used; what came before it is written.
pub async fn predict(args: &PredictArgs, out: &mut (dyn Write + Send)) -> Result<(), CommandError> {
    let kept = Kept::open(&args.config, args.job.as_ref())?;
    let bench = kept.bench().await?;
    let (name, input): (PathBuf, Box<dyn Read + Send>) = match &args.input {
        Some(path) => (
            path.clone(),
            Box::new(File::open(path).map_err(|error| CommandError::io(path, error))?),
        ),
        None => ("standard input".into(), Box::new(io::stdin())),
    };
    let mut inputs = inputs(&kept, args.format, &name, input)?;
    loop {
        let batch = inputs
            .by_ref()
            .take(BATCH)
            .collect::<Result<Vec<Input>, CommandError>>()?;
        if batch.is_empty() {
            return Ok(());
        }
        let logits = if args.logits {
            Some(bench.outputs(batch.clone()).await?)
        } else {
            None
        };
        let width = kept.model.facts.problem.outputs();
        let predictions = bench.predict(batch).await?;
        for (place, prediction) in predictions.iter().enumerate() {
            let mut line = described(&kept.model.facts.problem, prediction);
            if let Some(logits) = &logits {
                line.insert(
                    "logits".to_owned(),
                    json!(logits[place * width..(place + 1) * width]),
                );
            }
            writeln!(out, "{}", Value::Object(line))
                .map_err(|error| CommandError::io("standard output", error))?;
        }
        out.flush()
            .map_err(|error| CommandError::io("standard output", error))?;
    }
}

fn described(problem: &Problem, prediction: &Prediction) -> Map<String, Value> {
    let mut line = Map::new();
    match (problem, prediction) {
        (
            Problem::Classification { classes },
            Prediction::Class {
                label,
                probabilities,
            },
        ) => {
            line.insert("label".to_owned(), json!(label));
            let by_class: Map<String, Value> = classes
                .iter()
                .zip(probabilities)
                .map(|(class, probability)| (class.clone(), json!(probability)))
                .collect();
            line.insert("probabilities".to_owned(), Value::Object(by_class));
        }
        (_, Prediction::Class { label, .. }) => {
            line.insert("label".to_owned(), json!(label));
        }
        (_, Prediction::Number { value }) => {
            line.insert("value".to_owned(), json!(value));
        }
    }
    line
}

type Inputs = Box<dyn Iterator<Item = Result<Input, CommandError>> + Send>;

fn inputs(
    kept: &Kept,
    format: InputFormat,
    name: &Path,
    input: Box<dyn Read + Send>,
) -> Result<Inputs, CommandError> {
    let pairs = kept.model.facts.input == InputKind::Pair;
    let format = match format {
        InputFormat::Text => return Ok(lines(name.to_path_buf(), pairs, input)),
        InputFormat::Csv => Format::Csv,
        InputFormat::Jsonl => Format::Jsonl,
    };
    let mapping = Mapping {
        label: None,
        ..kept.task()?.mapping(false)
    };
    let file = name.to_path_buf();
    let rows = data::from_reader(name, input, format, &mapping)?;
    Ok(Box::new(rows.map(move |row| match row {
        Ok(row) => Ok((row.text, row.text_b)),
        Err(data::RowFault::Bad { line, reason }) => {
            Err(bad_input(&file, &format!("line {line}: {reason}")))
        }
        Err(data::RowFault::Broken(reason)) => Err(bad_input(&file, &reason)),
    })))
}

fn lines(file: PathBuf, pairs: bool, input: Box<dyn Read + Send>) -> Inputs {
    let numbered = BufReader::new(input).lines().zip(1..);
    Box::new(
        numbered.map(move |(line, number): (io::Result<String>, u64)| {
            let line = line.map_err(|error| CommandError::io(&file, error))?;
            if line.trim().is_empty() {
                return Err(bad_input(&file, &format!("line {number} is empty")));
            }
            if !pairs {
                return Ok((line, None));
            }
            match line.split_once('\t') {
                Some((first, second)) if !first.trim().is_empty() && !second.trim().is_empty() => {
                    Ok((first.to_owned(), Some(second.to_owned())))
                }
                _ => Err(bad_input(
                    &file,
                    &format!("line {number} has not two texts with a tab between them"),
                )),
            }
        }),
    )
}

fn bad_input(file: &Path, reason: &str) -> CommandError {
    CommandError::Data(DataError::File {
        file: file.to_path_buf(),
        reason: reason.to_owned(),
    })
}

/// Evaluates on a labelled file: one JSON object with the metrics.
///
/// # Errors
/// If there is no model, the file cannot be used, or it has a label that is unseen in training.
pub async fn evaluate(
    args: &EvaluateArgs,
    out: &mut (dyn Write + Send),
) -> Result<(), CommandError> {
    let kept = Kept::open(&args.config, args.job.as_ref())?;
    let (rows, bad): (_, BadRows) =
        load_evaluation(kept.task()?, &args.file, &kept.model.facts.problem)?;
    let evaluation = kept.bench().await?.evaluate_rows(rows).await?;
    let report = json!({
        "job": kept.header.binding.job,
        "round": kept.model.facts.round,
        "rows": evaluation.rows,
        "skipped": bad.count(),
        "metrics": evaluation.metrics,
    });
    writeln!(out, "{report:#}").map_err(|error| CommandError::io("standard output", error))
}

/// Writes the model as a folder for other programs.
///
/// # Errors
/// If there is no model, or the folder exists or cannot be written.
pub fn export(args: &ExportArgs, out: &mut dyn Write) -> Result<(), CommandError> {
    let kept = Kept::open(&args.config, args.job.as_ref())?;
    let written = export::write(
        &kept.model,
        &kept.header,
        &kept.backbone()?,
        args.format,
        &args.out,
    )?;
    for file in written {
        writeln!(out, "{}", file.display())
            .map_err(|error| CommandError::io("standard output", error))?;
    }
    Ok(())
}
