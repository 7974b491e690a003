//! `concord-client predict`, `evaluate` and `export`: using a finished job's personal model.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read, Write},
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
    data::{self, BadRows, DataError, Format, MAX_ROW_BYTES, Mapping, load_evaluation},
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
        if !config.state.folder.exists() {
            // Opening the vault would make it.
            return Err(CommandError::no_model(job, &[]));
        }
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
        let (batch, fault) = next_batch(&mut inputs);
        if !batch.is_empty() {
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
                writeln!(out, "{}", Value::Object(line)).map_err(CommandError::Output)?;
            }
            out.flush().map_err(CommandError::Output)?;
        }
        match fault {
            None => {}
            Some(End::Done) => return Ok(()),
            Some(End::Bad(error)) => return Err(error),
        }
    }
}

/// Why there are no more inputs.
enum End {
    Done,
    Bad(CommandError),
}

/// Up to [`BATCH`] inputs, and whether they are the last: the good ones before a bad one are still predicted.
fn next_batch(inputs: &mut Inputs) -> (Vec<Input>, Option<End>) {
    let mut batch = Vec::new();
    while batch.len() < BATCH {
        match inputs.next() {
            Some(Ok(input)) => batch.push(input),
            Some(Err(error)) => return (batch, Some(End::Bad(error))),
            None => return (batch, Some(End::Done)),
        }
    }
    (batch, None)
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
    let mut reader = BufReader::new(input);
    let numbers = 1_u64..;
    Box::new(numbers.map_while(move |number| {
        match read_line(&mut reader) {
            Ok(None) => None,
            Ok(Some(line)) => Some(
                one_input(&line, pairs)
                    .map_err(|reason| bad_input(&file, &format!("line {number} {reason}"))),
            ),
            Err(error) => Some(Err(CommandError::io(&file, error))),
        }
    }))
}

/// The next line with its end, as far as a row may be long and a byte more; `None` at the end of the input.
fn read_line(reader: &mut impl BufRead) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    let most = MAX_ROW_BYTES as u64 + 1;
    let bytes = reader.take(most).read_until(b'\n', &mut line)?;
    Ok((bytes > 0).then_some(line))
}

/// A line's text, or its two texts with a tab between them.
fn one_input(line: &[u8], pairs: bool) -> Result<Input, String> {
    if line.len() > MAX_ROW_BYTES {
        return Err(format!("is longer than {MAX_ROW_BYTES} bytes"));
    }
    let line = str::from_utf8(line).map_err(|_| "is not UTF-8")?;
    let line = line.strip_suffix('\n').unwrap_or(line);
    let line = line.strip_suffix('\r').unwrap_or(line);
    if line.trim().is_empty() {
        return Err("is empty".to_owned());
    }
    if !pairs {
        return Ok((line.to_owned(), None));
    }
    match line.split_once('\t') {
        Some((first, second)) if !first.trim().is_empty() && !second.trim().is_empty() => {
            Ok((first.to_owned(), Some(second.to_owned())))
        }
        _ => Err("has not two texts with a tab between them".to_owned()),
    }
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
    writeln!(out, "{report:#}").map_err(CommandError::Output)
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
        writeln!(out, "{}", file.display()).map_err(CommandError::Output)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &'static [u8], pairs: bool) -> (Vec<Input>, Option<String>) {
        let mut inputs = lines("in".into(), pairs, Box::new(text));
        match next_batch(&mut inputs) {
            (batch, Some(End::Bad(error))) => (batch, Some(error.to_string())),
            (batch, _) => (batch, None),
        }
    }

    fn one(text: &str) -> Input {
        (text.to_owned(), None)
    }

    #[test]
    fn the_good_inputs_before_a_bad_one_are_still_predicted() {
        let (batch, error) = read(b"good\r\nalso good\n\nnever seen\n", false);
        assert_eq!(batch, [one("good"), one("also good")]);
        assert_eq!(error.unwrap(), "in: line 3 is empty");
        let (batch, error) = read(b"a\tb\nno tab\n", true);
        assert_eq!(batch, [("a".to_owned(), Some("b".to_owned()))]);
        assert!(error.unwrap().contains("line 2 has not two texts"));
    }

    #[test]
    fn a_line_that_is_no_text_is_named() {
        let (batch, error) = read(b"good\n\xff\xfe\n", false);
        assert_eq!(
            (batch.len(), error.unwrap().as_str()),
            (1, "in: line 2 is not UTF-8")
        );
        let endless = Box::new(io::repeat(b'a'));
        let mut inputs = lines("in".into(), false, endless);
        let error = inputs.next().unwrap().unwrap_err().to_string();
        assert!(error.contains("line 1 is longer than"), "{error}");
    }

    #[test]
    fn inputs_come_in_batches_and_end() {
        let text = "x\n".repeat(BATCH) + "last";
        let mut inputs = lines("in".into(), false, Box::new(io::Cursor::new(text)));
        let (batch, end) = next_batch(&mut inputs);
        assert_eq!((batch.len(), end.is_none()), (BATCH, true));
        let (batch, end) = next_batch(&mut inputs);
        assert_eq!(batch, [one("last")]);
        assert!(matches!(end, Some(End::Done)));
    }
}
